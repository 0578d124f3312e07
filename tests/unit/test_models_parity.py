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
    policy_logits,
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
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
#: Of 4 groups of 4 experts two are open to each token, and four of their experts are chosen.
GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "routed_scaling_factor": 2.5}
#: As Kimi K2's config.json has it, but for the sizes.
KIMI_K2 = {
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16,
    },
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.827,
    "moe_layer_freq": 1,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "ep_size": 1,
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
    "llama_biases_of_all_projections": ("llama", {"attention_bias": True}),
    "llama_yarn": ("llama", {"rope_parameters": YARN}),
    "mistral_window": ("mistral", {"tied": False}),
    "qwen2_window_in_the_second_layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3_window_in_the_first_layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma2_soft_caps": ("gemma2", {}),
    "gemma2_without_caps": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None, "tied": False}),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text_stretched_untied": ("gemma3_text", {"tied": False, "rope_parameters": GEMMA_ROPES, "head_dim": 16}),
    "gemma3_text_biases": ("gemma3_text", {"attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {"tied": False}),
    "qwen3_moe_many_experts_raw_weights": ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    "qwen3_moe_after_a_dense_layer": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen2_moe_shared_expert": ("qwen2_moe", {"tied": False}),
    "qwen2_moe_every_second_layer": ("qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}),
    "qwen2_moe_one_expert_per_token": ("qwen2_moe", {"num_experts_per_tok": 1}),
    "qwen3_moe_window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}),
    "qwen2_moe_window_in_the_first_layer": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16}),
    "mixtral": ("mixtral", {"tied": False}),
    "mixtral_window": ("mixtral", {"sliding_window": 16}),
    "deepseek_v3": ("deepseek_v3", {"tied": False, "rms_norm_eps": 1e-6}),
    "deepseek_v3_yarn_and_groups": ("deepseek_v3", {"tied": False, "rope_parameters": YARN_ROPE, **GROUPS}),
    "deepseek_v3_without_query_latent": ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
    "deepseek_v3_all_dense": ("deepseek_v3", {"first_k_dense_replace": 2, "rms_norm_eps": 1e-2}),
    "deepseek_v3_as_kimi_k2": ("deepseek_v3", {"tied": False, **KIMI_K2}),
    "glm4_moe": ("glm4_moe", {"tied": False}),
    "glm4_moe_plain_heads": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "first_k_dense_replace": 0}),
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
    return policy_logits(forward_hidden(model, micro_batch), output_weight(model), model.architecture)


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


@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe", "deepseek_v3"])
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


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen2_moe", "deepseek_v3", "glm4_moe"])
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
