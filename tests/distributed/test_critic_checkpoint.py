"""A checkpoint holds the critic beside the policy: bit for bit, in another layout too, and never silently left out."""

from dataclasses import replace

import pytest
import torch

from helpers.critic import critic_batch, make_critic
from helpers.policy import make_policy, tiny_config
from helpers.spawn import run_ranks
from helpers.updates import variant
from skyrl_mega.checkpoint import state as checkpoint
from skyrl_mega.checkpoint import store
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import TrainState

#: The critic has made more updates than the policy: it was warmed up.
STATE = TrainState(3, 3, {}, num_trained_groups=12, num_optimizer_steps=1, num_critic_updates=2)
SETTINGS = ["critic.optimizer.lr=1e-3", "critic.optimizer.warmup_updates=8"]


def go_on(policy, critic) -> dict:
    batch, _ = critic_batch(policy.config, policy.topology, 3)
    metrics = policy.train_step(batch) | critic.train_step(batch)
    weights = {
        name: {key: value.clone() for key, value in model.iter_weights(torch.float32)}
        for name, model in (("policy", policy), ("critic", critic))
    }
    return {"metrics": metrics, "weights": weights}


def save_and_go_on(config) -> dict:
    with make_policy(config) as policy, make_critic(config, topology=policy.topology) as critic:
        batches = [critic_batch(config, policy.topology, seed)[0] for seed in (1, 2)]
        policy.train_step(batches[0])
        for batch in batches:
            critic.train_step(batch)
        checkpoint.save(config.trainer.run_dir, policy, STATE, policy.topology, keep_last=2, critic=critic)
        return go_on(policy, critic)


def restore_and_go_on(config) -> dict:
    with make_policy(config) as policy, make_critic(config, topology=policy.topology) as critic:
        path = store.find_checkpoint(config.trainer.run_dir)
        assert checkpoint.load(path, policy, policy.topology, critic=critic) == STATE
        assert (policy.num_updates, critic.num_updates) == (1, 2)
        return go_on(policy, critic)


def restore_on_rank(rank: int, config) -> dict:
    return restore_and_go_on(config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, precision):
    config = tiny_config(tmp_path, f"precision={precision}", *SETTINGS)
    expected, restored = save_and_go_on(config), restore_and_go_on(config)
    assert restored["metrics"] == expected["metrics"]
    for model, weights in expected["weights"].items():
        assert all(torch.equal(value, restored["weights"][model][name]) for name, value in weights.items()), model


def test_a_checkpoint_with_a_critic_loads_into_another_layout(tmp_path):
    config = tiny_config(tmp_path, *SETTINGS, "optimizer.eps=1e-4", "critic.optimizer.eps=1e-4", tied=True)
    expected = save_and_go_on(config)
    changed = variant(config, *SETTINGS, "optimizer.eps=1e-4", "critic.optimizer.eps=1e-4", "parallel=pp2")
    for restored in run_ranks(restore_on_rank, 2, changed):
        for name in ("loss/total", "update/grad_norm", "critic/loss", "critic/grad_norm", "critic/lr"):
            assert restored["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-4, abs=1e-5), name
        for model, weights in expected["weights"].items():
            assert max(float((value - restored["weights"][model][name]).abs().max()) for name, value in weights.items()) < 1e-5


def test_a_run_without_a_critic_and_one_with_it_refuse_each_others_checkpoints(tmp_path):
    config = tiny_config(tmp_path, *SETTINGS)
    run_dir = config.trainer.run_dir
    with make_policy(config) as policy, make_critic(config, topology=policy.topology) as critic:
        with_critic = checkpoint.save(run_dir, policy, STATE, policy.topology, keep_last=2, critic=critic)
        with pytest.raises(CheckpointError, match=r"saved with a critic and this run has none: its `algorithm\.advantage`"):
            checkpoint.load(with_critic, policy, policy.topology)
        without = replace(STATE, step=4, num_critic_updates=None)
        path = checkpoint.save(run_dir, policy, without, policy.topology, keep_last=2)
        assert checkpoint.load(path, policy, policy.topology) == without
        with pytest.raises(CheckpointError, match="saved without a critic and this run has one"):
            checkpoint.load(path, policy, policy.topology, critic=critic)


def test_export_of_a_checkpoint_with_a_critic_reads_the_policy_only(tmp_path):
    config = tiny_config(tmp_path, *SETTINGS)
    save_and_go_on(config)
    with make_policy(config) as policy:
        before = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
        checkpoint.load_model(store.find_checkpoint(config.trainer.run_dir), policy.chunks)
        after = dict(policy.iter_weights(torch.float32))
        assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
