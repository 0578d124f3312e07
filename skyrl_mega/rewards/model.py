"""Reward models: sequence classification, loaded here or served by vLLM.

A model sees prompt and response as one sequence, and its raw output (no sigmoid, no softmax) is the score. Loaded here it runs
Hugging Face's own forward pass, so that a sequence's score is what its authors computed; sequences of similar length share a
batch. A server is asked through vLLM's /classify with token ids and `use_activation: false` (its /score takes texts alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import httpx

from skyrl_mega.config.schema import ModelTerm
from skyrl_mega.errors import BackendUnavailableError, ConfigError, DeadlineError, ModelLoadError, RewardError
from skyrl_mega.rewards.endpoint import Endpoint
from skyrl_mega.rewards.inputs import RewardInput
from skyrl_mega.rewards.scorer import Outcome, failure, to_outcome
from skyrl_mega.rewards.threads import DaemonThreads

#: Requests in flight at a server: it batches by itself.
SERVER_CONCURRENCY = 16

Rows = list[list[int]]


class Classifier(Protocol):
    """Outputs of a sequence-classification model."""

    async def outputs(self, sequences: Rows) -> list[list[float]]:
        """The model's outputs for each sequence, before any activation."""
        ...

    async def close(self) -> None: ...


class ModelReward:
    """A `Scorer` over a reward model. `encode`: see `encoding.SequenceEncoder`."""

    def __init__(self, term: ModelTerm, classifier: Classifier, encode: Callable[[RewardInput], list[int]], config: Any) -> None:
        """`config`: the model's, of Hugging Face. Raises ConfigError where `output` does not name one of its outputs."""
        self._term, self._classifier, self._encode = term, classifier, encode
        self._output = output_index(term, config)
        self._max_tokens = getattr(config, "max_position_embeddings", None)

    async def score(self, inputs: Sequence[RewardInput]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        sequences: dict[int, list[int]] = {}
        for index, one in enumerate(inputs):
            try:
                sequences[index] = self._sequence(one)
            except RewardError as error:
                outcomes[index] = failure(error, self._term.name, one.place)
        for batch in batches({index: len(ids) for index, ids in sequences.items()}, self._term.tokens_per_batch):
            outcomes |= await self._score_batch(batch, inputs, sequences)
        return [outcomes[index] for index in range(len(inputs))]

    async def _score_batch(
        self, batch: list[int], inputs: Sequence[RewardInput], sequences: dict[int, list[int]]
    ) -> dict[int, Outcome]:
        try:
            rows = await self._classifier.outputs([sequences[index] for index in batch])
            scores = {index: row[self._output] for index, row in zip(batch, rows, strict=True)}
        except DeadlineError:
            raise
        except (RewardError, TimeoutError, RuntimeError, ValueError, IndexError) as error:  # RuntimeError: torch, no memory too
            return {index: failure(error, self._term.name, inputs[index].place) for index in batch}
        return {index: to_outcome(score, self._term.name, inputs[index].place) for index, score in scores.items()}

    def _sequence(self, one: RewardInput) -> list[int]:
        ids = self._encode(one)
        if self._max_tokens is not None and len(ids) > self._max_tokens:
            raise RewardError(f"{len(ids)} tokens, and the model knows {self._max_tokens} positions")
        return ids

    async def close(self) -> None:
        await self._classifier.close()


class LoadedClassifier:
    """The model in this process; its forward passes run in one daemon thread, one after the other."""

    def __init__(self, term: ModelTerm, *, sequential: bool = False) -> None:
        """Loads it. Raises BackendUnavailableError without the device, ModelLoadError for a directory that lacks weights."""
        import torch
        from transformers import AutoModelForSequenceClassification
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it would break through the run's own display
        has_cuda = torch.cuda.is_available()
        if term.device == "cuda" and not has_cuda:
            raise BackendUnavailableError(f"reward `{term.name}` has `device: cuda`, and torch sees no GPU; set `device: cpu`.")
        self._device = torch.device("cuda" if has_cuda and term.device != "cpu" else "cpu")
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                term.path, dtype=getattr(torch, term.dtype), output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights of another shape
            raise ModelLoadError(f"the model of reward `{term.name}` can't be loaded from {term.path}: {error}") from error
        if found["missing_keys"]:
            raise ModelLoadError(
                f"the model of reward `{term.name}` must have all its weights, but {term.path} lacks "
                f"{', '.join(sorted(found['missing_keys'])[:5])}: its scores would be random."
            )
        self._model = model.to(self._device).eval().requires_grad_(False)
        self._threads = DaemonThreads(f"reward `{term.name}`", term.timeout_s, max_threads=1, sequential=sequential)

    async def outputs(self, sequences: Rows) -> list[list[float]]:
        # Without a padding token Hugging Face's forward can't tell where a padded sequence ends, and refuses.
        together = 1 if self._pad_token_id is None else len(sequences)
        rows: list[list[float]] = []
        for start in range(0, len(sequences), together):
            rows += await self._threads(self._forward, sequences[start : start + together])
        return rows

    @property
    def _pad_token_id(self) -> int | None:
        return self._model.config.get_text_config().pad_token_id

    def _forward(self, sequences: Rows) -> list[list[float]]:
        import torch

        lengths_N = torch.tensor([len(ids) for ids in sequences])
        longest = int(lengths_N.max())
        pad = self._pad_token_id or 0
        input_ids_NL = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences])
        mask_NL = (torch.arange(longest)[None, :] < lengths_N[:, None]).long()
        with torch.inference_mode():
            outputs = self._model(input_ids=input_ids_NL.to(self._device), attention_mask=mask_NL.to(self._device))
        return outputs.logits.float().cpu().tolist()

    async def close(self) -> None:
        return None


class ServedClassifier:
    """The model behind a vLLM server, started with `vllm serve MODEL --runner pooling`."""

    def __init__(self, term: ModelTerm, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._endpoint = Endpoint(
            term.url, timeout_s=term.timeout_s, retries=term.retries, concurrency=SERVER_CONCURRENCY, transport=transport
        )

    async def outputs(self, sequences: Rows) -> list[list[float]]:
        answer = await self._endpoint.post("/classify", {"input": sequences, "use_activation": False})
        try:
            rows = {item["index"]: list(item["probs"]) for item in answer["data"]}
            return [rows[index] for index in range(len(sequences))]
        except (KeyError, TypeError, IndexError) as error:
            raise RewardError(
                f"the server's answer has no outputs for {len(sequences)} sequences: {str(answer)[:300]}"
            ) from error

    async def close(self) -> None:
        await self._endpoint.close()


def output_index(term: ModelTerm, config: Any) -> int:
    """Which of the model's outputs is the score. Raises ConfigError where the term does not say, or names none of them."""
    count = config.num_labels
    if (count == 1 and term.output <= 0) or 0 <= term.output < count:
        return max(0, term.output)
    labels = ", ".join(f"{index}: {config.id2label[index]}" for index in range(count))
    raise ConfigError(
        f"The `output` of reward `{term.name}` must be one of the model's {count} outputs ({labels}); got {term.output}. Set it."
    )


def batches(lengths: dict[int, int], tokens_per_batch: int) -> Iterator[list[int]]:
    """The keys of `lengths` by length, in lists whose size x longest is at most `tokens_per_batch`; a longer one goes alone."""
    batch: list[int] = []
    for key in sorted(lengths, key=lambda key: lengths[key]):
        if batch and (len(batch) + 1) * lengths[key] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
