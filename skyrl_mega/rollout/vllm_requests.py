"""Our requests in vLLM's words, and its outputs in ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import RolloutError
from skyrl_mega.types import Completion, GenerationRequest, SamplingParams, StopReason

if TYPE_CHECKING:
    import vllm
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

#: vLLM's finish reasons; it has others ("error", "repetition"), which no request of ours may end with.
STOP_REASONS = {"stop": StopReason.STOP, "length": StopReason.LENGTH, "abort": StopReason.ABORT}


#: The number under which an engine with room for an adapter has it.
ADAPTER_NUMBER = 1


def adapter_request(vllm_config: VllmConfig) -> LoRARequest | None:
    """What a request says that wants the engine's adapter; None for an engine without room for one."""
    if vllm_config.lora_config is None:
        return None
    from vllm.lora.request import LoRARequest

    # It is never read from there: `vllm_adapter` keeps it in memory.
    return LoRARequest("policy", ADAPTER_NUMBER, "(the trainer sends it)")


def check_length(what: str, num_tokens: int, most: int, *, least: int) -> None:
    """Raises RolloutError unless `num_tokens` is from `least` to `most` (rollout.max_model_len). `what` begins the message."""
    if not least <= num_tokens <= most:
        raise RolloutError(f"{what} has {num_tokens} tokens, and must have {least} to rollout.max_model_len ({most}).")


def prefix_cache_salt(rollout: RolloutConfig, version: int) -> str | None:
    """What keeps a new request from prefix-cache blocks of older weights, where the cache is not emptied at each update."""
    return f"weights {version}" if rollout.kv_cache_on_update == "keep" else None


def to_vllm_sampling(sampling: SamplingParams) -> vllm.SamplingParams:
    """vLLM's parameters for one turn: only the sampled token's logprob, one output at the end."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VLLMSamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=list(sampling.stop),
        seed=sampling.seed,
        logprobs=0,
        flat_logprobs=True,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def scoring_sampling(last_token: int) -> vllm.SamplingParams:
    """Parameters under which a prompt's tokens, and `last_token` as its continuation, get raw log-probabilities."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VLLMSamplingParams(
        max_tokens=1,
        temperature=1.0,
        prompt_logprobs=0,
        logprob_token_ids=[last_token],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def to_completion(request: GenerationRequest, output: vllm.RequestOutput, *, routed_experts: bool) -> Completion:
    """The completion of `request`, with the experts of its tokens where the engine was started with `routed_experts`.

    Raises RolloutError if vLLM's output breaks the protocol: no tokens (unless it was aborted), tokens without finite logprobs,
    an unknown finish reason, tokens without a weight version or without their experts.
    """
    (turn,) = output.outputs
    token_ids, logprobs = list(turn.token_ids), list(turn.logprobs.logprobs)
    aborted = turn.finish_reason == StopReason.ABORT.value
    if not (token_ids or aborted) or len(token_ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
        raise RolloutError(
            f"request {request.request_id}: every sampled token must come with a finite logprob; vLLM returned {len(token_ids)} "
            f"tokens and {len(logprobs)} logprobs {logprobs[:8]}. The engine's weights may hold NaN."
        )
    if turn.finish_reason not in STOP_REASONS:
        raise RolloutError(f"request {request.request_id} ended with {turn.finish_reason!r}; known: {sorted(STOP_REASONS)}.")
    versions = _version_per_token(turn.weight_versions or (), len(token_ids))
    if len(versions) != len(token_ids):
        raise RolloutError(
            f"request {request.request_id}: every sampled token must have a weight version; vLLM reports "
            f"{turn.weight_versions} for {len(token_ids)} tokens."
        )
    return Completion(
        request_id=request.request_id,
        token_ids=token_ids,
        logprobs=logprobs,
        text=turn.text,
        stop_reason=STOP_REASONS[turn.finish_reason],
        policy_versions=versions,
        routed_experts=_routing(request, turn) if routed_experts and token_ids else None,
    )


def _routing(request: GenerationRequest, turn: vllm.CompletionOutput) -> np.ndarray:
    num_rows = 0 if turn.routed_experts is None else len(turn.routed_experts)
    num_computed = len(request.prompt_token_ids) + len(turn.token_ids) - 1
    if num_rows != num_computed:
        raise RolloutError(
            f"request {request.request_id}: every token but the last must come with its experts; vLLM returned those of "
            f"{num_rows} of {num_computed} tokens. Set `model.router_replay=off` where the engine can't tell them."
        )
    return turn.routed_experts.astype(np.int16)


def _version_per_token(spans: Sequence[vllm.outputs.WeightVersionSpan], count: int) -> list[int]:
    return [int(span.version) for span in spans for _ in range(span.start, min(span.end, count))]


def score_row(sequence: list[int], output: vllm.RequestOutput) -> list[float]:
    """Log-probability per token of `sequence`; element 0 is 0.0. `output` answered `scoring_sampling(sequence[-1])`."""
    inner = [output.prompt_logprobs[t][sequence[t]].logprob for t in range(1, len(sequence) - 1)]
    return [0.0, *inner, output.outputs[0].logprobs[0][sequence[-1]].logprob]
