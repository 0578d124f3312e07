"""Routers with a bias of each expert: their choice against Hugging Face's router, and how the bias moves."""

from __future__ import annotations

import pytest
import torch

from helpers.hf_oracle import load_oracle
from helpers.policy import make_policy, tiny_config
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.models.router import routers

RATE = 0.03
NAME = "model.layers.1.mlp.gate.e_score_correction_bias"
SHAPES = {
    "glm4_moe": {"n_routed_experts": 10, "num_experts_per_tok": 3},
    "deepseek_v3": {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
}


def batch_of(seed: int):
    """Unshared and unpadded, so that every token is routed once."""
    return packed(random_samples(4, 3, seed=seed))


def packed(samples):
    return balance_and_pack(samples, tokens_per_micro_batch=90, dp_rank=0, dp_size=1, skip_zero_advantage=False)


def hugging_face_router(oracle, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, tokens sent to each expert) of the expert layer, over all sequences of the batch."""
    gate, seen = oracle.model.layers[1].mlp.gate, []
    handle = gate.register_forward_hook(lambda module, inputs, outputs: seen.append((outputs[0], outputs[2])))
    for micro_batch in batch.micro_batches:
        for ids in micro_batch.input_ids.tensor_split(micro_batch.cu_seqlens[1:-1].long()):
            oracle(ids[None])
    handle.remove()
    chosen = torch.cat([indices for _, indices in seen])
    return torch.cat([logits for logits, _ in seen]), torch.bincount(chosen.flatten(), minlength=gate.num_experts)


@pytest.mark.parametrize("family", SHAPES)
def test_experts_and_their_weights_are_those_of_hugging_faces_router(family, tmp_path):
    config = tiny_config(tmp_path, family=family, tied=False, **SHAPES[family])
    gate = load_oracle(config.model.path).model.layers[1].mlp.gate
    with make_policy(config) as policy, torch.no_grad():
        [router] = routers(policy.chunks)
        # A bias as large as the scores: without it most tokens would go elsewhere.
        for bias in (gate.e_score_correction_bias, router.expert_bias):
            bias.copy_(torch.linspace(-0.5, 0.5, gate.num_experts).roll(3))
        hidden = torch.randn(200, 1, gate.hidden_dim)
        probs, routing_map = router(hidden)
        _, weights, indices = gate(hidden)
        assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, indices, True))
        torch.testing.assert_close(probs, torch.zeros_like(probs).scatter(1, indices, weights), rtol=1e-5, atol=1e-6)
        unbiased = gate.weight @ hidden.squeeze(1).T
        assert not torch.equal(unbiased.T.topk(indices.size(1)).indices.sort().values, indices.sort().values)


@pytest.mark.parametrize("family", SHAPES)
def test_each_update_moves_biases_towards_an_even_load(family, tmp_path):
    config = tiny_config(tmp_path, f"model.moe_bias_update_rate={RATE}", family=family, tied=False, **SHAPES[family])
    oracle, batch = load_oracle(config.model.path), batch_of(5)
    with torch.no_grad():
        logits, load = hugging_face_router(oracle, batch)
    assert len(set(load.tolist())) > 3
    before = oracle.model.layers[1].mlp.gate.e_score_correction_bias
    with make_policy(config) as policy:
        metrics = policy.train_step(batch)
        policy.compute_logprobs(batch_of(6))  # passes without gradient count nothing
        first = dict(policy.iter_weights(torch.bfloat16))[NAME].clone()
        policy.train_step(batch_of(7))
        second = dict(policy.iter_weights(torch.bfloat16))[NAME].clone()
    expected = before + RATE * torch.sign(load.float().mean() - load)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-7)
    moves = ((second - first) / RATE).round(decimals=4)
    assert set(moves.tolist()) <= {-1.0, 0.0, 1.0}
    assert moves.any()
    shares = logits.double().sigmoid() / logits.double().sigmoid().sum(-1, keepdim=True)
    assert metrics["moe/router_entropy"] == pytest.approx(float(-(shares * shares.log()).sum(-1).mean()), rel=1e-4)
    assert metrics["moe/load_max_over_mean"] == pytest.approx(float(load.max() / load.double().mean()), rel=1e-6)


def test_biases_stay_as_loaded_unless_a_rate_is_given_and_where_no_update_is_made(tmp_path):
    still = tiny_config(tmp_path / "still", family="glm4_moe", tied=False)
    moving = tiny_config(tmp_path / "moving", f"model.moe_bias_update_rate={RATE}", family="glm4_moe", tied=False)
    for config, batch in ((still, batch_of(1)), (moving, packed([]))):
        with make_policy(config) as policy:
            before = dict(policy.iter_weights(torch.float32))[NAME].clone()
            policy.train_step(batch)
            assert torch.equal(dict(policy.iter_weights(torch.float32))[NAME], before)
