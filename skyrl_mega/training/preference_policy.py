"""A policy that learns from preferences: `Policy` with a loss of answers instead of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from skyrl_mega.algorithms.loss import LossStats
from skyrl_mega.algorithms.preference.answers import answers_of
from skyrl_mega.algorithms.preference.losses import preference_loss, preference_metrics
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.training.logprobs import head_logprobs
from skyrl_mega.training.policy import Policy, sequences_of
from skyrl_mega.types import Metrics, MicroBatch, RowBatch, TrainBatch
from skyrl_mega_kernels.backends import backends_that_ran

if TYPE_CHECKING:
    from skyrl_mega.config.offline_schema import PreferenceConfig
    from skyrl_mega.config.schema import Config
    from skyrl_mega.parallel.topology import Topology


class PreferencePolicy(Policy):
    """Takes `RowBatch`es whose groups are rows (`balance_and_pack(keep_groups=True)`). Every method is called by all ranks."""

    preference: PreferenceConfig

    @classmethod
    def learning_from(cls, settings: PreferenceConfig, config: Config, topology: Topology) -> PreferencePolicy:
        """The policy with the weights of `config.model.path`, trained as `settings` say."""
        policy = cls.from_hf(config, topology)
        policy.preference = settings
        return policy

    def evaluate(self, batch: RowBatch) -> dict[str, float]:
        """The loss's sums over the whole batch under the current weights, for `preference_metrics`."""
        logprobs = self.compute_logprobs(batch)
        totals: dict[str, float] = {}
        for micro_batch, logprobs_T in zip(batch.micro_batches, logprobs, strict=True):
            answers = answers_of(
                logprobs_T,
                micro_batch.loss_mask,
                Sequences.packed(micro_batch.cu_seqlens),
                micro_batch.sample_index,
                targets_N=_targets(batch),
                ref_sums_N=batch.ref_logprobs,
            )
            _, sums = preference_loss(self.preference, answers, kl_baseline=batch.kl_baseline)
            totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
        # Context-parallel ranks all have the whole micro-batch: each number is counted as often as the rows are.
        return self.topology.all_reduce_metrics(totals)

    def _loss(self, batch: TrainBatch, micro_batch: MicroBatch, hidden_TH: torch.Tensor) -> tuple:
        """(objective, token count, statistics): the triple that Megatron's schedule expects of a loss function."""
        assert isinstance(batch, RowBatch)
        self._gather_head()
        head = head_logprobs(hidden_TH, self.chunks[-1], micro_batch, self.config, self.topology)
        answers = answers_of(
            head.logprobs,
            micro_batch.loss_mask,
            sequences_of(micro_batch, self.topology),
            whole_sample_index(micro_batch),
            targets_N=_targets(batch),
            ref_sums_N=batch.ref_logprobs,
        )
        loss_R, sums = preference_loss(self.preference, answers, kl_baseline=batch.kl_baseline)
        # Every context-parallel rank has the whole loss, and gradients are added up over them.
        share = 1.0 / self.topology.cp_size
        loss = loss_R.sum() * (share / batch.num_groups)
        if self.config.parallel.overlap_grad_reduce:
            loss.register_hook(self._announce_head_gradient)
        stats = LossStats({name: value * share for name, value in sums.items()}, {})
        return loss, torch.zeros([], dtype=torch.int, device=hidden_TH.device), stats

    def _reduce(self, outputs: Sequence[LossStats]) -> Metrics:
        """The statistics of all micro-batches of all data- and context-parallel ranks, and which kernels ran. Last stage only."""
        sums = {name: sum(float(out.sums[name]) for out in outputs) for name in outputs[0].sums}
        kernels = {f"kernels/{operator}/{backend}": 1.0 for operator, ran in backends_that_ran().items() for backend in ran}
        return preference_metrics(self.topology.all_reduce_metrics(sums)) | kernels


def whole_sample_index(micro_batch: MicroBatch) -> torch.Tensor:
    """int64 [S]: the sample of every whole sequence, also where this is a context-parallel rank's part of the micro-batch."""
    return micro_batch.sample_index if micro_batch.context is None else micro_batch.context.sample_index


def _targets(batch: RowBatch) -> torch.Tensor:
    assert batch.targets is not None
    return batch.targets
