"""Policies against Hugging Face in float32: logits, gradients, packing, recomputation, and Megatron's schedule around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.hf_oracle import (
    load_oracle,
    make_micro_batch,
    make_sequences,
    oracle_gradients,
    oracle_logits,
    probe_loss,
    to_megatron,
)
from helpers.tiny import write_tiny_model
from skyrl_mega.config.schema import Config, ModelConfig, ParallelConfig
from skyrl_mega.errors import BackendUnavailableError
from skyrl_mega.models.build import build_model, forward_hidden, output_weight, vocab_range
from skyrl_mega.models.hf_io import load_hf_weights
from skyrl_mega.parallel.device import resolve_device
from skyrl_mega.parallel.topology import init_topology

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama_tied": ("llama", {"tied": True}),
    "llama_untied": ("llama", {"tied": False}),
    "llama_llama3_rope": ("llama", {"tied": True, "rope_parameters": LLAMA3_ROPE}),
    "llama_linear_rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama_wide_heads": ("llama", {"tied": False, "head_dim": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "qwen2_tied_biases": ("qwen2", {"tied": True}),
    "qwen2_untied_biases": ("qwen2", {"tied": False}),
    "qwen3_tied_qk_norm": ("qwen3", {"tied": True}),
    "qwen3_untied_qk_norm": ("qwen3", {"tied": False, "head_dim": 24}),
    "qwen3_moe": ("qwen3_moe", {"tied": False}),
    "qwen3_moe_many_experts_raw_weights": ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    "qwen3_moe_after_a_dense_layer": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen2_moe_shared_expert": ("qwen2_moe", {"tied": False}),
    "qwen2_moe_every_second_layer": ("qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}),
    "qwen2_moe_one_expert_per_token": ("qwen2_moe", {"num_experts_per_tok": 1}),
    "mixtral": ("mixtral", {"tied": False}),
}
LENGTHS = [7, 33, 5, 20, 1, 220, 90]
SMOLLM2 = Path(__file__).parents[2] / ".cache" / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def topology():
    topology = init_topology(ParallelConfig(), resolve_device("cpu"), seed=0)
    yield topology
    topology.destroy()


def _policy(path, topology, **settings):
    settings = {"dtype": "float32"} | settings
    [model] = build_model(Config(model=ModelConfig(path=str(path), **settings)), topology)
    load_hf_weights([model], path, topology)
    return model


def _logits(model, micro_batch):
    return forward_hidden(model, micro_batch) @ output_weight(model).t()


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_and_gradients_equal_hugging_face_one_sequence_at_a_time(name, topology, tmp_path):
    family, settings = MODELS[name]
    path = write_tiny_model(tmp_path, family, **settings)
    model, oracle = _policy(path, topology), load_oracle(path)
    sequences = make_sequences(LENGTHS, 272)
    micro_batch = make_micro_batch(sequences)
    logits = _logits(model, micro_batch)
    expected = oracle_logits(oracle, sequences)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    probe_loss(logits, micro_batch).backward()
    gradients = oracle_gradients(oracle, sequences, micro_batch)
    for parameter_name, parameter in model.named_parameters():
        want = to_megatron(gradients, parameter_name, model.architecture)
        error = (parameter.grad - want).abs().max() / want.abs().max()
        assert error < 1e-5, f"{parameter_name}: {error}"


def test_positions_decide_the_rotation_whatever_max_seqlen_says(topology, tmp_path):
    """Megatron's own packed rotation reads max_seqlen in two ways; one that equals the token count must change nothing."""
    model = _policy(write_tiny_model(tmp_path), topology)
    micro_batch = make_micro_batch(make_sequences([9, 14, 3], 272))
    first = forward_hidden(model, micro_batch)
    micro_batch.max_seqlen = micro_batch.num_tokens
    assert torch.equal(forward_hidden(model, micro_batch), first)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe"])
def test_full_recomputation_changes_nothing(family, topology, tmp_path):
    path = write_tiny_model(tmp_path, family)
    micro_batch = make_micro_batch(make_sequences([11, 30, 4], 272))
    results = []
    for recompute in ("none", "full"):
        model = _policy(path, topology, recompute=recompute)
        logits = _logits(model, micro_batch)
        probe_loss(logits, micro_batch).backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert model.config.recompute_granularity == "full"
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], gradient) for name, gradient in results[1][1].items())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen2_moe"])
def test_bfloat16_parameters_err_no_more_than_twice_hugging_face_in_bfloat16(family, topology, tmp_path):
    path = write_tiny_model(tmp_path, family, dtype="bfloat16")
    model = _policy(path, topology, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    sequences = make_sequences([40, 25, 60], 272)
    with torch.no_grad():
        ours = _logits(model, make_micro_batch(sequences)).float().log_softmax(-1)
        oracle = load_oracle(path)
        truth = oracle_logits(oracle, sequences).log_softmax(-1)
        theirs = oracle_logits(oracle.to(torch.bfloat16), sequences).float().log_softmax(-1)
    assert (ours - truth).abs().mean() <= 2 * (theirs - truth).abs().mean()


def test_megatrons_ddp_and_schedule_run_the_policy_and_a_tied_embedding_gets_both_gradients(topology, tmp_path):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    path = write_tiny_model(tmp_path, "llama", tied=True)
    policy, oracle = _policy(path, topology), load_oracle(path)
    packs = [make_sequences([12, 7], 272, seed=1), make_sequences([30], 272, seed=2)]
    micro_batches = [make_micro_batch(pack) for pack in packs]
    num_tokens = sum(int(m.loss_mask.sum()) for m in micro_batches)
    model = DistributedDataParallel(policy.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), policy)
    policy.config.finalize_model_grads_func = finalize_model_grads

    def forward_step(iterator, model):
        micro_batch = next(iterator)

        def loss_function(hidden):
            loss = probe_loss(hidden @ output_weight(model).t(), micro_batch)
            return loss, micro_batch.loss_mask.sum().int(), {"loss": loss.detach()}

        return forward_hidden(model, micro_batch), loss_function

    model.zero_grad_buffer()
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=model,
        num_microbatches=2,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    want = {}
    for pack, micro_batch in zip(packs, micro_batches, strict=True):
        for name, gradient in oracle_gradients(oracle, pack, micro_batch).items():
            want[name] = want.get(name, 0) + gradient.clone() / num_tokens
    expected_losses = [probe_loss(oracle_logits(oracle, p), m).item() for p, m in zip(packs, micro_batches, strict=True)]
    assert [loss["loss"].item() for loss in losses] == pytest.approx(expected_losses, rel=1e-5)
    for name, parameter in policy.named_parameters():
        expected = to_megatron(want, name, policy.architecture)
        assert (parameter.main_grad - expected).abs().max() < 1e-5 * expected.abs().max(), name


def test_what_runs_is_named_and_an_attention_that_cannot_run_is_refused(topology, tmp_path):
    path = write_tiny_model(tmp_path)
    model = _policy(path, topology)
    assert model.implementation == {"layers": "torch", "attention": "sdpa"}
    assert (model.vocab_size, model.padded_vocab_size, vocab_range(model)) == (272, 272, (0, 272))
    with pytest.raises(BackendUnavailableError, match="flash"):
        _policy(path, topology, attention="flash")


@pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").exists(), reason="SmolLM2 is not prepared on this machine")
def test_smollm2_logits_equal_hugging_face_to_1e_3(topology):
    model, oracle = _policy(SMOLLM2, topology), load_oracle(SMOLLM2)
    sequences = make_sequences([40, 17, 64], 49152)
    with torch.no_grad():
        difference = (_logits(model, make_micro_batch(sequences)) - oracle_logits(oracle, sequences)).abs().max()
    assert difference < 1e-3
