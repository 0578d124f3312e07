"""Routers of a mixture of experts: their losses, their freezing and their counts against Hugging Face's router logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from helpers.hf_oracle import by_file_name, load_oracle, to_megatron
from helpers.policy import make_policy, tiny_config
from helpers.updates import clones, update
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.models.build import forward_hidden
from skyrl_mega.models.router import announce_batch, routers
from skyrl_mega.orchestration.replay import bad_tensors

COEF, Z_COEF = 0.7, 0.02
#: The policy loss and its gradient are zero with these samples: what is left are the routers' losses.
SETTINGS = [
    f"model.moe_aux_loss_coef={COEF}",
    f"model.moe_z_loss_coef={Z_COEF}",
    "optimizer.clip_grad_norm=0",
    "optimizer.lr=1e-3",
]
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral")


def batch_without_signal():
    samples = [dataclasses.replace(s, advantages=torch.zeros_like(s.advantages)) for s in random_samples(4, 3, seed=5)]
    batch = balance_and_pack(samples, tokens_per_micro_batch=90, dp_rank=0, dp_size=1, skip_zero_advantage=False)
    sizes = [micro_batch.num_tokens for micro_batch in batch.micro_batches]
    assert len(set(sizes)) > 1  # or weighing by tokens would not show
    return batch


def router_logits(oracle, batch) -> list[list[torch.Tensor]]:
    """[T, E] of each micro-batch and layer, one sequence at a time."""
    rows = []
    for micro_batch in batch.micro_batches:
        sequences = micro_batch.input_ids.tensor_split(micro_batch.cu_seqlens[1:-1].long())
        outputs = [oracle(ids[None], output_router_logits=True).router_logits for ids in sequences]
        rows.append([torch.cat(layer) for layer in zip(*outputs, strict=True)])
    return rows


def expected_aux_loss(logits_by_micro_batch, per_token: int) -> torch.Tensor:
    """arXiv:2101.03961, equation 4, summed over layers; the mean over micro-batches weighted by their tokens."""
    num_tokens = sum(layers[0].size(0) for layers in logits_by_micro_batch)
    total = torch.zeros(())
    for layers in logits_by_micro_batch:
        for logits_TE in layers:
            probs_TE = logits_TE.softmax(-1)
            chosen_E = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(per_token).indices, 1.0).sum(0)
            share_E = chosen_E / chosen_E.sum()
            total = total + logits_TE.size(1) * (share_E * probs_TE.mean(0)).sum() * logits_TE.size(0) / num_tokens
    return total


def expected_z_loss(logits_by_micro_batch) -> torch.Tensor:
    """arXiv:2202.08906, equation 5, summed over layers; the mean over all tokens."""
    layers = [torch.cat(layer) for layer in zip(*logits_by_micro_batch, strict=True)]
    return torch.stack([logits_TE.exp().sum(-1).log().square().mean() for logits_TE in layers]).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_routers_losses_have_the_gradients_of_their_formulas(family, tmp_path):
    config = tiny_config(tmp_path, *SETTINGS, family=family, tied=False)
    oracle, batch = load_oracle(config.model.path), batch_without_signal()
    logits = router_logits(oracle, batch)
    (COEF * expected_aux_loss(logits, 2) + Z_COEF * expected_z_loss(logits)).backward()
    named = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in oracle.named_parameters()}
    gradients = by_file_name(named, family)
    with make_policy(config) as policy:
        announce_batch(policy.chunks, sum(micro_batch.num_tokens for micro_batch in batch.micro_batches))
        policy.ddps[0].zero_grad_buffer()
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as Megatron's schedule does before each pass
        for micro_batch in batch.micro_batches:
            (forward_hidden(policy.ddps[0], micro_batch) * 0).sum().backward()
        for name, parameter in policy.chunks[0].named_parameters():
            want = to_megatron(gradients, name, policy.chunks[0].architecture)
            assert (parameter.main_grad - want).abs().max() < 1e-5 * max(1e-3, want.abs().max()), name
        assert policy.chunks[0].decoder.layers[0].mlp.router.weight.main_grad.norm() > 1e-2


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_update_adds_the_routers_losses_once_and_reports_load_and_entropy(recompute, tmp_path):
    config = tiny_config(tmp_path, *SETTINGS, f"model.recompute={recompute}", family="qwen2_moe", tied=False)
    oracle, batch = load_oracle(config.model.path), batch_without_signal()
    logits = router_logits(oracle, batch)
    aux_loss, z_loss = expected_aux_loss(logits, 2), expected_z_loss(logits)
    (COEF * aux_loss + Z_COEF * z_loss).backward()
    norm = torch.stack([p.grad.norm() for p in oracle.parameters() if p.grad is not None]).norm()
    layers = [torch.cat(layer).detach() for layer in zip(*logits, strict=True)]
    loads = [torch.bincount(layer.topk(2).indices.flatten(), minlength=4).double() for layer in layers]
    entropy = torch.stack([torch.distributions.Categorical(logits=layer).entropy().mean() for layer in layers]).mean()
    with make_policy(config) as policy:
        policy.compute_logprobs(batch)  # not counted: no gradient is kept
        metrics = policy.train_step(batch)
        assert policy.train_step(batch)["moe/load_max_over_mean"] < 2  # counts start again; the load is at most 4 / 2
    assert metrics["loss/total"] == pytest.approx(0, abs=1e-9)
    assert metrics["update/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert metrics["moe/aux_loss"] == pytest.approx(float(aux_loss), rel=1e-5)
    assert metrics["moe/z_loss"] == pytest.approx(float(z_loss), rel=1e-5)
    assert metrics["moe/router_entropy"] == pytest.approx(float(entropy), rel=1e-5)
    unevenness = [float(load.max() / load.mean()) for load in loads]
    assert metrics["moe/load_max_over_mean"] == pytest.approx(sum(unevenness) / 2, rel=1e-6)
    assert metrics["moe/load_max_over_mean_worst_layer"] == pytest.approx(max(unevenness), rel=1e-6)
    assert metrics["moe/idle_experts"] == metrics["moe/frozen_routers"] == 0


def test_frozen_routers_stay_bit_for_bit_while_all_else_is_trained(tmp_path):
    config = tiny_config(tmp_path, "model.freeze_router=true", "optimizer.weight_decay=0.1", family="qwen2_moe", tied=False)
    with make_policy(config) as policy:
        before = clones(policy)
        metrics = update(policy, seed=1)
        after = clones(policy)
        assert bad_tensors(policy, policy.topology) == []  # which looks at the gradients of all that have one
    assert metrics["moe/frozen_routers"] == 1
    unchanged = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert unchanged == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}


def test_idle_experts_and_the_busiest_are_seen(tmp_path):
    config = tiny_config(tmp_path, family="qwen3_moe", tied=False)
    with make_policy(config) as policy:
        for router in routers(policy.chunks):
            router.gating = lambda x: torch.tensor([9.0, 8.0, 0.0, 0.0]) + 0 * x[..., :4]
        metrics = policy.train_step(batch_without_signal())
    assert metrics["moe/idle_experts"] == 0.5
    assert metrics["moe/load_max_over_mean"] == 2.0
    assert metrics["moe/router_entropy"] < 0.6


def test_a_dense_model_reports_no_load(tmp_path):
    config = tiny_config(tmp_path)
    with make_policy(config) as policy:
        assert not [name for name in policy.train_step(batch_without_signal()) if name.startswith("moe/")]


def test_routers_work_in_float32_whatever_the_models_dtype(tmp_path):
    config = tiny_config(tmp_path, "precision=bfloat16", family="qwen3_moe", tied=False)
    with make_policy(config) as policy:
        router = next(routers(policy.chunks))
        hidden = torch.randn(5, 1, 64, dtype=torch.bfloat16)
        assert router.weight.dtype == torch.bfloat16
        expected = hidden.float() @ router.weight.detach().float().t()
        torch.testing.assert_close(router.gating(hidden), expected, rtol=1e-6, atol=1e-6)


def test_a_routers_loss_without_the_batchs_size_is_an_error(tmp_path):
    config = tiny_config(tmp_path, *SETTINGS, family="mixtral", tied=False)
    with make_policy(config) as policy, pytest.raises(RuntimeError, match="call announce_batch"):
        forward_hidden(policy.chunks[0], batch_without_signal().micro_batches[0])
