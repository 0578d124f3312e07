"""On-policy distillation with the gradient of a divergence: the student against its teacher's likeliest tokens.

Shape letters: T packed tokens of one micro-batch, K of the teacher's tokens at each.

At each position the teacher's K likeliest tokens are K outcomes, and all other tokens are one more, the rest: two distributions
over K + 1 outcomes. Merging outcomes never raises a divergence of this family (the data-processing inequality), so the loss is a
lower bound of the one over the whole vocabulary, 0 where the student is right about the K tokens, and equal to it where K is the
vocabulary. Renormalising over the K tokens instead would not tell a student that puts little mass on all of them.
"""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.log_ratio import masked_log_ratio
from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput
from skyrl_mega.errors import ConfigError


@POLICY_LOSSES.register("distill_topk", needs=frozenset({"teacher_topk"}), scales_with_advantage=False)
def distill_topk(inputs: LossInputs, *, beta: float = 1.0, coef: float = 1.0) -> LossOutput:
    """coef x D(teacher, student) per token, over the teacher's top-k tokens and the rest; no advantage has a part in it.

    P is the teacher's distribution over the K tokens and the rest, Q the student's, M = beta P + (1 - beta) Q:

        beta = 0        KL(P || Q), forward: the student covers what the teacher may say
        beta = 1        KL(Q || P), reverse: the student stays with what the teacher does say (the default)
        in between      beta KL(P || M) + (1 - beta) KL(Q || M), the generalised Jensen-Shannon divergence

    Nothing is differentiated through the sampling of the tokens. The rest of a distribution counts as at least the resolution of
    its dtype (1.2e-7 in float32): where the teacher is surer than that, the reverse KL is a little smaller than it should be.

    Every token is computed, whatever its reward: `algorithm.advantage` is not looked at. Stale samples only change which states
    are visited, never the target at a state, so that this loss minds them least. Use it where a teacher's distributions can be
    had: it learns more from each token than `advantage=distill`.

    Statistics: `teacher_divergence` without coef, `teacher_mass` and `student_mass` (probability of the K tokens), ratio and
    approx_kl of the policy to the one before the step's first update. Raises ConfigError for a beta outside [0, 1].
    Source: GKD, arXiv:2306.13649 equation 1, with beta as there (and in TRL).
    """
    if not 0.0 <= beta <= 1.0:
        raise ConfigError(f"`algorithm.loss_options.beta` must lie in [0, 1]; got {beta}. 0 is forward, 1 reverse KL.")
    if not coef > 0.0:
        raise ConfigError(f"`algorithm.loss_options.coef` must be above 0; got {coef}.")
    if inputs.topk_logprobs is None or inputs.teacher_topk_logprobs is None:
        raise ConfigError(
            "algorithm.policy_loss=distill_topk needs the teacher's top-k tokens; set teacher.path and teacher.topk."
        )
    mask_T, teacher_TK = inputs.loss_mask, inputs.teacher_topk_logprobs.to(inputs.topk_logprobs.dtype)
    is_there_TK = mask_T[:, None] & teacher_TK.isfinite()
    teacher_TO = _with_rest(teacher_TK, is_there_TK)
    student_TO = _with_rest(inputs.topk_logprobs, is_there_TK)
    is_there_TO = torch.cat([is_there_TK, mask_T[:, None]], dim=1)
    divergence_T = _divergence(teacher_TO, student_TO, is_there_TO, beta)

    log_ratio_T = masked_log_ratio(inputs.logprobs.detach(), inputs.old_logprobs, mask_T)
    with torch.no_grad():
        stats = {
            "ratio": torch.where(mask_T, log_ratio_T.exp(), 0.0),
            "approx_kl": log_ratio_T.expm1() - log_ratio_T,
            "teacher_divergence": divergence_T.detach(),
            "teacher_mass": torch.where(mask_T, -teacher_TO[:, -1].expm1(), 0.0),
            "student_mass": torch.where(mask_T, -student_TO[:, -1].expm1(), 0.0),
        }
    return coef * divergence_T, stats


def _with_rest(logprobs_TK: torch.Tensor, is_there_TK: torch.Tensor) -> torch.Tensor:
    """[T, K + 1]: log-probabilities of the K tokens (0 where there is none) and of all other tokens together.

    Rounding may take the sum of the K a little above 1, and log(1 - 1) has no gradient: the rest is at least an eps.
    """
    eps = torch.finfo(logprobs_TK.dtype).eps
    mass_T = torch.where(is_there_TK, logprobs_TK, float("-inf")).exp().sum(dim=1)
    rest_T = (1.0 - mass_T).clamp(min=eps).log()
    return torch.cat([torch.where(is_there_TK, logprobs_TK, 0.0), rest_T[:, None]], dim=1)


def _divergence(teacher_TO: torch.Tensor, student_TO: torch.Tensor, is_there_TO: torch.Tensor, beta: float) -> torch.Tensor:
    """[T]: the generalised Jensen-Shannon divergence of log-probabilities over the outcomes that are there."""
    if beta == 0.0:
        terms_TO = teacher_TO.exp() * (teacher_TO - student_TO)
    elif beta == 1.0:
        terms_TO = student_TO.exp() * (student_TO - teacher_TO)
    else:
        weights = torch.tensor([beta, 1.0 - beta], dtype=teacher_TO.dtype, device=teacher_TO.device).log()
        mixture_TO = torch.logaddexp(teacher_TO + weights[0], student_TO + weights[1])
        terms_TO = beta * teacher_TO.exp() * (teacher_TO - mixture_TO) + (1 - beta) * student_TO.exp() * (student_TO - mixture_TO)
    return torch.where(is_there_TO, terms_TO, 0.0).sum(dim=1)
