"""Hugging Face configs read whole: what changes the arithmetic is honoured or refused."""

from __future__ import annotations

import json

import pytest
import torch

from skyrl_mega.errors import ModelLoadError
from skyrl_mega.models.families import (
    Experts,
    Rope,
    hf_tensor_shapes,
    inverse_frequencies,
    padded_vocab_size,
    read_architecture,
)

BASE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def _write(path, **settings):
    (path / "config.json").write_text(json.dumps(BASE | settings))
    return path


def test_old_and_new_rope_keys_are_read_alike(tmp_path):
    old = read_architecture(_write(tmp_path, model_type="llama", rope_theta=1e5, rope_scaling={"type": "linear", "factor": 2.0}))
    new = read_architecture(
        _write(tmp_path, model_type="llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0})
    )
    assert old.rope == new.rope == Rope(1e5, "linear", 2.0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_each_family_is_read(family, tmp_path):
    a = read_architecture(_write(tmp_path, model_type=family, rms_norm_eps=2e-5, tie_word_embeddings=True))
    assert (a.family, a.num_layers, a.num_heads, a.num_kv_heads, a.ffn_size, a.vocab_size) == (family, 2, 4, 2, 96, 100)
    assert a.head_dim == (128 if family == "qwen3" else 16)
    assert (a.norm_eps, a.tied, a.qkv_bias, a.qk_norm) == (2e-5, True, family == "qwen2", family == "qwen3")
    assert "lm_head.weight" not in hf_tensor_shapes(a)


def test_a_head_size_in_the_file_is_honoured_for_qwen2_too(tmp_path):
    a = read_architecture(_write(tmp_path, model_type="qwen2", head_dim=32))
    assert a.head_dim == 32
    assert hf_tensor_shapes(a)["model.layers.0.self_attn.k_proj.weight"] == (64, 64)


MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
EXPERTS = {
    "qwen3_moe": (MOE | {"norm_topk_prob": True}, Experts(6, 2, 48, True, None, (True, True))),
    "qwen3_moe of transformers 5": (
        {"num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        Experts(6, 2, 48, False, None, (True, True)),
    ),
    "qwen2_moe": (MOE | {"shared_expert_intermediate_size": 80}, Experts(6, 2, 48, False, 80, (True, True))),
    "qwen2_moe sparse": (
        MOE | {"shared_expert_intermediate_size": 80, "decoder_sparse_step": 2},
        Experts(6, 2, 48, False, 80, (False, True)),
    ),
    "qwen3_moe dense first": (MOE | {"mlp_only_layers": [0]}, Experts(6, 2, 48, False, None, (False, True))),
    "mixtral": ({"num_local_experts": 6, "num_experts_per_tok": 2}, Experts(6, 2, 96, True, None, (True, True))),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_the_experts_of_a_mixture_are_read(case, tmp_path):
    settings, expected = EXPERTS[case]
    a = read_architecture(_write(tmp_path, model_type=case.split()[0], **settings))
    assert a.experts == expected
    assert a.has_dense_layers == (not all(expected.layers))
    assert (a.qk_norm, a.qkv_bias) == (case.startswith("qwen3"), case.startswith("qwen2"))
    shapes = hf_tensor_shapes(a)
    assert ("model.layers.0.mlp.gate_proj.weight" in shapes) == a.has_dense_layers
    assert sum("layers.1." in name and ".experts.5." in name for name in shapes) == 3
    assert ("model.layers.1.mlp.shared_expert_gate.weight" in shapes) == (expected.shared_ffn_size is not None)


def test_a_bias_that_is_switched_off_is_honoured(tmp_path):
    assert not read_architecture(_write(tmp_path, model_type="qwen2_moe", qkv_bias=False, **MOE)).qkv_bias


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 256},
])  # fmt: skip
def test_rotary_frequencies_equal_transformers_bit_for_bit(rope, tmp_path):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    path = _write(tmp_path, model_type="llama", rope_parameters=rope, head_dim=64)
    expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(path)).inv_freq
    torch.testing.assert_close(inverse_frequencies(read_architecture(path)), expected, rtol=1e-7, atol=0)


REFUSED = {
    "family": ({"model_type": "gpt2"}, r"'gpt2' is not supported; supported families: llama, qwen2, qwen3"),
    "no family": ({}, "model_type None is not supported"),
    "activation": ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "attention bias": ({"model_type": "llama", "attention_bias": True}, "attention_bias = True"),
    "qwen3 attention bias": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True"),
    "mlp bias": ({"model_type": "llama", "mlp_bias": True}, "mlp_bias = True"),
    "dropout": ({"model_type": "llama", "attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "sliding window": ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = True"),
    "sliding layers": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types = .*sliding_attention",
    ),
    "yarn": (
        {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
        "rope_type 'yarn'",
    ),
    "partial rotary": ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "mixtral's window": ({"model_type": "mixtral", "sliding_window": 8}, "sliding_window = 8"),
    "qwen3_moe's window": ({"model_type": "qwen3_moe", "use_sliding_window": True, **MOE}, "use_sliding_window = True"),
    "router noise": ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 .* without noise"),
    "no experts": ({"model_type": "qwen3_moe", **MOE, "num_experts": 0}, r"between 1 and the number of experts \(0\)"),
    "too many per token": (
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
        r"num_experts_per_tok \(3\) must be between 1 and the number of experts \(2\)",
    ),
    "one renormalised expert": (
        {"model_type": "qwen3_moe", **MOE, "num_experts_per_tok": 1, "norm_topk_prob": True},
        "num_experts_per_tok = 1 with renormalised weights",
    ),
    "dense throughout": (
        {"model_type": "qwen3_moe", **MOE, "mlp_only_layers": [0, 1]},
        "leave no layer with experts",
    ),
    "quantized": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_by_name(name, tmp_path):
    settings, message = REFUSED[name]
    with pytest.raises(ModelLoadError, match=message):
        read_architecture(_write(tmp_path, **settings))


def test_a_window_that_is_switched_off_is_accepted(tmp_path):
    read_architecture(_write(tmp_path, model_type="qwen2", use_sliding_window=False, sliding_window=8))


def test_a_path_that_is_no_model_directory_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        read_architecture(tmp_path)


def test_the_vocabulary_is_padded_to_the_tensor_ranks_only():
    assert [padded_vocab_size(151_937, tp) for tp in (1, 2, 8)] == [151_937, 151_938, 151_944]
