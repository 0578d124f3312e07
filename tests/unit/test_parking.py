"""Optimizer state and frozen weights in host memory while they are not used: gone from the device, and nothing else changes."""

from dataclasses import replace

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.tiny import write_tiny_model
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.orchestration.loop import pack
from skyrl_mega.training.parking import own_tensors
from skyrl_mega.training.reference import ReferenceModel


def update(policy, seed: int) -> None:
    batch = pack(policy.config, policy.topology, random_samples(5, 3, seed=seed), share_prompts=True)
    assert policy.train_step(batch)["update/skipped"] == 0.0


def three_updates(config) -> dict[str, torch.Tensor]:
    with make_policy(config) as policy:
        for seed in (1, 2, 3):
            update(policy, seed)
        return {name: value.clone() for name, value in policy.iter_weights(torch.float32)}


#: Bytes of state per weight: two moments in float32, and in bfloat16 a float32 master.
@pytest.mark.parametrize(
    ("dtype", "distributed", "bytes_per_weight"), [("bfloat16", "true", 12), ("float32", "true", 8), ("bfloat16", "false", 12)]
)
def test_parked_state_is_off_the_device_and_changes_no_update(dtype, distributed, bytes_per_weight, tmp_path):
    settings = [f"model.dtype={dtype}", f"parallel.distributed_optimizer={distributed}", "optimizer.lr=1e-3"]
    config = tiny_config(tmp_path, *settings)
    expected = three_updates(config)
    parked = tiny_config(tmp_path, *settings, "optimizer.offload=true")
    got = three_updates(parked)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    with make_policy(parked) as policy:
        num_weights = sum(weight.numel() for weight in policy.chunks[0].parameters())
        state = policy._parked
        assert num_weights * bytes_per_weight <= state.size_bytes <= 1.02 * num_weights * bytes_per_weight
        for seed in (1, 2):
            update(policy, seed)
            assert sum(tensor.untyped_storage().nbytes() for tensor in state._tensors) == 0
        assert own_tensors(policy.optimizer, policy.chunks[0].parameters()) == []


def test_a_checkpoint_sees_the_state_that_is_parked(tmp_path):
    config = tiny_config(tmp_path, "optimizer.offload=true", "optimizer.lr=1e-3")
    with make_policy(config) as policy:
        update(policy, 1)
        assert policy._parked.is_parked
        policy.sharded_state()
        moments = [state["exp_avg"] for part in policy.optimizer.chained_optimizers for state in part.optimizer.state.values()]
        assert any(float(moment.abs().sum()) > 0 for moment in moments)
        policy.park_optimizer()
        assert policy._parked.is_parked


def test_a_parked_reference_says_what_one_on_the_device_says_also_of_other_weights(tmp_path):
    config = tiny_config(tmp_path, "model.offload_frozen=true")
    other = write_tiny_model(tmp_path / "other", "llama", tied=True, seed=1)
    with make_policy(config) as policy:
        batch = pack(policy.config, policy.topology, random_samples(5, 3, seed=1), share_prompts=True)
        models = [
            ReferenceModel(replace(config, model=replace(config.model, offload_frozen=on)), policy.topology) for on in (0, 1)
        ]
        whole, parked = models
        num_bytes = sum(weight.numel() * weight.element_size() for weight in whole.chunks[0].parameters())
        assert parked._parked.size_bytes == num_bytes
        said = []
        for path in (config.model.path, str(other)):
            for model in models:
                model.load(path)
                topk = model.compute_topk(batch, 4, vocab_size=272)
                said.append([*model.compute_logprobs(batch), *(values for pair in topk for values in pair)])
            assert sum(weight.untyped_storage().nbytes() for weight in parked.chunks[0].parameters()) == 0
            assert all(map(torch.equal, *said[-2:]))
        assert not torch.equal(said[0][0], said[2][0]), "other weights, other words"
