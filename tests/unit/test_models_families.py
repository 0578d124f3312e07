"""Hugging Face configs read whole: what changes the arithmetic is honoured or refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from skyrl_mega.errors import ModelLoadError
from skyrl_mega.models.families import (
    FAMILIES,
    Experts,
    Latent,
    Rope,
    hf_tensor_shapes,
    inverse_frequencies,
    padded_vocab_size,
    read_architecture,
)
from skyrl_mega.models.families.rope import read_rope

BASE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
#: Heads of 16 numbers: 8 pairs.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + pair / 10 for pair in range(8)],
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 256,
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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
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
SIGMOID = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20}
LATENT |= {"num_key_value_heads": 4}
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
    "glm4_moe": (SIGMOID, Experts(8, 2, 48, True, 96, (False, True), False, True, 1, 1, 1.0)),
    "deepseek_v3": (
        SIGMOID | LATENT | {"first_k_dense_replace": 0, "n_group": 4, "topk_group": 1, "routed_scaling_factor": 3.0},
        Experts(8, 2, 48, True, 96, (True, True), False, True, 4, 1, 3.0),
    ),
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
    assert ("model.layers.1.mlp.shared_expert_gate.weight" in shapes) == (case.startswith("qwen2"))
    assert ("model.layers.1.mlp.gate.e_score_correction_bias" in shapes) == expected.is_sigmoid


def test_a_bias_that_is_switched_off_is_honoured(tmp_path):
    assert not read_architecture(_write(tmp_path, model_type="qwen2_moe", qkv_bias=False, **MOE)).qkv_bias


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 256},
    YARN,
    YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    YARN | {"mscale": 1.5, "mscale_all_dim": 0.7},
    LONGROPE,
    LONGROPE | {"attention_factor": 1.1},
], ids=lambda rope: rope["rope_type"])  # fmt: skip
def test_rotary_frequencies_and_attention_factors_equal_transformers(rope, tmp_path):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    path = _write(tmp_path, model_type="llama", rope_parameters=rope)
    a, expected = read_architecture(path), LlamaRotaryEmbedding(AutoConfig.from_pretrained(path))
    torch.testing.assert_close(inverse_frequencies(a.rope, a.head_dim), expected.inv_freq, rtol=2e-7, atol=0)
    assert a.rope.attention_factor == pytest.approx(expected.attention_scaling, rel=1e-12)
    assert a.softmax_scale == pytest.approx(a.head_dim**-0.5 * expected.attention_scaling**2, rel=1e-12)


def test_part_of_a_head_is_rotated_where_the_family_knows_of_it():
    rope = read_rope({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, 64, 512, may_be_partial=True)
    whole = Rope(1e4)
    assert rope.rotary_dim(64) == 32
    assert torch.equal(inverse_frequencies(rope, 64), inverse_frequencies(whole, 32))
    for parameters, message in (
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.3}, "even number of the 10 numbers"),
        (YARN | {"partial_rotary_factor": 0.5}, "attention factor of 1.139"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            read_rope(parameters, 10 if "even" in message else 64, 512, may_be_partial=True)


def test_latent_attention_is_read_with_yarns_scale_of_all_scores(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "original_max_position_embeddings": 128}
    settings = {"model_type": "deepseek_v3", **SIGMOID, **LATENT}
    a = read_architecture(_write(tmp_path, **settings, rope_parameters=yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}))
    assert a.latent == Latent(24, 40, 16, 8, 20, True)
    assert (a.head_dim, a.rotary_head_dim, a.num_kv_heads) == (24, 8, 4)
    assert a.rope.attention_factor == 1.0
    assert a.attention_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(24))
    a = read_architecture(_write(tmp_path, **settings, rope_parameters=yarn | {"mscale": 1.0}))
    assert a.rope.attention_factor == pytest.approx(0.1 * math.log(40) + 1)
    assert a.attention_scale == pytest.approx(1 / math.sqrt(24))


REFUSED = {
    "family": ({"model_type": "gpt2"}, r"'gpt2' is not supported; supported families: llama, mistral, qwen2, qwen3"),
    "a vision model": ({"model_type": "gemma3"}, r"'gemma3' is not supported \(it is a vision model; save its text model"),
    "a family by another name": ({"model_type": "kimi_k2"}, r"'kimi_k2' .*set model_type to deepseek_v3 in config\.json"),
    "no family": ({}, "model_type None is not supported"),
    "activation": ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "qwen3 attention bias": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True .*: vLLM serves"),
    "mlp bias": ({"model_type": "llama", "mlp_bias": True}, "mlp_bias = True"),
    "dropout": ({"model_type": "llama", "attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "sliding layers without a window": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_window = None must be a positive number",
    ),
    "a window of nothing": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0 must be a positive number"),
    "other layers": (
        {"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]},
        "layer_types with chunked_attention are not supported: only full_attention and sliding_attention",
    ),
    "gemma's activation": ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    "gemma3's logit cap": ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "gemma3's score cap": ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    "both directions": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True, "sliding_window": 8},
        "use_bidirectional_attention = True",
    ),
    "two attention factors": (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
        r"attention factors differ between full_attention \(1.139\) and sliding_attention \(1\)",
    ),
    "dynamic ntk": (
        {"model_type": "qwen2", "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        "rope_type 'dynamic' is not supported: its frequencies follow the length of each batch",
    ),
    "partial rotary": ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "unknown rope": ({"model_type": "llama", "rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type 'ntk' is not supported"),
    "longrope that fits another head": (
        {"model_type": "llama", "rope_parameters": LONGROPE | {"short_factor": [1.0] * 3}},
        "short_factor of longrope has 3 numbers and must have 8",
    ),
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
    "raw sigmoid weights": ({"model_type": "glm4_moe", **SIGMOID, "norm_topk_prob": False}, "norm_topk_prob = False"),
    "no shared expert": ({"model_type": "glm4_moe", **SIGMOID, "n_shared_experts": 0}, "n_shared_experts = 0"),
    "ragged groups": ({"model_type": "glm4_moe", **SIGMOID, "n_group": 3}, r"n_group \(3\) must divide n_routed_experts \(8\)"),
    "small groups": (
        {"model_type": "glm4_moe", **SIGMOID, "n_group": 4, "num_experts_per_tok": 3},
        r"topk_group \(1\) groups of 2 experts must hold num_experts_per_tok \(3\)",
    ),
    "groups ranked by one": (
        {"model_type": "glm4_moe", **SIGMOID, "n_group": 4, "topk_group": 2},
        "topk_group = 2 of 4 groups is not supported: Megatron ranks groups by their 1 best",
    ),
    "latent biases": ({"model_type": "deepseek_v3", **SIGMOID, **LATENT, "attention_bias": True}, "attention_bias = True"),
    "quantized": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_by_name(name, tmp_path):
    settings, message = REFUSED[name]
    with pytest.raises(ModelLoadError, match=message):
        read_architecture(_write(tmp_path, **settings))


WINDOWS = {
    "switched off": ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8}, ()),
    "null": ({"model_type": "mistral", "sliding_window": None}, ()),
    "mistral": ({"model_type": "mistral", "sliding_window": 8}, (8, 8)),
    "mixtral": ({"model_type": "mixtral", "sliding_window": 8}, (8, 8)),
    "from a layer on": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        (None, 8),
    ),
    "by type": (
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (8, None),
    ),
    "qwen3_moe, every layer": (MOE | {"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 8}, (8, 8)),
    "gemma3 as it is on the hub": (
        {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2},
        (8, None),
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_which_layers_have_a_window_is_read(case, tmp_path):
    settings, expected = WINDOWS[case]
    a = read_architecture(_write(tmp_path, **settings))
    assert a.windows == expected
    assert [a.window(layer) for layer in (0, 1)] == list(expected or (None, None))


def test_longrope_is_refused_where_a_longer_context_would_change_its_frequencies(tmp_path):
    from types import SimpleNamespace

    from skyrl_mega.config.schema import Config, ModelConfig, RolloutConfig
    from skyrl_mega.errors import ConfigError
    from skyrl_mega.models.build import build_model

    path = _write(tmp_path, model_type="llama", rope_parameters=LONGROPE)
    config = Config(model=ModelConfig(path=str(path)), rollout=RolloutConfig(max_model_len=257))
    with pytest.raises(ConfigError, match=r"max_model_len` \(257\) must not exceed the original positions \(256\)"):
        build_model(config, SimpleNamespace())


def test_a_path_that_is_no_model_directory_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        read_architecture(tmp_path)


def test_the_vocabulary_is_padded_to_the_tensor_ranks_only():
    assert [padded_vocab_size(151_937, tp) for tp in (1, 2, 8)] == [151_937, 151_938, 151_944]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_scaled_down_model_keeps_the_kinds_of_layers(tensor, tmp_path):
    from skyrl_mega.models.scaled_down import WINDOW, write_scaled_down

    (tmp_path / "large").mkdir()
    large = _write(tmp_path / "large", model_type="gemma3_text", num_hidden_layers=12, sliding_window=512)
    write_scaled_down(large, tmp_path / "small", num_layers=4, tensor=tensor)
    a = read_architecture(tmp_path / "small")
    assert (a.windows, a.num_layers) == ((WINDOW, None) * 2, 4)
    assert (a.post_norms, a.unit_offset_norms, a.activation) == (True, True, "gelu_tanh")


class Recorded:
    """A config object that notes which settings are looked at."""

    def __init__(self, config):
        self._config, self.seen = config, set()

    def __getattr__(self, name):
        self.seen.add(name)
        return getattr(self._config, name)


#: What Hugging Face's model code reads beside what it computes with: training of its own, caches, images, special tokens (a
#: padding token's embedding gets no gradient there; here padding is never passed in).
HARMLESS = {
    *("initializer_range", "output_router_logits", "router_aux_loss_coef", "pad_token_id", "use_cache"),
    *("get_text_config", "text_config", "vision_config", "image_token_id", "mm_tokens_per_image"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_setting_that_hugging_faces_model_code_reads_is_looked_at(name):
    """A setting that a new transformers reads, and we don't, must be honoured, refused or found harmless."""
    import re
    from pathlib import Path

    import transformers
    from transformers import AutoConfig

    module = name.removesuffix("_text")
    code = (Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py").read_text()
    read_there = set(re.findall(r"config\.([a-z]\w*)", code)) | set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', code))
    assert {"hidden_size", "num_attention_heads", "rope_parameters"} <= read_there
    # transformers' own default size of GLM's heads can't be halved into pairs; no file has it.
    size = {"head_dim": 128} if name == "glm4_moe" else {}
    config = Recorded(AutoConfig.for_model(name, use_sliding_window=True, max_window_layers=1, **size))
    FAMILIES[name].architecture(config)
    assert read_there - config.seen <= HARMLESS
