"""What a caller asks of a vLLM engine in an event loop, whichever way the engine is stepped: completions and scores.

One engine differs from another in how a prompt gets to vLLM and its output back (`_run`).
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.rollout.versioned_engine import VersionedEngine
from skyrl_mega.rollout.vllm_requests import check_length, score_row, scoring_sampling, to_completion, to_vllm_sampling
from skyrl_mega.types import Completion, GenerationRequest

if TYPE_CHECKING:
    import vllm


class AsyncRequests(VersionedEngine):
    """`generate` and `score` of `protocols.AsyncEngine`. Requests wait while a weight version is on its way."""

    def __init__(self, name: str, rollout: RolloutConfig, version: int = 0, *, routed_experts: bool) -> None:
        """Called inside the event loop that will use it; `routed_experts`: completions tell the experts of their tokens."""
        super().__init__(name, version)
        self._rollout = rollout
        self._routed_experts = routed_experts

    @abc.abstractmethod
    async def _run(self, prompt: list[int], sampling: vllm.SamplingParams) -> vllm.RequestOutput:
        """vLLM's output for `prompt` when it is finished. Cancelling ends the request."""

    async def generate(self, request: GenerationRequest) -> Completion:
        """See `protocols.AsyncEngine`. Raises RolloutError if the prompt leaves no room for a token."""
        num_tokens, most = len(request.prompt_token_ids) + 1, self._rollout.max_model_len
        check_length(f"request {request.request_id} with one new token", num_tokens, most, least=2)
        output = await self._run(list(request.prompt_token_ids), to_vllm_sampling(request.sampling))
        return to_completion(request, output, routed_experts=self._routed_experts)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `protocols.AsyncEngine`. Raises RolloutError if a sequence is longer than `rollout.max_model_len`."""
        for i, sequence in enumerate(sequences):
            check_length(f"sequence {i} to score", len(sequence), self._rollout.max_model_len, least=1)
        return await asyncio.gather(*(self._score_one(list(sequence)) for sequence in sequences))

    async def _score_one(self, sequence: list[int]) -> list[float]:
        if len(sequence) == 1:
            return [0.0]
        # The last token is scored as a continuation, so that a sequence of full length leaves room for vLLM's one new token.
        return score_row(sequence, await self._run(sequence[:-1], scoring_sampling(sequence[-1])))
