"""What an objective has beside its policy loss: KL to the reference, entropy, and how far engine and trainer are apart.

The definitions are torch's; kernels compute the same sums in one pass (`skyrl_mega_kernels.loss_terms`), and are tested against
them. Shape letters: T packed tokens of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skyrl_mega.algorithms.kl import KL_ESTIMATORS, k1, k3
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.algorithms.registry import lookup
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.errors import ConfigError
from skyrl_mega_kernels.loss_terms import LossTermTokens, loss_terms

#: The weight of the tokens that were computed; below 1 where samples were left out.
WEIGHT_SUM = "weight/sum"
#: Names of the sums in what is reported. With the engine as the sampler the mismatch is KL(engine || trainer), once with little
#: noise and once as the plain mean of log-ratios.
REPORTED = {
    "kl": "policy/kl_ref",
    "entropy": "policy/entropy",
    "distance": "mismatch/abs_logprob_diff_mean",
    "mismatch_k3": "mismatch/kl",
    "mismatch_k1": "mismatch/kl_k1",
    "weight": WEIGHT_SUM,
}


@dataclass(frozen=True)
class Terms:
    """Scalars of one micro-batch: `loss` carries the gradient; `sums` and `maxima` as those of `LossStats`."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]


class LossTerms:
    """kl.coef x KL - entropy_coef x entropy as an AlgorithmConfig has them; `kernels` as the setting `model.kernels`.

    Raises ConfigError for an estimator that does not exist.
    """

    def __init__(self, config: AlgorithmConfig, kernels: str = "auto") -> None:
        self._config, self._kernels = config, kernels
        self._kl = lookup(KL_ESTIMATORS, config.kl.estimator, "algorithm.kl.estimator")
        #: The reference's KL is a term of the loss.
        self.has_kl = config.kl.coef != 0 and config.kl.place == "loss"

    def __call__(
        self, inputs: LossInputs, trainer_logprobs_T: torch.Tensor, weights_T: torch.Tensor, kl_coef: float | None = None
    ) -> Terms:
        """`trainer_logprobs_T` is what the engine's are compared with; `kl_coef` replaces `kl.coef`.

        Raises ConfigError for a term that is switched on and whose input is missing.
        """
        config = self._config
        kl_coef = config.kl.coef if kl_coef is None else kl_coef
        if self.has_kl and inputs.ref_logprobs is None:
            raise ConfigError(f"algorithm.kl.coef ({config.kl.coef}) needs ref_logprobs; run the reference model or set it to 0.")
        if inputs.entropy is None and config.entropy_coef != 0:
            raise ConfigError(f"algorithm.entropy_coef ({config.entropy_coef}) needs the entropy; compute it or set it to 0.")
        tokens = LossTermTokens(
            trainer_logprobs_T.detach(),
            inputs.rollout_logprobs,
            inputs.loss_mask,
            *((inputs.logprobs, inputs.ref_logprobs) if self.has_kl else (None, None)),
            entropy=inputs.entropy,
        )
        loss, sums, largest = loss_terms(
            lambda: self._define(tokens),
            tokens,
            weights_T,
            kl=config.kl.estimator if self.has_kl else None,
            kl_coef=kl_coef,
            entropy_coef=config.entropy_coef,
            backend=self._kernels,
        )
        reported = {REPORTED[name]: value for name, value in sums.items()}
        if self.has_kl:
            reported["loss/kl"] = kl_coef * sums["kl"]
        if config.entropy_coef != 0:
            reported["loss/entropy"] = -config.entropy_coef * sums["entropy"]
        return Terms(loss, reported, {"mismatch/abs_logprob_diff_max": largest})

    def _define(self, tokens: LossTermTokens) -> dict[str, torch.Tensor]:
        """Every sum of the kernels, token by token."""
        trainer_T, engine_T, mask_T = tokens.trainer_logprobs, tokens.rollout_logprobs, tokens.loss_mask
        values = {
            "distance": torch.where(mask_T, trainer_T - engine_T, 0.0).abs(),
            "mismatch_k3": k3(engine_T, trainer_T, mask_T),
            "mismatch_k1": k1(engine_T, trainer_T, mask_T),
        }
        if tokens.logprobs is not None and tokens.ref_logprobs is not None:
            values["kl"] = self._kl(tokens.logprobs, tokens.ref_logprobs, mask_T)
        if tokens.entropy is not None:
            values["entropy"] = torch.where(mask_T, tokens.entropy, 0.0)
        return values
