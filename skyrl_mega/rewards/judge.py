"""A language model as judge, behind any OpenAI-compatible chat endpoint (arXiv:2306.05685 on what such judges are good for).

It is asked one question per trajectory at temperature 0, and its answer is read for a score. Equal questions are asked once.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence

import httpx

from skyrl_mega.config.reward_rules import PLACEHOLDER
from skyrl_mega.config.schema import JudgeTerm
from skyrl_mega.errors import RewardError
from skyrl_mega.rewards.endpoint import Endpoint
from skyrl_mega.rewards.extract import find_score
from skyrl_mega.rewards.inputs import RewardInput
from skyrl_mega.rewards.scorer import Outcome, failure
from skyrl_mega.rewards.shared_calls import SharedCalls


class Judge:
    """A `Scorer`. What is kept and shared are answers, by question."""

    def __init__(self, term: JudgeTerm, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """`transport`: another way to reach the endpoint."""
        key = os.environ.get(term.api_key_env, "") if term.api_key_env else ""
        self._term = term
        self._calls = SharedCalls(term.cache_size)
        self._endpoint = Endpoint(
            term.url,
            timeout_s=term.timeout_s,
            retries=term.retries,
            concurrency=term.concurrency,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            transport=transport,
        )

    async def score(self, inputs: Sequence[RewardInput]) -> list[Outcome]:
        return list(await asyncio.gather(*(self._score_one(one) for one in inputs)))

    async def _score_one(self, one: RewardInput) -> Outcome:
        try:
            question = fill(self._term, one)
            answer = await self._calls.get(question, lambda: self.ask(question))
            return find_score(answer, self._term)
        except RewardError as error:
            return failure(error, self._term.name, one.place)

    async def ask(self, question: str, *, max_tokens: int | None = None) -> str:
        """The model's answer. Raises RewardError."""
        body = {
            "model": self._term.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens or self._term.max_tokens,
        }
        answer = await self._endpoint.post("/chat/completions", body)
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise RewardError(f"the endpoint's answer holds no message: {str(answer)[:300]}") from error

    async def close(self) -> None:
        await self._endpoint.close()


def fill(term: JudgeTerm, one: RewardInput) -> str:
    """The template with all placeholders filled in at once: braces in what the policy said stay what they are.

    Raises RewardError where the payload lacks the reference.
    """
    texts = {"prompt": one.prompt, "response": one.response}
    if term.reference:
        if term.reference not in one.payload:
            raise RewardError(f"the payload has no `{term.reference}` to refer to; it has {', '.join(sorted(one.payload))}")
        reference = one.payload[term.reference]
        texts["reference"] = reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)
    return PLACEHOLDER.sub(lambda match: texts[match[1]], term.template)
