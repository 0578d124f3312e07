"""A recorded step computes again what it computed; where it can't, the replay says what differs and where the first NaN is."""

import os
from dataclasses import replace

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.spawn import free_port, run_ranks
from skyrl_mega.checkpoint import steps
from skyrl_mega.checkpoint.saver import Checkpointer
from skyrl_mega.checkpoint.store import Retention
from skyrl_mega.config.load import load_saved
from skyrl_mega.data.packing import split_updates
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import CheckpointError, ConfigError, NumericsError
from skyrl_mega.launch.replay import render, run_replay
from skyrl_mega.orchestration.loop import Parts, fill_logprobs, pack
from skyrl_mega.orchestration.recorder import Recorder
from skyrl_mega.orchestration.replay import replay_step
from skyrl_mega.orchestration.step_recorder import record_step
from skyrl_mega.training.reference import ReferenceModel
from skyrl_mega.types import TrainState

STEP = 3
SHORT = ("rollout.max_model_len=32", "trainer.tokens_per_micro_batch=64")
SETTINGS = (*SHORT, "trainer.updates_per_step=2", "trainer.record_steps=[3]", "optimizer.lr=1e-2")


def step_samples(marked: int | None = None):
    """Random samples; with `marked`, sample 4 alone has that token, next to its last."""
    samples = random_samples(4, 3, seed=1)
    if marked is not None:
        for sample in samples:
            sample.token_ids[sample.token_ids == marked] = marked + 1
        samples[4].token_ids[-2] = marked
    return samples


def train_a_step(config, *, samples=None, damage=None) -> dict:
    """What the loop does with one step's samples, without an engine: packs, fills logprobs, trains and records.

    Returns the updates' metrics and the weights after them.
    """
    with make_policy(config) as policy:
        if damage is not None:
            damage(policy)
        reference = ReferenceModel(config, policy.topology) if config.algorithm.kl.coef > 0 else None
        recorder = Recorder(config, rank=policy.topology.rank)
        state = TrainState(STEP - 1, STEP - 1, {}, num_trained_groups=0, num_optimizer_steps=0)
        saver = Checkpointer(config.trainer.run_dir, policy.topology, Retention(keep_last=1), asynchronous=False)
        parts = Parts(config, policy.topology, policy, reference, recorder, state, torch.float32, True, saver)
        divided = split_updates(samples or step_samples(), config.trainer.updates_per_step)
        batches = [pack(config, policy.topology, update, share_prompts=True) for update in divided]
        fill_logprobs(parts, batches)
        try:
            with record_step(parts, STEP, divided) as train_step:
                metrics = [train_step(batch) for batch in batches]
        finally:
            recorder.close()
        return {"metrics": metrics, "weights": {name: value.clone() for name, value in policy.iter_weights(torch.float32)}}


def on_rank(rank: int, run_dir: str, other, ports: list[int]) -> dict:
    """Replays of `run_dir` by two ranks, and a record of `other` by two data-parallel ranks, in one start of the ranks.

    The ranks join a world four times: each needs a port of its own.
    """
    replays = {}
    for layout, port in zip(("tp2", "dp2", "pp2"), ports, strict=False):
        os.environ["MASTER_PORT"] = str(port)
        replays[layout] = replay_step(run_dir, STEP, [f"parallel={layout}"], world_size=2)
    os.environ["MASTER_PORT"] = str(ports[-1])
    train_a_step(other)
    return replays


def lines_of(replay) -> dict[str, object]:
    return {f"{update.number}/{line.name}": line for update in replay.updates for line in update.comparisons}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A recorded step of two updates, with a reference model, by one process."""
    config = tiny_config(tmp_path_factory.mktemp("replay"), *SETTINGS, "algorithm.kl.coef=0.1", tied=False)
    train_a_step(config)
    return config


# ---- the same step again --------------------------------------------------------------------------------------------------


def test_the_same_layout_computes_the_same_bits(recorded, capsys):
    replay = replay_step(recorded.trainer.run_dir, STEP, tolerance=0.0)
    assert replay.agrees
    assert (replay.record.step, replay.record.weight_version) == (STEP, STEP - 1)
    lines = lines_of(replay)
    for number in (0, 1):
        assert {
            f"{number}/{name}" for name in ("logprobs", "loss/total", "loss/kl", "policy/entropy", "update/grad_norm")
        } <= set(lines)
    assert all(line.difference == 0.0 for line in lines.values())
    assert lines["1/policy/ratio"].recorded != 1.0  # the second update's weights are not the first's
    assert all(update.worst is None and update.non_finite is None for update in replay.updates)


def test_a_step_keeps_the_routing_that_it_replayed(tmp_path):
    """Its second update has other weights than the pass whose routing it replays: computed again, that would be another one."""
    config = tiny_config(tmp_path, *SETTINGS, "model.router_replay=old", family="qwen3_moe", tied=False, num_experts=6)
    train_a_step(config)
    assert replay_step(config.trainer.run_dir, STEP, tolerance=0.0).agrees
    path = steps.find_step(config.trainer.run_dir, STEP)
    second = steps.read_inputs(path, 1)
    assert all(sample.routed_experts.shape == (sample.num_tokens, 2, 2) for sample in second.samples)
    file = steps.update_dir(path, 1) / steps.INPUTS_FILE
    file.unlink()
    free = replace(second, samples=[replace(sample, routed_experts=None) for sample in second.samples])
    file.parent.rename(tmp_path / "weights")
    steps.write_inputs(path, 1, free)
    (tmp_path / "weights" / steps.WEIGHTS).rename(file.parent / steps.WEIGHTS)
    assert not replay_step(config.trainer.run_dir, STEP, tolerance=1e-4).agrees


def test_layouts_replay_each_other(recorded, tmp_path):
    other = tiny_config(tmp_path, *SETTINGS)
    for replays in run_ranks(on_rank, 2, recorded.trainer.run_dir, other, [free_port() for _ in range(4)]):
        for layout, replay in replays.items():
            assert replay.agrees, layout
            assert max(line.difference for line in lines_of(replay).values()) < 1e-5, layout
    replay = replay_step(other.trainer.run_dir, STEP)
    assert replay.record.surroundings["layout"]["data"] == 2
    assert len(replay.updates) == 2
    assert max(line.difference for line in lines_of(replay).values()) < 1e-5


def test_a_bfloat16_step_replays_in_float32_within_the_tolerance(tmp_path):
    config = tiny_config(tmp_path, "precision=bfloat16", "trainer.record_steps=[3]")
    train_a_step(config)
    assert replay_step(config.trainer.run_dir, STEP, tolerance=0.0).agrees
    replay = replay_step(config.trainer.run_dir, STEP, ["precision=float32"])
    assert replay.agrees
    assert replay.updates[0].worst is not None
    assert not replay_step(config.trainer.run_dir, STEP, ["precision=float32"], tolerance=1e-9).agrees


def test_a_difference_is_told_and_fails(recorded, capsys):
    code = run_replay(recorded.trainer.run_dir, STEP, ["rollout.temperature=0.9"])
    shown = capsys.readouterr().out
    assert code == 1
    assert "logprobs" in shown
    assert "<-- differs" in shown
    assert "worst token: sample " in shown
    assert shown.endswith("The replay differs from the record beyond the tolerance.\n")


# ---- a step that failed ---------------------------------------------------------------------------------------------------


def test_a_nan_weight_is_located_in_the_step_that_it_failed(tmp_path, capsys):
    marked = 77

    def damage(policy):
        policy.chunks[0].embedding.word_embeddings.weight.data[marked, 5] = float("nan")

    config = tiny_config(tmp_path, *SHORT, tied=False)
    with pytest.raises(NumericsError):
        train_a_step(config, samples=step_samples(marked), damage=damage)
    assert "recorded step 3: " in capsys.readouterr().out
    replay = replay_step(config.trainer.run_dir, STEP)
    (update,) = replay.updates
    assert "is not finite" in update.recorded_error
    assert "is not finite" in update.replayed_error
    assert replay.agrees
    assert (update.non_finite.what, update.non_finite.sample_index) == ("logprob", 4)
    assert step_samples(marked)[4].loss_mask[update.non_finite.position]
    assert update.non_finite.micro_batch > 0
    assert update.bad_tensors == ["model.embed_tokens.weight"]
    assert "in micro-batch" in "\n".join(render(replay))


def test_an_infinite_advantage_is_located_and_the_failure_reproduced(tmp_path):
    samples = step_samples()
    samples[4].advantages[-1] = float("inf")
    config = tiny_config(tmp_path, "trainer.updates_per_step=2")
    with pytest.raises(NumericsError):
        train_a_step(config, samples=samples)
    update = replay_step(config.trainer.run_dir, STEP).updates[0]
    assert (update.non_finite.what, update.non_finite.sample_index) == ("advantage", 4)
    assert update.non_finite.position == samples[4].num_tokens - 1


def test_the_failing_update_alone_is_recorded_where_nobody_asked(tmp_path):
    samples = step_samples()
    samples[-1].advantages[-1] = float("nan")
    config = tiny_config(tmp_path, "trainer.updates_per_step=2")
    with pytest.raises(NumericsError):
        train_a_step(config, samples=samples)
    replay = replay_step(config.trainer.run_dir, STEP)
    assert [update.number for update in replay.updates] == [1]
    assert replay.agrees


# ---- files ----------------------------------------------------------------------------------------------------------------


def test_recording_changes_no_result_and_not_recording_leaves_nothing(tmp_path):
    config = tiny_config(tmp_path, "trainer.updates_per_step=2")
    plain = train_a_step(config)
    assert not steps.steps_dir(config.trainer.run_dir).exists()
    recorded = train_a_step(replace(config, trainer=replace(config.trainer, record_steps=(STEP,))))
    assert recorded["metrics"] == plain["metrics"]
    assert all(torch.equal(value, plain["weights"][name]) for name, value in recorded["weights"].items())


def test_a_record_holds_inputs_weights_config_versions_and_commit(recorded):
    path = steps.find_step(recorded.trainer.run_dir, STEP)
    record = steps.read_record(path)
    assert load_saved(path / steps.CONFIG_FILE) == recorded
    assert record.surroundings["versions"].keys() >= {"torch", "megatron-core"}
    assert "git_commit" in record.surroundings
    assert (record.num_updates, record.error, len(record.metrics)) == (0, "", 2)
    inputs = steps.read_inputs(path, 1)
    expected = split_updates(step_samples(), 2)[1]
    for sample, original in zip(inputs.samples, expected, strict=True):
        assert (sample.sample_index, sample.group_id, sample.reward) == (
            original.sample_index,
            original.group_id,
            original.reward,
        )
        for name in ("token_ids", "loss_mask", "rollout_logprobs", "advantages"):
            assert torch.equal(getattr(sample, name), getattr(original, name))
    assert inputs.old_logprobs.keys() == inputs.ref_logprobs.keys() == {sample.sample_index for sample in expected}
    assert (steps.weights_dir(path, 1) / "model.safetensors").is_file()


def test_a_torn_record_does_not_count_and_is_removed_by_the_next(tmp_path):
    torn = steps.begin(tmp_path, 2)
    (torn / steps.RECORD_FILE).write_text("{}")
    assert steps.list_steps(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"no record of step 2; recorded steps: none.*trainer.record_steps=\[2\]"):
        steps.find_step(tmp_path, 2)
    temporary = steps.begin(tmp_path, 12)
    assert not torn.exists()
    steps.commit(temporary, steps.RecordedStep(12, 11, 11, [], "", "", {}))
    assert not temporary.exists()
    with pytest.raises(CheckpointError, match="recorded steps: 12"):
        steps.find_step(tmp_path, 2)
    assert steps.read_record(steps.find_step(tmp_path, 12)).weight_version == 11


def test_recording_a_step_again_replaces_its_record(tmp_path):
    for version in (1, 2):
        steps.commit(steps.begin(tmp_path, 12), steps.RecordedStep(12, version, 0, [], "", "", {}))
    assert steps.read_record(steps.find_step(tmp_path, 12)).weight_version == 2


@pytest.mark.parametrize("damage", ["{", "{}", "[]", None])
def test_a_damaged_record_is_refused(tmp_path, damage):
    path = steps.commit(steps.begin(tmp_path, 12), steps.RecordedStep(12, 1, 0, [], "", "", {}))
    if damage is None:
        (path / steps.RECORD_FILE).unlink()
    else:
        (path / steps.RECORD_FILE).write_text(damage)
    with pytest.raises(CheckpointError, match="record the step again"):
        steps.read_record(path)


def test_a_full_disk_ends_a_requested_record_with_the_remedy(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "trainer.record_steps=[3]")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(steps, "write_inputs", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train_a_step(config)
    assert steps.list_steps(config.trainer.run_dir) == []


def test_a_failure_to_record_does_not_hide_the_failed_step(tmp_path, monkeypatch, capsys):
    samples = step_samples()
    samples[0].advantages[-1] = float("nan")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(steps, "write_inputs", full)
    with pytest.raises(NumericsError):
        train_a_step(tiny_config(tmp_path), samples=samples)
    assert "the failed step could not be recorded" in capsys.readouterr().out


# ---- what can't be replayed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.path=elsewhere"], "with the weights that were recorded"),
        (["parallel=tp2"], "number of processes must be divisible"),
        (["trainer.max_stps=3"], "did you mean `trainer.max_steps`"),
        (["recipe=tiny"], "changed setting by setting"),
    ],
)
def test_overrides_that_can_not_be_are_explained(recorded, overrides, words):
    with pytest.raises(ConfigError, match=words):
        replay_step(recorded.trainer.run_dir, STEP, overrides)


def test_a_record_that_does_not_hold_enough_is_refused(tmp_path):
    config = tiny_config(tmp_path, "trainer.record_steps=[3]")
    train_a_step(config)
    with pytest.raises(ConfigError, match=r"`algorithm\.kl\.coef` was 0, got 0\.1"):
        replay_step(config.trainer.run_dir, STEP, ["algorithm.kl.coef=0.1"])
    path = steps.find_step(config.trainer.run_dir, STEP)
    (steps.weights_dir(path, 0) / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is incomplete"):
        replay_step(config.trainer.run_dir, STEP)


def test_a_replay_corrects_what_was_off_policy_as_the_run_did_and_compares_its_statistics(tmp_path):
    stages = "[{name: truncated_is, level: sequence},{name: staleness_decay}]"
    config = tiny_config(tmp_path, *SHORT, "trainer.record_steps=[3]", f"algorithm.off_policy.stages={stages}")
    samples = step_samples()
    for sample in samples:
        sample.staleness = sample.loss_mask.float() * (sample.sample_index % 3)
        sample.rollout_logprobs = torch.where(sample.loss_mask, -5.5 + sample.rollout_logprobs / 10, 0.0)
    train_a_step(config, samples=samples)
    inputs = steps.read_inputs(steps.find_step(config.trainer.run_dir, STEP), 0)
    assert all(torch.equal(read.staleness, sample.staleness) for read, sample in zip(inputs.samples, samples, strict=True))
    replay = replay_step(config.trainer.run_dir, STEP)
    assert replay.agrees
    assert {"0/off_policy/weight", "0/off_policy/staleness_decay_fraction", "0/off_policy/sequence/weight"} <= lines_of(
        replay
    ).keys()
    other = replay_step(config.trainer.run_dir, STEP, ["algorithm.off_policy.stages=[{name: staleness_decay, power: 2.0}]"])
    assert not lines_of(other)["0/off_policy/bounded_weight"].agrees
