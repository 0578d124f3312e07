"""Our requests in vLLM's words, and its outputs in ours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from skyrl_mega.errors import RolloutError
from skyrl_mega.types import Completion, GenerationRequest, SamplingParams, StopReason

if TYPE_CHECKING:
    import vllm

#: vLLM's finish reasons; it has others ("error", "repetition"), which no request of ours may end with.
STOP_REASONS = {"stop": StopReason.STOP, "length": StopReason.LENGTH, "abort": StopReason.ABORT}


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


def to_completion(request: GenerationRequest, output: vllm.RequestOutput) -> Completion:
    """The completion of `request`.

    Raises RolloutError if vLLM's output breaks the protocol: no tokens, tokens without finite logprobs, an unknown finish
    reason, or more than one weight version.
    """
    (turn,) = output.outputs
    token_ids, logprobs = list(turn.token_ids), list(turn.logprobs.logprobs)
    if not token_ids or len(token_ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
        raise RolloutError(
            f"request {request.request_id}: every sampled token must come with a finite logprob; vLLM returned {len(token_ids)} "
            f"tokens and {len(logprobs)} logprobs {logprobs[:8]}. The engine's weights may hold NaN."
        )
    if turn.finish_reason not in STOP_REASONS:
        raise RolloutError(f"request {request.request_id} ended with {turn.finish_reason!r}; known: {sorted(STOP_REASONS)}.")
    versions = [span.version for span in turn.weight_versions or ()]
    if len(versions) != 1:
        raise RolloutError(f"request {request.request_id}: one weight version must sample a whole turn; vLLM reports {versions}.")
    return Completion(
        request_id=request.request_id,
        token_ids=token_ids,
        logprobs=logprobs,
        text=turn.text,
        stop_reason=STOP_REASONS[turn.finish_reason],
        policy_version=int(versions[0]),
    )


def score_row(sequence: list[int], output: vllm.RequestOutput) -> list[float]:
    """Log-probability per token of `sequence`; element 0 is 0.0. `output` answered `scoring_sampling(sequence[-1])`."""
    inner = [output.prompt_logprobs[t][sequence[t]].logprob for t in range(1, len(sequence) - 1)]
    return [0.0, *inner, output.outputs[0].logprobs[0][sequence[-1]].logprob]
