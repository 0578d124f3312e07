"""Our top-k distillation beside TRL's GKD and verl's forward KL, on the same logits in float64.

Skipped where the peers are not installed (conftest.py).
"""

from __future__ import annotations

import pytest
import torch

from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.algorithms.policy_losses.distill import distill_topk

TOKENS, VOCABULARY = 12, 9


def distributions():
    """(student's, teacher's) logits, float64 [TOKENS, VOCABULARY]."""
    return (2.0 * torch.randn(2, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).unbind()


def ours(student, teacher, k, beta):
    """The loss of each token over the teacher's k likeliest, and the log-probabilities there: teacher's, student's."""
    top = teacher.log_softmax(-1).topk(k, dim=-1)
    at = student.log_softmax(-1).gather(1, top.indices)
    zeros = torch.zeros(TOKENS, dtype=torch.float64)
    inputs = LossInputs(*(zeros,) * 4, torch.ones(TOKENS, dtype=torch.bool), topk_logprobs=at, teacher_topk_logprobs=top.values)
    return distill_topk(inputs, beta=beta)[0], top.values, at


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_over_the_whole_vocabulary_it_is_trls_generalised_divergence(beta):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student, teacher = distributions()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="sum")
    loss, _, _ = ours(student, teacher, VOCABULARY, beta)
    assert float(loss.sum()) == pytest.approx(float(theirs), rel=1e-6)


def test_verl_sums_over_the_top_k_only_and_we_add_what_the_rest_says():
    """Without the rest a student is not told that it puts too much mass elsewhere, and the sum may fall below 0."""
    verl = pytest.importorskip("verl.trainer.distillation.fsdp.losses")
    _, teacher = distributions()
    student = 3.0 * teacher  # surer of the teacher's favourites than the teacher is
    loss, teacher_top, student_top = ours(student, teacher, 3, 0.0)
    theirs = verl.kl_divergence(log_q=student_top, log_p=teacher_top)
    p, q = (1.0 - logprobs.exp().sum(1) for logprobs in (teacher_top, student_top))
    torch.testing.assert_close(loss, theirs.double() + p * (p / q).log(), rtol=1e-6, atol=1e-6)
    assert float(theirs.min()) < 0.0 <= float(loss.min())
