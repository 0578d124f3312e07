"""A checkpoint restores everything, into another layout too."""

import json

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.spawn import run_ranks
from skyrl_mega.checkpoint import state as checkpoint
from skyrl_mega.checkpoint import store
from skyrl_mega.config.load import load_config
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import TrainState

STATE = TrainState(7, 7, {"index": 28}, num_trained_groups=28, num_optimizer_steps=2, elapsed_train_s=1.5)


def update(policy, seed: int) -> dict:
    topology = policy.topology
    batch = balance_and_pack(
        random_samples(4, 3, seed=seed),
        tokens_per_micro_batch=64,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        skip_zero_advantage=False,
        share_prompts=True,
    )
    return policy.train_step(batch)


def save_and_go_on(config) -> dict:
    """Two updates, a checkpoint, a third update: what a restored run must continue to."""
    with make_policy(config) as policy:
        update(policy, 1)
        update(policy, 2)
        path = checkpoint.save(config.trainer.run_dir, policy, STATE, policy.topology, keep_last=2)
        return {"path": path, "metrics": update(policy, 3), "weights": clones(policy)}


def restore_and_go_on(config) -> dict:
    with make_policy(config) as policy:
        state = checkpoint.load(store.find_checkpoint(config.trainer.run_dir), policy, policy.topology)
        assert policy.num_updates == STATE.num_optimizer_steps
        return {"state": state, "metrics": update(policy, 3), "weights": clones(policy)}


def clones(policy) -> dict:
    return {name: value.clone() for name, value in policy.iter_weights(torch.float32)}


def save_on_rank(rank: int, config) -> dict:
    return save_and_go_on(config)


def restore_on_rank(rank: int, config) -> dict:
    return restore_and_go_on(config)


def variant(config, *overrides: str):
    base = ["recipe=tiny", f"model.path={config.model.path}", f"trainer.run_dir={config.trainer.run_dir}"]
    return load_config([*base, f"model.dtype={config.model.dtype}", f"rollout.dtype={config.rollout.dtype}", *overrides])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, precision):
    config = tiny_config(tmp_path, f"precision={precision}")
    expected = save_and_go_on(config)
    restored = restore_and_go_on(config)
    assert restored["state"] == STATE
    assert restored["metrics"] == expected["metrics"]
    assert all(torch.equal(value, expected["weights"][name]) for name, value in restored["weights"].items())


@pytest.mark.parametrize(
    ("saved_by", "restored_by", "tied"),
    [
        (["parallel.tensor=2"], None, False),
        (None, ["parallel.tensor=2"], False),
        ([], ["parallel.tensor=2"], False),
        (["parallel.pipeline=2"], ["parallel.tensor=2"], True),
        ([], ["parallel.pipeline=2"], False),
    ],
    ids=["tensor2-to-single", "single-to-tensor2", "data2-to-tensor2", "pipeline2-to-tensor2", "data2-to-pipeline2"],
)
def test_a_checkpoint_loads_into_another_layout(tmp_path, saved_by, restored_by, tied):
    config = tiny_config(tmp_path, family="llama" if tied else "qwen3", tied=tied)
    if saved_by is None:
        expected = save_and_go_on(config)
    else:
        expected = run_ranks(save_on_rank, 2, variant(config, *saved_by))[0]
    if restored_by is None:
        restored = [restore_and_go_on(config)]
    else:
        restored = run_ranks(restore_on_rank, 2, variant(config, *restored_by))
    for result in restored:
        assert result["metrics"]["loss/total"] == pytest.approx(expected["metrics"]["loss/total"], abs=1e-5)
        assert result["metrics"]["update/grad_norm"] == pytest.approx(expected["metrics"]["update/grad_norm"], rel=1e-4)
        for name, value in result["weights"].items():
            assert (value - expected["weights"][name]).abs().max() < 1e-5, name


def test_a_damaged_checkpoint_is_refused_with_the_way_out(tmp_path):
    config = tiny_config(tmp_path)
    path = save_and_go_on(config)["path"]
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "nothing", "sharded_backend_version": 1}))
    with make_policy(config) as policy, pytest.raises(CheckpointError, match="Remove it to use an older one"):
        checkpoint.load(path, policy, policy.topology)
