"""The loop with a critic, engines replaced by a script: who is trained when; a killed run resumes to the same numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from helpers.policy import joined, tiny_config
from skyrl_mega.algorithms.advantages import ADVANTAGES, Advantages
from skyrl_mega.checkpoint import state as checkpoint_state
from skyrl_mega.checkpoint import steps, store
from skyrl_mega.checkpoint.saver import Checkpointer
from skyrl_mega.config.schema import Config
from skyrl_mega.data.packing import to_samples
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import NonFiniteUpdateError
from skyrl_mega.orchestration.coordinator import Taken
from skyrl_mega.orchestration.loop import Parts, train
from skyrl_mega.orchestration.nonfinite import SkippedUpdates
from skyrl_mega.orchestration.recorder import Recorder
from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.training.critic import Critic
from skyrl_mega.training.policy import Policy
from skyrl_mega.types import StopReason, TrainState, Trajectory, TrajectoryGroup, Turn

STEPS = 4
SETTINGS = [
    *("algorithm.advantage=over_values_in_test_ppo_loop", "trainer.updates_per_step=2", f"trainer.max_steps={STEPS}"),
    *("critic.warmup_steps=1", "critic.optimizer.lr=1e-3", "evaluation.num_prompts=0", "checkpoint.interval_steps=2"),
    "telemetry.trackers=[]",
]
COMPUTED = ("loss/", "policy/", "critic/", "update/", "advantages/", "reward/")


@ADVANTAGES.register("over_values_in_test_ppo_loop", needs=frozenset({"values"}))
def over_values(inputs):
    """The sample's reward less the value: GAE with gamma = lam = 1, where only the last token is rewarded."""
    returns_T = inputs.spread(inputs.rewards_N)
    return Advantages(torch.where(inputs.loss_mask, returns_T - inputs.values_T, 0.0), returns_T)


class Killed(Exception):
    """In place of a SIGKILL: nothing after it runs."""


class Host:
    """The rollout side as the loop calls it: each step has its groups, whoever asks; rewards are 0 and 1."""

    def __init__(self, killed_at: int = 0) -> None:
        self.killed_at = killed_at

    def call(self, method, *args, **unused):
        if method != "take":
            return {"receivers": [], "source_state": {}}.get(method)
        if args[0] == self.killed_at:
            raise Killed
        return Taken(groups=scripted_groups(args[0]))


def scripted_groups(step: int) -> list[TrajectoryGroup]:
    groups: dict[str, list[Trajectory]] = {}
    for sample in random_samples(4, 2, seed=step):
        start, length, reward = int(sample.loss_mask.nonzero()[0]), sample.num_tokens, float(sample.reward > 0)
        trajectory = Trajectory(
            token_ids=sample.token_ids.tolist(),
            loss_mask=sample.loss_mask.int().tolist(),
            rollout_logprobs=sample.rollout_logprobs.tolist(),
            policy_versions=[0 if mask else -1 for mask in sample.loss_mask.tolist()],
            turns=(Turn(start, length, StopReason.STOP, reward),),
            reward=reward,
            terminated=True,
            truncated=False,
        )
        groups.setdefault(sample.group_id, []).append(trajectory)
    return [TrajectoryGroup(f"{step}/{name}", name, tuple(members)) for name, members in groups.items()]


@contextmanager
def assembled(config: Config, host: Host, resume: bool = False) -> Iterator[Parts]:
    with joined(config) as topology:
        policy, critic = Policy.from_hf(config, topology), Critic.from_hf(config, topology)
        state = TrainState(0, 0, {}, num_trained_groups=0, num_optimizer_steps=0)
        if resume:
            path = store.find_checkpoint(config.trainer.run_dir)
            state = checkpoint_state.load(path, policy, topology, critic=critic)
        recorder = Recorder(config, rank=0, start_step=state.step)
        saver = Checkpointer(config.trainer.run_dir, topology, store.Retention(2), asynchronous=True)
        parts = Parts(config, topology, policy, None, recorder, state, torch.float32, True, saver, critic=critic, rollout=host)
        try:
            yield parts
        finally:
            saver.close()
            recorder.close()


def weights_of(parts: Parts) -> dict[str, dict[str, torch.Tensor]]:
    models = {"policy": parts.policy, "critic": parts.critic}
    return {name: {key: value.clone() for key, value in model.iter_weights(torch.float32)} for name, model in models.items()}


def rows_of(config: Config) -> dict[int, dict[str, float]]:
    rows = {row["step"]: row for row in read_metrics(config.trainer.run_dir)}
    return {step: {name: value for name, value in row.items() if name.startswith(COMPUTED)} for step, row in rows.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("undisturbed"), *SETTINGS)
    with assembled(config, Host()) as parts:
        before = weights_of(parts)
        state = train(parts)
        return {"rows": rows_of(config), "before": before, "after": weights_of(parts), "state": state}


def test_the_critic_is_trained_in_every_step_and_the_policy_after_the_warm_up(undisturbed):
    rows, state = undisturbed["rows"], undisturbed["state"]
    assert (state.num_optimizer_steps, state.num_critic_updates) == (2 * (STEPS - 1), 2 * STEPS)
    assert all(rows[step]["critic/grad_norm"] > 0 for step in range(1, STEPS + 1))
    assert "update/grad_norm" not in rows[1]
    assert rows[1]["update/skipped"] == 1.0
    assert all(rows[step]["update/grad_norm"] > 0 and rows[step]["update/skipped"] == 0 for step in range(2, STEPS + 1))
    # A sample that got what it was expected to get, as all without reward in the first step, is no less to be learnt from.
    assert all(rows[step]["update/samples_skipped"] == 0 for step in range(2, STEPS + 1))
    for step in range(1, STEPS + 1):
        rewards = [t.reward * sum(t.loss_mask) for group in scripted_groups(step) for t in group.trajectories]
        tokens = [sum(t.loss_mask) for group in scripted_groups(step) for t in group.trajectories]
        # The mean over two updates with unequal numbers of tokens is not quite that over the step's tokens.
        assert rows[step]["critic/return_mean"] == pytest.approx(sum(rewards) / sum(tokens), abs=0.1)
    for model in ("policy", "critic"):
        assert any(
            not torch.equal(value, undisturbed["after"][model][name]) for name, value in undisturbed["before"][model].items()
        )


def test_a_killed_run_resumes_to_the_same_numbers(undisturbed, tmp_path):
    config = tiny_config(tmp_path, *SETTINGS)
    with pytest.raises(Killed), assembled(config, Host(killed_at=4)) as parts:
        train(parts)
    assert max(rows_of(config)) == 3
    with assembled(config, Host(), resume=True) as parts:
        assert (parts.state.step, parts.critic.num_updates, parts.policy.num_updates) == (2, 4, 2)
        state = train(parts)
        after = weights_of(parts)
    assert rows_of(config) == undisturbed["rows"]
    assert (state.num_critic_updates, state.num_optimizer_steps) == (2 * STEPS, 2 * (STEPS - 1))
    for model, weights in undisturbed["after"].items():
        assert all(torch.equal(value, after[model][name]) for name, value in weights.items()), model


def break_update(model: Policy | Critic, number: int) -> None:
    """Lets the gradient of the model's backward passes be infinite in its attempted update `number` (from 0)."""
    attempts, train_step = iter(range(1000)), model.train_step
    weight = model.chunks[0].decoder.layers[0].mlp.linear_fc2.weight

    def broken(batch):
        if next(attempts) != number:
            return train_step(batch)
        hook = weight.register_hook(lambda gradient: gradient * float("inf"))
        try:
            return train_step(batch)
        finally:
            hook.remove()

    model.train_step = broken


def test_an_update_that_is_not_finite_is_left_out_counted_told_and_recorded(undisturbed, tmp_path, capsys):
    config = tiny_config(tmp_path, *SETTINGS)
    with assembled(config, Host()) as parts:
        break_update(parts.policy, 2)  # the first update of step 3: step 1 trains the critic alone
        break_update(parts.critic, 5)  # the second update of step 3
        state = train(parts)
    rows = rows_of(config)
    for model in ("update", "critic"):
        assert [rows[step][f"{model}/nonfinite_skipped"] for step in (2, 3, 4)] == [0.0, 1.0, 0.0]
        assert rows[3][f"{model}/skipped"] == (0.5 if model == "update" else 1.0), "critic: only the update left out says so"
        assert rows[3][f"{model}/grad_norm"] > 0, "of the other update of the step"
    assert rows[2] == undisturbed["rows"][2]
    assert state.num_nonfinite_skipped == 2
    assert (state.num_optimizer_steps, state.num_critic_updates) == (2 * (STEPS - 1) - 1, 2 * STEPS - 1)
    saved, _ = store.read_state(store.find_checkpoint(config.trainer.run_dir))
    assert saved.num_nonfinite_skipped == 2
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("The run goes on without it (number 1 in a row of the 3") == 2
    [record] = steps.list_steps(config.trainer.run_dir)
    assert "gradient norm of update 2 is" in steps.read_record(record).error
    assert steps.read_record(record).step == 3
    see_the_critics_record(config, parts)


def see_the_critics_record(config: Config, parts: Parts) -> None:
    """What the critic's second update of step 3 saw: its samples with the returns of the step, the values, and its weights."""
    path = steps.steps_dir(config.trainer.run_dir) / "critic_step_000003"
    record, inputs = steps.read_record(path), steps.read_inputs(path, 0)
    assert "gradient norm of update 5 is" in record.error
    assert (record.step, record.num_updates) == (3, 5)
    second = to_samples(scripted_groups(3), policy_version=2)[4:]
    assert [sample.token_ids.tolist() for sample in inputs.samples] == [sample.token_ids.tolist() for sample in second]
    for sample in inputs.samples:
        rewarded = torch.full((int(sample.loss_mask.sum()),), sample.reward)
        assert torch.equal(inputs.returns[sample.sample_index][sample.loss_mask], rewarded)
        baseline = rewarded - sample.advantages[sample.loss_mask]
        assert torch.allclose(inputs.values[sample.sample_index][sample.loss_mask], baseline, atol=1e-6)
    weights = load_file(steps.weights_dir(path, 0) / "model.safetensors")
    assert weights["score.weight"].shape == (1, 64)
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_too_many_in_a_row_end_the_run_and_0_allows_none(tmp_path):
    def fails():
        raise NonFiniteUpdateError("not finite.")

    notes: list[str] = []
    skipped = SkippedUpdates(2, notes.append)
    for update in (fails, fails, lambda: {"update/skipped": 0.0}, fails, lambda: {"update/skipped": 1.0}, fails):
        skipped.attempt("update", update)
    skipped.attempt("critic", fails)
    with pytest.raises(NonFiniteUpdateError):
        skipped.attempt("update", fails)  # an update without a learning signal had not ended the row
    assert len(notes) == 5
    assert skipped.take_metrics() == {"update/nonfinite_skipped": 4.0, "critic/nonfinite_skipped": 1.0}
    assert (skipped.take_total(), skipped.take_total()) == (5, 0)
    with pytest.raises(NonFiniteUpdateError):
        SkippedUpdates(0, notes.append).attempt("update", fails)
