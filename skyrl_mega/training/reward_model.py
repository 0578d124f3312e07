"""A reward model: the policy's kind of model with a score in the place of the LM head, read after an answer's last token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from skyrl_mega.algorithms.preference.answers import answers_of
from skyrl_mega.algorithms.preference.reward_losses import reward_loss, reward_metrics
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.config.learning_rate import policy_updates
from skyrl_mega.errors import NonFiniteUpdateError
from skyrl_mega.training.expert_load import expert_load_metrics
from skyrl_mega.training.policy import sequences_of
from skyrl_mega.training.preference_policy import whole_sample_index
from skyrl_mega.training.schedule import forward_per_token
from skyrl_mega.training.trainable import Trainable
from skyrl_mega.types import Metrics, MicroBatch, RowBatch

if TYPE_CHECKING:
    from skyrl_mega.config.offline_schema import RewardModelConfig
    from skyrl_mega.config.schema import Config
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


def random_head(hidden_size: int, seed: int) -> torch.Tensor:
    """float32 [1, hidden_size], of variance 1 / (hidden_size + 1) as in arXiv:2009.01325; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1) ** 0.5


def _add_adapter(chunks: list[PolicyModel], config: Config, topology: Topology) -> str:
    """The name of the adapter that is now beside the model, filled from `lora.path` if that is given."""
    from skyrl_mega.models.lora import DEFAULT, Adapters
    from skyrl_mega.models.lora_weights import load_adapter

    adapters = Adapters(chunks, config.model.path, topology)
    adapters.add(DEFAULT, config.lora, seed=config.trainer.seed)
    if config.lora.path:
        load_adapter(adapters, DEFAULT, config.lora.path)
    return DEFAULT


class RewardModel(Trainable):
    """Scores of sequences, and updates towards what rows say of them. Every method is called by all ranks.

    Takes `RowBatch`es whose sequences have one token more, the only one with a loss mask: the position before it is read. The
    weights go in and out as Hugging Face's sequence classification with one label.
    """

    settings: RewardModelConfig

    @classmethod
    def learning_from(cls, settings: RewardModelConfig, config: Config, topology: Topology) -> RewardModel:
        """The model with the weights of `config.model.path`; a random head by `trainer.seed` where that has no `score.weight`.

        (With a head of zeros the rest of the model would have no gradient at first.) With `lora.rank` > 0 an adapter and the head
        are trained, and the rest is frozen.
        """
        from skyrl_mega.models.build import build_model
        from skyrl_mega.models.hf_io import SCORE, load_hf_weights, read_headers
        from skyrl_mega.models.value import ValueModel

        chunks = build_model(config, topology, ValueModel)
        load_hf_weights(chunks, config.model.path, topology)
        if chunks[-1].post_process and SCORE not in read_headers(config.model.path):
            weight = chunks[-1].output_layer.weight
            with torch.no_grad():
                weight.copy_(random_head(weight.size(1), config.trainer.seed))
        adapter = _add_adapter(chunks, config, topology) if config.lora.rank > 0 else None
        model = cls(config, topology, chunks, adapter=adapter)
        model.settings = settings
        return model

    def _plan_updates(self, config: Config) -> int:
        return policy_updates(config, has_critic=False)

    def compute_scores(self, batch: RowBatch) -> list[torch.Tensor]:
        """The score at every position under the current weights: one float32 [T] on CPU per micro-batch, on every rank."""
        self._complete_weights()
        return forward_per_token(self.chunks, batch, self.config, self.topology, lambda scores_T, _: scores_T, phase="scores")

    def evaluate(self, batch: RowBatch) -> dict[str, float]:
        """The loss's sums over the whole batch under the current weights, for `reward_metrics`."""
        totals: dict[str, float] = {}
        assert batch.targets is not None
        for micro_batch, scores_T in zip(batch.micro_batches, self.compute_scores(batch), strict=True):
            sequences = Sequences.packed(micro_batch.cu_seqlens)
            answers = answers_of(scores_T, micro_batch.loss_mask, sequences, micro_batch.sample_index, targets_N=batch.targets)
            _, sums = reward_loss(self.settings, answers)
            totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
        return self.topology.all_reduce_metrics(totals)

    def train_step(self, batch: RowBatch) -> Metrics:
        """One optimizer update over all micro-batches; returns numbers reduced over the global batch.

        Raises NonFiniteUpdateError on every rank, with weights and optimizer untouched, if the loss or the gradient norm is not
        finite.
        """
        outputs = self._accumulate_gradients(batch, partial(self._loss, batch))
        metrics = self.topology.from_last_stage(self._reduce(outputs) if outputs else None, phase="loss")
        metrics |= expert_load_metrics(self.chunks, self.topology)  # which also empties the routers' counts
        if not math.isfinite(metrics["loss/total"]):
            parts = {name: value for name, value in metrics.items() if name.startswith("loss/")}
            raise NonFiniteUpdateError(f"the loss of update {self.num_updates} is not finite; the step was not applied: {parts}")
        grad_norm, lr = self._apply_gradients()
        return metrics | {"update/grad_norm": grad_norm, "update/lr": lr, "update/skipped": 0.0}

    def _loss(self, batch: RowBatch, micro_batch: MicroBatch, scores_T: torch.Tensor) -> tuple:
        """(objective, token count, statistics): the triple that Megatron's schedule expects of a loss function."""
        assert batch.targets is not None
        answers = answers_of(
            scores_T,
            micro_batch.loss_mask,
            sequences_of(micro_batch, self.topology),
            whole_sample_index(micro_batch),
            targets_N=batch.targets,
        )
        loss_R, sums = reward_loss(self.settings, answers)
        # Every context-parallel rank has the whole loss, and gradients are added up over them.
        share = 1.0 / self.topology.cp_size
        stats = {name: value * share for name, value in sums.items()}
        loss = loss_R.sum() * (share / batch.num_groups)
        return loss, torch.zeros([], dtype=torch.int, device=scores_T.device), stats

    def _reduce(self, outputs: Sequence[dict[str, torch.Tensor]]) -> Metrics:
        """The statistics of all micro-batches of all data- and context-parallel ranks. Last stage only."""
        sums = {name: sum(float(output[name]) for output in outputs) for name in outputs[0]}
        return reward_metrics(self.topology.all_reduce_metrics(sums))
