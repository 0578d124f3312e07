"""The objective of one micro-batch: policy loss + kl.coef x KL - entropy_coef x entropy, summed with global weights.

With `off_policy.stages` each token's policy loss is first multiplied by its importance weight (`off_policy/`).

Sums of micro-batches and ranks add up to the average over the whole update. Statistics come in four kinds:

- `loss/*`: parts of the loss; their SUM over micro-batches and ranks is the number to report.
- `policy/*`, `mismatch/*`, `off_policy/*`: averages over trained tokens. Their SUM is weighted like the loss, and samples that
  were left out of compute have no share in it: divide by the SUM of `weight/sum`, as `mean_stats` does.
- `off_policy/sequence/*`: averages over the sequences that were computed: divide by the SUM of `weight/sequences`.
- maxima: to be reduced with MAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from skyrl_mega.algorithms.off_policy import bind_stages, off_policy_correction
from skyrl_mega.algorithms.off_policy.weights import SEQUENCE_PREFIX, SEQUENCES, Correction, effective_shares
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES, LossInputs
from skyrl_mega.algorithms.policy_losses.sums import PolicyLossSums
from skyrl_mega.algorithms.terms import WEIGHT_SUM, LossTerms
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.errors import ConfigError
from skyrl_mega.types import Metrics


@dataclass(frozen=True)
class LossStats:
    """Detached scalars of one micro-batch: `sums` are reduced with SUM over micro-batches and ranks, `maxima` with MAX."""

    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]


class Objective:
    """The objective that an AlgorithmConfig describes, with names looked up and options bound. No communication of its own.

    Raises ConfigError for unknown names and options, and a stage that weighs what the loss weighs already.
    """

    def __init__(self, config: AlgorithmConfig, kernels: str = "auto") -> None:
        """`kernels`: the setting `model.kernels`."""
        self.config = config
        entry = POLICY_LOSSES.find(config.policy_loss)
        self._policy_loss_sums = PolicyLossSums(entry, config.loss_options, kernels)
        self._stages = bind_stages(config.off_policy.stages)
        weighing = [stage.name for stage in self._stages if stage.weighs]
        if entry.traits["against_sampler"] and weighing:
            raise ConfigError(
                f"`algorithm.policy_loss={config.policy_loss}` weighs tokens by policy / engine itself; the stage {weighing[0]}"
                " of `algorithm.off_policy.stages` would do so again. Leave it out."
            )
        if weighing and config.old_logprobs == "rollout":
            raise ConfigError(
                f"`algorithm.off_policy.stages` weighs by policy / engine ({weighing[0]}), and where `algorithm.old_logprobs` is"
                " rollout the loss's own ratio is that already: it would count twice. Set `algorithm.old_logprobs=policy`"
                " (decoupled PPO), or keep only stages that don't weigh (masks)."
            )
        self._terms = LossTerms(config, kernels)
        #: The reference's KL is a term of the loss.
        self.has_kl = self._terms.has_kl
        #: Further inputs of the policy loss: "teacher_topk".
        self.needs: frozenset[str] = entry.traits["needs"]
        #: Every token's part looks at that token only: the LM head and the loss may run chunk by chunk.
        self.token_separable = bool(entry.traits["token_separable"]) and all(stage.token_separable for stage in self._stages)

    def __call__(
        self, inputs: LossInputs, weights_T: torch.Tensor, *, kl_coef: float | None = None
    ) -> tuple[torch.Tensor, LossStats]:
        """(loss, statistics) of one micro-batch as weighted sums; the loss, a scalar, carries the gradient.

        weights_T float32 [T] from `reduction_weights`. `kl_coef` replaces `kl.coef` (an adaptive coefficient). `sums` holds
        loss/policy, loss/kl and loss/entropy with their coefficients applied, loss/total; policy/* of the policy loss,
        policy/entropy, policy/kl_ref where computed; mismatch/* between the engine's and the trainer's log-probabilities,
        off_policy/* where corrected, and weight/sum. The trainer's are the old ones; with `old_logprobs=rollout`, where those
        are the engine's, the current ones. Raises ConfigError for a term that is switched on and whose input is missing.
        """
        averages: dict[str, torch.Tensor] = {}
        of_sequences: dict[str, torch.Tensor] = {}
        loss_weights_T = weights_T
        if self._stages:
            correction = self._correct(inputs)
            loss_weights_T = weights_T * correction.weights_T
            averages |= correction.token_stats
            of_sequences = correction.sequence_sums
        policy_loss, policy_stats = self._policy_loss_sums(inputs, weights_T, loss_weights_T)
        terms = self._terms(inputs, self._trainer_logprobs(inputs), weights_T, kl_coef)
        loss_sum = policy_loss + terms.loss
        stats = {"loss/policy": policy_loss.detach(), "loss/total": loss_sum.detach()} | terms.sums
        stats.update({f"policy/{name}": value for name, value in policy_stats.items()})
        with torch.no_grad():
            stats.update({name: (value_T * weights_T).sum() for name, value_T in averages.items()})
        stats.update(of_sequences)
        return loss_sum, LossStats(stats, terms.maxima)

    def sequence_sums(self, inputs: LossInputs) -> dict[str, torch.Tensor]:
        """The `sums` of whole sequences that calls with chunks of tokens leave out: of a whole micro-batch, with `sequences`."""
        return self._correct(inputs).sequence_sums if self._stages else {}

    def _correct(self, inputs: LossInputs) -> Correction:
        return off_policy_correction(
            self._trainer_logprobs(inputs),
            inputs.rollout_logprobs,
            inputs.loss_mask,
            self._stages,
            inputs.sequences,
            inputs.staleness,
        )

    def _trainer_logprobs(self, inputs: LossInputs) -> torch.Tensor:
        """What the engine's log-probabilities are compared with."""
        return inputs.logprobs.detach() if self.config.old_logprobs == "rollout" else inputs.old_logprobs


def merge_stats(parts: Sequence[LossStats]) -> LossStats:
    """The statistics of parts of one micro-batch as those of the whole."""
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums}
    maxima = {name: torch.stack([part.maxima[name] for part in parts]).amax() for name in parts[0].maxima}
    return LossStats(sums, maxima)


def mean_stats(sums: Mapping[str, float]) -> Metrics:
    """Numbers to report from `LossStats.sums`, summed over all micro-batches and ranks.

    `loss/*` stay as they are; the others become averages over the tokens, or sequences, that were computed. `weight/*` stay too.
    Mean squares of off-policy weights become effective shares of the sample.
    """
    as_is = {name: float(value) for name, value in sums.items() if name.startswith(("loss/", "weight/"))}
    averages = {}
    for name, value in sums.items():
        if name not in as_is:
            count = as_is[SEQUENCES if name.startswith(SEQUENCE_PREFIX) else WEIGHT_SUM]
            averages[name] = float(value) / count if count > 0 else 0.0
    return {**as_is, **effective_shares(averages)}
