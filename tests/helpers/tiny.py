"""Tiny random Hugging Face models with a byte-level tokenizer, written to disk like real ones.

vLLM, transformers and the Megatron policy all load them; a few milliseconds a forward pass.
"""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: What families with windows add to the settings; Gemma's scale is not that of its head size.
DENSE_SETTINGS = {
    "mistral": {"sliding_window": 12},
    # Caps so low that scores and logits of a random model feel them.
    "gemma2": {
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 48,
    },
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
#: One dense layer, then experts chosen by sigmoid and bias, and two shared ones.
_SIGMOID_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 0,
}
#: What each mixture-of-experts family adds to the dense settings.
MOE_SETTINGS = {
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True},
    "qwen2_moe": {**_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 80},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**_SIGMOID_EXPERTS, "use_qk_norm": True, "attention_bias": True},
    "deepseek_v3": {
        **_SIGMOID_EXPERTS,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        # As DeepSeek's files have it; transformers does not read them, vLLM does.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
}


def make_tokenizer():
    """A tokenizer whose tokens are bytes: pad 0, bos 1, eos 2, <|im_start|> 3, <|im_end|> 4, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", additional_special_tokens=special[3:]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_tiny_model(
    path: Path, family: str = "llama", *, tied: bool = True, seed: int = 0, dtype: str = "float32", **overrides
) -> Path:
    """Writes a random 2-layer model of `family` and its tokenizer to `path`; returns `path`.

    Families: llama, mistral (window 12), qwen2, qwen3, gemma2 and gemma3_text (window 12 in the first layer) and, with 4 experts
    of which 2 see each token, qwen3_moe, qwen2_moe, mixtral. hidden 64, 4 heads, 2 KV heads, head size 32 (qwen2, qwen2_moe: 16),
    FFN 128, expert FFN 48 (mixtral: 128), vocabulary 272 (padded past the tokenizer's 261). Also glm4_moe and,
    with multi-latent attention, deepseek_v3, both with a dense first layer. Weights are scaled up so that the distribution is far
    from uniform and a wrong tensor shows.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        DeepseekV3Config,
        Gemma2Config,
        Gemma3TextConfig,
        GemmaConfig,
        Glm4MoeConfig,
        LlamaConfig,
        MistralConfig,
        MixtralConfig,
        Qwen2Config,
        Qwen2MoeConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    settings = dict(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config_class = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "gemma2": Gemma2Config,
        "gemma3_text": Gemma3TextConfig,
        "gemma": GemmaConfig,  # of the documentation's example
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "qwen3_moe": Qwen3MoeConfig,
        "qwen2_moe": Qwen2MoeConfig,
        "mixtral": MixtralConfig,
        "glm4_moe": Glm4MoeConfig,
        "deepseek_v3": DeepseekV3Config,
    }[family]
    if not family.startswith(("qwen2", "deepseek")):
        settings["head_dim"] = 32  # the smallest that vLLM has CPU attention kernels for
    settings.update(DENSE_SETTINGS.get(family, {}))
    settings.update(MOE_SETTINGS.get(family, {}))
    settings.update(overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "bias" not in name:
                parameter.copy_(1.0 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.08))
    model = model.to(getattr(torch, dtype))
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # float32 in files of any dtype
            module.e_score_correction_bias = torch.randn_like(module.e_score_correction_bias, dtype=torch.float32) * 0.1
    model.config.dtype = getattr(torch, dtype)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
