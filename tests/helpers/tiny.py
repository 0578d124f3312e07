"""Tiny random Hugging Face models with a byte-level tokenizer, written to disk like real ones.

vLLM, transformers and the Megatron policy all load them; a few milliseconds a forward pass.
"""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
#: What each mixture-of-experts family adds to the dense settings.
MOE_SETTINGS = {
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True},
    "qwen2_moe": {**_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 80},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
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

    Families: llama, qwen2, qwen3 and, with 4 experts of which 2 see each token, qwen3_moe, qwen2_moe, mixtral. hidden 64,
    4 heads, 2 KV heads, head size 32 (qwen2, qwen2_moe: 16), FFN 128, expert FFN 48 (mixtral: 128), vocabulary 272 (padded past
    the tokenizer's 261). Weights are scaled up so that the distribution is far from uniform and a wrong tensor shows.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
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
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "qwen3_moe": Qwen3MoeConfig,
        "qwen2_moe": Qwen2MoeConfig,
        "mixtral": MixtralConfig,
    }[family]
    if not family.startswith("qwen2"):
        settings["head_dim"] = 32  # the smallest that vLLM has CPU attention kernels for
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
    model.config.dtype = getattr(torch, dtype)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
