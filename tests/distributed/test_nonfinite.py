"""An update that is not finite on one rank leaves no trace: the run goes on as one that never had it."""

import pytest
import torch

from helpers.critic import critic_batch, make_critic
from helpers.policy import make_policy
from helpers.spawn import run_cases
from helpers.tiny import write_tiny_model
from skyrl_mega.config.load import load_config
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import NonFiniteUpdateError

OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
#: Case -> (what is trained, what is broken on rank 1 alone, overrides).
CASES = {
    "loss": ("policy", "loss", ()),
    "loss, replicated optimizer": ("policy", "loss", ("parallel.distributed_optimizer=false",)),
    "gradient, bfloat16": ("policy", "gradient", ("precision=bfloat16",)),
    "gradient, overlapped": ("policy", "gradient", OVERLAP),
    "critic": ("critic", "gradient", ()),
}


def policy_batch(policy, seed: int, *, bad_loss: bool = False):
    batch = balance_and_pack(
        random_samples(4, 3, seed=seed),
        tokens_per_micro_batch=64,
        dp_rank=policy.topology.dp_rank,
        dp_size=policy.topology.dp_size,
        skip_zero_advantage=False,
    )
    assert len(batch.micro_batches) > 1
    if bad_loss and policy.topology.dp_rank == 1:
        micro_batch = batch.micro_batches[1]
        micro_batch.advantages[micro_batch.loss_mask.nonzero()[0]] = float("inf")
    return batch


def updates(config, model: str, broken: str) -> dict:
    """Metrics and weights of two updates, with a third between them that is not finite unless `broken` is empty."""
    with (make_critic if model == "critic" else make_policy)(config) as trained:

        def train(seed: int, *, bad_loss: bool = False):
            if model == "critic":
                return trained.train_step(critic_batch(config, trained.topology, seed)[0])
            return trained.train_step(policy_batch(trained, seed, bad_loss=bad_loss))

        metrics, error = [train(1)], ""
        if broken:
            hook = None
            if broken == "gradient" and trained.topology.dp_rank == 1:
                weight = trained.chunks[0].decoder.layers[0].mlp.linear_fc2.weight
                hook = weight.register_hook(lambda gradient: gradient * float("inf"))
            with pytest.raises(NonFiniteUpdateError) as caught:
                train(2, bad_loss=broken == "loss")
            error = str(caught.value)
            if hook is not None:
                hook.remove()
        metrics.append(train(3))
        weights = {name: value.clone() for name, value in trained.iter_weights(torch.float32)}
        return {"metrics": metrics, "weights": weights, "num_updates": trained.num_updates, "error": error}


def test_a_non_finite_update_on_one_rank_is_left_out_by_all_and_changes_nothing(tmp_path):
    path = write_tiny_model(tmp_path / "model", "llama", tied=True)
    base = ["recipe=tiny", f"model.path={path}", f"trainer.run_dir={tmp_path / 'run'}", "parallel=dp2"]
    base += ["optimizer.lr=1e-2", "optimizer.schedule=cosine", "optimizer.weight_decay=0.1", "rollout.max_model_len=64"]
    configs = {(case, bad): load_config([*base, *changes]) for case, (_, _, changes) in CASES.items() for bad in (False, True)}
    cases = {name: (config, CASES[name[0]][0], CASES[name[0]][1] if name[1] else "") for name, config in configs.items()}
    ranks = run_cases(updates, 2, cases, timeout_s=200)
    for case, (_, broken, _) in CASES.items():
        for results in ranks:
            never, skipped = results[case, False], results[case, True]
            assert "not finite" in skipped["error"] or "gradient norm of update 1 is" in skipped["error"], case
            assert ("loss" in skipped["error"]) == (broken == "loss"), case
            assert "not applied" in skipped["error"], case
            assert skipped["num_updates"] == never["num_updates"] == 2, case
            assert skipped["metrics"] == never["metrics"], case
            assert all(torch.equal(value, skipped["weights"][name]) for name, value in never["weights"].items()), case
        assert ranks[0][case, True]["weights"].keys() == ranks[1][case, True]["weights"].keys()
        for name, value in ranks[0][case, True]["weights"].items():
            assert torch.equal(value, ranks[1][case, True]["weights"][name]), case
