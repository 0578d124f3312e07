"""What the three ways of training on fixed data do with a batch of rows: one update, or an evaluation without one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from skyrl_mega.algorithms.preference.answers import sums_by_sample
from skyrl_mega.algorithms.preference.losses import is_normalised, needs_reference, preference_metrics
from skyrl_mega.algorithms.preference.reward_losses import reward_metrics
from skyrl_mega.config.offline_schema import DPOConfig, OfflineConfig, RMConfig
from skyrl_mega.data.examples import Example, TokenSequence, samples_of
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.training.schedule import packing_multiples
from skyrl_mega.types import Metrics, RowBatch, TrainSample

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.training.policy import Policy
    from skyrl_mega.training.preference_policy import PreferencePolicy
    from skyrl_mega.training.reference import BaseModel, ReferenceModel
    from skyrl_mega.training.reward_model import RewardModel
    from skyrl_mega.training.trainable import Trainable


class Task(ABC):
    """One way of training. Every method is called by all ranks, with the same rows."""

    def __init__(self, config: Config, topology: Topology, *, share_prompts: bool) -> None:
        self.config = config
        self.topology = topology
        self._share_prompts = share_prompts

    @property
    @abstractmethod
    def trained(self) -> Trainable:
        """The model that is updated, saved and exported."""

    @abstractmethod
    def update(self, examples: Sequence[Example]) -> Metrics:
        """One optimizer update."""

    @abstractmethod
    def evaluate(self, examples: Sequence[Example]) -> Metrics:
        """Numbers of the current weights on the rows."""

    def prepare(self, examples: Sequence[Example]) -> None:  # noqa: B027 - most have nothing to prepare
        """Called once with all rows before the first update."""

    def pack(self, examples: Sequence[Example], *, share_prompts: bool = False) -> tuple[RowBatch, list[TrainSample]]:
        """This rank's part of the rows, and all of their samples."""
        samples = samples_of(examples)
        batch = balance_and_pack(
            samples,
            tokens_per_micro_batch=self.config.trainer.tokens_per_micro_batch,
            dp_rank=self.topology.dp_rank,
            dp_size=self.topology.dp_size,
            skip_zero_advantage=False,
            share_prompts=share_prompts,
            keep_groups=True,
            **packing_multiples(self.config, self.topology),
        )
        return RowBatch(**vars(batch), targets=torch.tensor([sample.reward for sample in samples])), samples

    def _chunks(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        size = self.config.trainer.prompts_per_step
        return (examples[start : start + size] for start in range(0, len(examples), size))


class SupervisedTask(Task):
    """Cross-entropy of responses, averaged over the trained tokens of the whole batch."""

    def __init__(self, policy: Policy, config: Config, topology: Topology) -> None:
        super().__init__(config, topology, share_prompts=False)
        self._policy = policy

    @property
    def trained(self) -> Trainable:
        return self._policy

    def update(self, examples: Sequence[Example]) -> Metrics:
        batch, _ = self.pack(examples)
        kept = ("loss/total", "policy/entropy", "update/", "packing/", "kernels/", "experts/")
        metrics = self._policy.train_step(batch)
        return {name: value for name, value in metrics.items() if name.startswith(kept)}

    def evaluate(self, examples: Sequence[Example]) -> Metrics:
        sums = {"nll": 0.0, "tokens": 0.0}
        for chunk in self._chunks(examples):
            batch, _ = self.pack(chunk)
            for micro_batch, logprobs_T in zip(batch.micro_batches, self._policy.compute_logprobs(batch), strict=True):
                sums["nll"] -= float(logprobs_T[micro_batch.loss_mask].double().sum())
                sums["tokens"] += float(micro_batch.loss_mask.sum())
        sums = self.topology.all_reduce_metrics(sums)
        loss = sums["nll"] / sums["tokens"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class PreferenceTask(Task):
    """Losses on preferences, with the reference that they need."""

    def __init__(
        self,
        policy: PreferencePolicy,
        reference: ReferenceModel | BaseModel | None,
        config: Config,
        topology: Topology,
        *,
        share_prompts: bool,
    ) -> None:
        """`reference`: None for losses without one."""
        super().__init__(config, topology, share_prompts=share_prompts)
        self._policy = policy
        self._reference = reference
        self._settings = policy.preference
        self._precomputed: dict[str, tuple[float, ...]] = {}

    @property
    def trained(self) -> Trainable:
        return self._policy

    def prepare(self, examples: Sequence[Example]) -> None:
        """With `preference.reference=precomputed`: its log-probabilities of all rows, after which it is let go."""
        if self._settings.reference != "precomputed" or self._reference is None:
            return
        for chunk in self._chunks(examples):
            batch, samples = self.pack(chunk, share_prompts=self._share_prompts)
            sums_N = self._of_all_ranks(self._sums(self._reference.compute_logprobs(batch), batch, len(samples)))
            for number, example in enumerate(chunk):
                self._precomputed[example.place] = tuple(sums_N[_numbers(example, number)].tolist())
        self._reference = None

    def update(self, examples: Sequence[Example]) -> Metrics:
        return self._policy.train_step(self._batch(examples))

    def evaluate(self, examples: Sequence[Example]) -> Metrics:
        totals: dict[str, float] = {}
        for chunk in self._chunks(examples):
            for name, value in self._policy.evaluate(self._batch(chunk)).items():
                totals[name] = totals.get(name, 0.0) + value
        return _held_out(preference_metrics(totals))

    def _batch(self, examples: Sequence[Example]) -> RowBatch:
        batch, samples = self.pack(examples, share_prompts=self._share_prompts)
        if needs_reference(self._settings):
            batch.ref_logprobs = self._ref_logprobs(examples, batch, len(samples))
        if self._settings.loss == "kto":
            batch.kl_baseline = self._kl_baseline(examples)
        return batch

    def _ref_logprobs(self, examples: Sequence[Example], batch: RowBatch, num_samples: int) -> torch.Tensor:
        if self._precomputed:
            return torch.tensor([value for example in examples for value in self._precomputed[example.place]])
        assert self._reference is not None
        return self._sums(self._reference.compute_logprobs(batch), batch, num_samples)

    def _kl_baseline(self, examples: Sequence[Example]) -> float:
        """z of kto: how much likelier the policy finds answers than the reference, each to another row's prompt; at least 0.

        arXiv:2402.01306, section 4.1; over the rows of the whole batch, every answer after the next row's prompt.
        """
        assert self._reference is not None
        limit = self.config.rollout.max_model_len
        mismatched = [_answer_to(other, one, limit) for one, other in zip(examples, [*examples[1:], examples[0]], strict=True)]
        batch, samples = self.pack(mismatched)
        ratios = [
            policy_T - reference_T
            for policy_T, reference_T in zip(
                self._policy.compute_logprobs(batch), self._reference.compute_logprobs(batch), strict=True
            )
        ]
        sums_N = self._of_all_ranks(self._sums(ratios, batch, len(samples)))
        if is_normalised(self._settings):
            sums_N = sums_N / torch.tensor([sample.num_loss_tokens for sample in samples])
        return max(0.0, float(sums_N.mean()))

    def _sums(self, values: list[torch.Tensor], batch: RowBatch, num_samples: int) -> torch.Tensor:
        batches = batch.micro_batches
        masks, index = [mb.loss_mask for mb in batches], [mb.sample_index for mb in batches]
        return sums_by_sample(values, masks, index, [mb.cu_seqlens for mb in batches], num_samples)

    def _of_all_ranks(self, sums_N: torch.Tensor) -> torch.Tensor:
        """Each sample's number, from the data-parallel rank that has it."""
        by_index = {str(index): value for index, value in enumerate(sums_N.tolist())}
        reduced = self.topology.all_reduce_metrics(by_index)
        return torch.tensor([reduced[str(index)] for index in range(len(sums_N))]) / self.topology.cp_size


class RewardTask(Task):
    """A score per answer."""

    def __init__(self, model: RewardModel, config: Config, topology: Topology, *, share_prompts: bool) -> None:
        super().__init__(config, topology, share_prompts=share_prompts)
        self._model = model

    @property
    def trained(self) -> Trainable:
        return self._model

    def update(self, examples: Sequence[Example]) -> Metrics:
        batch, _ = self.pack(examples, share_prompts=self._share_prompts)
        return self._model.train_step(batch)

    def evaluate(self, examples: Sequence[Example]) -> Metrics:
        totals: dict[str, float] = {}
        for chunk in self._chunks(examples):
            batch, _ = self.pack(chunk, share_prompts=self._share_prompts)
            for name, value in self._model.evaluate(batch).items():
                totals[name] = totals.get(name, 0.0) + value
        return _held_out(reward_metrics(totals))


def make_task(config: OfflineConfig, derived: Config, topology: Topology) -> Task:
    """The task of the command that `config` belongs to, its models loaded. `derived`: `config.offline.training_config`."""
    from skyrl_mega.orchestration.assemble import shares_prompts
    from skyrl_mega.training.policy import Policy
    from skyrl_mega.training.preference_policy import PreferencePolicy
    from skyrl_mega.training.reference import BaseModel, ReferenceModel
    from skyrl_mega.training.reward_model import RewardModel

    if isinstance(config, DPOConfig):
        policy = PreferencePolicy.learning_from(config.preference, derived, topology)
        reference: ReferenceModel | BaseModel | None = None
        if needs_reference(config.preference):
            path = config.preference.reference_path
            # A second model is loaded only where the base of an adapter is not the reference itself.
            is_base = derived.lora.rank > 0 and not path
            reference = BaseModel(policy) if is_base else ReferenceModel(derived, topology, path)
        return PreferenceTask(policy, reference, derived, topology, share_prompts=shares_prompts(derived, policy))
    if isinstance(config, RMConfig):
        model = RewardModel.learning_from(config.reward_model, derived, topology)
        return RewardTask(model, derived, topology, share_prompts=shares_prompts(derived, model))
    return SupervisedTask(Policy.from_hf(derived, topology), derived, topology)


def _held_out(metrics: Mapping[str, float]) -> Metrics:
    """Names without a room: loss, accuracy, margin ..."""
    renamed = {"accuracies": "accuracy", "margins": "margin"}
    found = {"loss": metrics["loss/total"]}
    for name, value in metrics.items():
        room, _, rest = name.partition("/")
        if room != "loss":
            found[f"logps_{rest}" if room == "logps" else renamed.get(rest, rest)] = value
    return found


def _numbers(example: Example, number: int) -> list[int]:
    """The sample_index of each sequence of row `number`; all rows have as many sequences."""
    count = len(example.sequences)
    return [number * count + position for position in range(count)]


def _answer_to(prompt: Example, answer: Example, max_length: int) -> Example:
    """The first answer of one row after the prompt of another, within `max_length` tokens from the end."""
    asked, answered = prompt.sequences[0], answer.sequences[0]
    before = asked.token_ids[: int(asked.loss_mask.nonzero()[0])]
    after = answered.token_ids[int(answered.loss_mask.nonzero()[0]) :]
    ids = torch.cat([before, after])[-max_length:]
    trained = answered.loss_mask[-len(after) :]
    mask = torch.cat([torch.zeros(len(ids) - min(len(after), len(ids)), dtype=torch.bool), trained])[-len(ids) :]
    mask[:1] = False
    return Example(answer.place, (TokenSequence(ids, mask),), answer.target)
