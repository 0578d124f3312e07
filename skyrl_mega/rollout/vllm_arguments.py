"""What every vLLM engine of ours is started with, whichever process it runs in.

Chunked prefill is off and one step has room for the longest sequence: on CPU vLLM can't rewind a seeded request's generator
after the sample that it throws away between two pieces of a prompt. Logprobs are of the distribution that was sampled from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import ConfigError
from skyrl_mega.rollout.vllm_fp8 import fp8_arguments

#: Tokens of one engine step: enough to prefill several hundred short prompts at once.
MIN_BATCHED_TOKENS = 8192

#: vLLM's default on CPU is 128 tokens: short prompts that many samples share would never be found in the prefix cache.
CPU_BLOCK_SIZE = 32

#: What an adapter may lie beside. Embedding and LM head must not be among them: vLLM makes room for adapters on both, pays for
#: that with every token, and on CPU its adapted LM head dies of prompt logprobs of several sequences.
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def engine_arguments(
    rollout: RolloutConfig, *, model_path: str, seed: int, device: str, routed_experts: bool = False, lora_rank: int = 0
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` and of `vllm.engine.arg_utils.AsyncEngineArgs`. `device` is "cpu" or "cuda".

    With `routed_experts` requests come back with the experts that computed their tokens. On a CPU each worker's
    `capture_routed_experts` must be called before the first request (`vllm_routing`). `lora_rank` > 0: the engine serves an
    adapter of at most this rank (one that vLLM knows, `lora_rules.engine_rank`), and weight versions are versions of it.
    With `rollout.quantization` it has no weights until a version arrives.

    Raises ConfigError for pipeline stages and data parallelism on CPU, where vLLM 0.32 dies of the first request.
    """
    for name in ("engine_pipeline", "engine_data"):
        if device == "cpu" and getattr(rollout, name) > 1:
            raise ConfigError(
                f"rollout.{name} ({getattr(rollout, name)}) must be 1 on CPU: vLLM's CPU build makes no room for what one stage "
                f"hands to the next, and its experts can't be data parallel; set rollout.{name}=1 (rollout.engine_tensor divides "
                "an engine too)."
            )
    from vllm.config import WeightTransferConfig

    from skyrl_mega.rollout.vllm_weight_transfer import BACKEND, WORKER_EXTENSION

    arguments: dict[str, Any] = dict(
        model=model_path,
        dtype=rollout.dtype,
        seed=seed,
        tensor_parallel_size=rollout.engine_tensor,
        pipeline_parallel_size=rollout.engine_pipeline,
        data_parallel_size=rollout.engine_data,
        max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=max(MIN_BATCHED_TOKENS, rollout.max_model_len, rollout.max_num_seqs),
        enable_chunked_prefill=False,
        enable_prefix_caching=True,
        enforce_eager=rollout.enforce_eager,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    if rollout.quantization == "fp8":
        arguments |= fp8_arguments()
    if lora_rank > 0:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": lora_rank}
        arguments["lora_target_modules"] = list(ADAPTED)
    if device == "cpu":
        if routed_experts:
            from skyrl_mega.rollout import vllm_routing

            arguments |= {"scheduler_cls": vllm_routing.SCHEDULER, "worker_extension_cls": vllm_routing.WORKER_EXTENSION}
        return arguments | {"block_size": CPU_BLOCK_SIZE} | _rotary_arguments(model_path)
    if routed_experts:
        arguments["enable_return_routed_experts"] = True
    return arguments | {"gpu_memory_utilization": rollout.gpu_memory_utilization}


def _rotary_arguments(model_path: str) -> dict[str, Any]:
    """On CPU vLLM 0.32's own kernel rotates pairs of neighbours wrongly; torch's operators do it right.

    DeepSeek's models have such pairs. Nothing for others, whose pairs are of two halves.
    """
    config = Path(model_path) / "config.json"
    model_type = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    return {"compilation_config": {"custom_ops": ["-rotary_embedding"]}} if model_type == "deepseek_v3" else {}
