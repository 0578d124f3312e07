"""A teacher behind a vLLM server (`vllm serve MODEL`): it judges whole samples by their token ids, in one request each.

Rank 0 asks, every rank gets the answers. A prompt's log-probabilities are those of the whole vocabulary at temperature 1.

Shape letters: L tokens of a sample, T packed tokens of a micro-batch, K likeliest tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from skyrl_mega.data.packing import pack_rows
from skyrl_mega.errors import BackendUnavailableError, RewardError, RolloutError
from skyrl_mega.rewards.endpoint import Endpoint

if TYPE_CHECKING:
    import httpx

    from skyrl_mega.config.schema import Config, TeacherConfig
    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.types import TrainBatch, TrainSample

#: Requests in flight at the server: it batches by itself.
CONCURRENCY = 32
#: A server that is up answers one short request within this.
PROBE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Judgement:
    """Of one sample's tokens, token-aligned; entry 0, before which nothing stands, is 0 (and -1).

    `logprobs` float32 [L]; `topk_ids` int64 and `topk_logprobs` float32 [L, K], likeliest first, -1 and -inf where there are
    fewer.
    """

    logprobs: torch.Tensor
    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor


class ServedTeacher:
    """What `ReferenceModel` says of batches, said by the server at `teacher.url`. Every method is called by all ranks.

    `ask` comes first in every step; the rest speaks of the samples that it was given.
    """

    def __init__(self, config: Config, topology: Topology, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """`transport`: another way to reach the server."""
        self._settings, self._topology, self._transport = config.teacher, topology, transport
        self._judgements: dict[int, Judgement] = {}

    def ask(self, samples: Sequence[TrainSample]) -> None:
        """Fills `teacher_logprobs` of the samples. Raises RolloutError if the server fails or breaks its protocol."""
        answers = None
        if self._topology.is_main:
            sequences = [sample.token_ids.tolist() for sample in samples]
            answers = ask_server(self._settings, sequences, transport=self._transport, on_answer=self._topology.progress)
        answers = self._topology.broadcast_object(answers, phase="teacher")
        self._judgements = {sample.sample_index: answer for sample, answer in zip(samples, answers, strict=True)}
        for sample, answer in zip(samples, answers, strict=True):
            sample.teacher_logprobs = torch.where(sample.loss_mask, answer.logprobs, 0.0)

    def compute_topk(self, batch: TrainBatch, k: int, *, vocab_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See `ReferenceModel.compute_topk`."""
        ids = {index: judgement.topk_ids[:, :k] for index, judgement in self._judgements.items()}
        logprobs = {index: judgement.topk_logprobs[:, :k] for index, judgement in self._judgements.items()}
        found = []
        for micro_batch, ids_TK, logprobs_TK in zip(
            batch.micro_batches, pack_rows(ids, batch), pack_rows(logprobs, batch), strict=True
        ):
            is_unknown_TK = (ids_TK >= vocab_size) & micro_batch.loss_mask[:, None]
            is_none_TK = is_unknown_TK | ~micro_batch.loss_mask[:, None]
            found.append((ids_TK.masked_fill(is_none_TK, -1), logprobs_TK.masked_fill(is_unknown_TK, float("-inf"))))
        return found


def check_served_teacher(config: Config, vocab_size: int, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
    """Asks the server for two tokens, the last of the policy's vocabulary. Rank 0 only; raises BackendUnavailableError.

    A server that does not know the token, or may not tell as many likeliest tokens as `teacher.topk`, says so here.
    """
    try:
        ask_server(config.teacher, [[vocab_size - 1] * 2], transport=transport, retries=0, timeout_s=PROBE_TIMEOUT_S)
    except RolloutError as error:
        raise BackendUnavailableError(
            f"the server at `teacher.url` must judge token ids up to {vocab_size - 1} and tell its {config.teacher.topk} "
            f"likeliest; start it with `vllm serve {config.teacher.path} --max-logprobs {max(config.teacher.topk, 1)}`: {error}"
        ) from error


def ask_server(
    settings: TeacherConfig,
    sequences: Sequence[list[int]],
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    on_answer: Callable[[], object] = lambda: None,
    retries: int | None = None,
    timeout_s: float | None = None,
) -> list[Judgement]:
    """The judgement of each sequence of token ids; `on_answer` is called after each. Raises RolloutError."""
    endpoint_settings = {
        "timeout_s": settings.timeout_s if timeout_s is None else timeout_s,
        "retries": settings.retries if retries is None else retries,
        "concurrency": CONCURRENCY,
        "transport": transport,
    }

    async def ask_all() -> list[Judgement]:
        endpoint = Endpoint(settings.url, **endpoint_settings)

        async def ask(token_ids: list[int]) -> Judgement:
            answer = await endpoint.post("/v1/completions", _body(settings, token_ids))
            on_answer()
            return judgement_of(token_ids, answer, settings.topk)

        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(ask(token_ids)) for token_ids in sequences]
        finally:
            await endpoint.close()
        return [task.result() for task in asked]

    try:
        return asyncio.run(ask_all())
    except ExceptionGroup as failed:
        first = failed.exceptions[0]  # the others were cancelled
        if isinstance(first, (RewardError, RolloutError)):
            raise RolloutError(f"the teacher's server failed: {first}") from first
        raise


def _body(settings: TeacherConfig, token_ids: list[int]) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": token_ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": settings.topk}
    return body | ({"model": settings.served_name} if settings.served_name else {})


def judgement_of(token_ids: Sequence[int], answer: Mapping[str, Any], k: int) -> Judgement:
    """What vLLM's answer says of each token. Raises RolloutError where it does not speak of all of them."""
    try:
        rows = answer["choices"][0]["prompt_logprobs"] or []
    except (KeyError, IndexError, TypeError) as error:
        raise RolloutError(f"its answer has no prompt_logprobs: {str(answer)[:300]}") from error
    if len(rows) != len(token_ids):
        raise RolloutError(f"it returned {len(rows)} prompt logprobs for {len(token_ids)} tokens.")
    logprobs_L = torch.zeros(len(token_ids))
    ids_LK = torch.full((len(token_ids), k), -1)
    logprobs_LK = torch.full((len(token_ids), k), float("-inf"))
    logprobs_LK[:1] = 0.0
    for t in range(1, len(token_ids)):
        row = rows[t]
        if (own := row.get(str(token_ids[t]))) is None:
            raise RolloutError(f"its logprobs at token {t} leave out that token, {token_ids[t]}.")
        logprobs_L[t] = own["logprob"]
        # The sampled token comes along also where it is not one of the likeliest.
        best = sorted((entry["rank"], int(token), entry["logprob"]) for token, entry in row.items() if entry["rank"] <= k)
        for place, (_, token, logprob) in enumerate(best[:k]):
            ids_LK[t, place], logprobs_LK[t, place] = token, logprob
    return Judgement(logprobs_L, ids_LK, logprobs_LK)
