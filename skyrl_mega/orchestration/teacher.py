"""The teacher of on-policy distillation: which algorithms want one, and what it says of a step's batches.

A teacher's logprobs of the sampled tokens come before advantages (`scoring.score_samples`); its likeliest tokens are needed by a
loss only, and come with the packed updates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skyrl_mega.algorithms.advantages import needs
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES
from skyrl_mega.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skyrl_mega.config.schema import AlgorithmConfig, Config
    from skyrl_mega.orchestration.served_teacher import ServedTeacher
    from skyrl_mega.training.reference import ReferenceModel
    from skyrl_mega.types import TrainBatch


def wants_topk(algorithm: AlgorithmConfig) -> bool:
    """Whether the policy loss compares the policy with the teacher's likeliest tokens."""
    return "teacher_topk" in POLICY_LOSSES.find(algorithm.policy_loss).traits["needs"]


def wants_teacher(algorithm: AlgorithmConfig) -> bool:
    return wants_topk(algorithm) or "teacher_logprobs" in needs(algorithm)


def check_teacher(config: Config) -> None:
    """Raises ConfigError where the algorithm asks for a teacher that is not named, or a teacher is named that nothing asks.

    Whether the model can teach this policy is for `validate` to say.
    """
    algorithm, teacher = config.algorithm, config.teacher
    chosen = f"`algorithm.advantage` is {algorithm.advantage} and `algorithm.policy_loss` is {algorithm.policy_loss}"
    if wants_teacher(algorithm) and not teacher.path:
        raise ConfigError(f"Distillation needs a teacher; {chosen}, and `teacher.path` is empty. Set it to a model's directory.")
    if wants_topk(algorithm) and teacher.topk < 1:
        raise ConfigError(
            f"`algorithm.policy_loss` ({algorithm.policy_loss}) compares the teacher's likeliest tokens; `teacher.topk` is 0. Set"
            " `teacher.topk=64`."
        )
    if teacher.path and not wants_teacher(algorithm):
        raise ConfigError(
            f"`teacher.path` is {teacher.path}, and nothing asks a teacher: {chosen}. Set `algorithm.advantage=distill` or"
            " `algorithm.policy_loss=distill_topk`, or leave the teacher out."
        )


def fill_teacher_topk(
    teacher: ReferenceModel | ServedTeacher | None, batches: Sequence[TrainBatch], config: Config, *, vocab_size: int
) -> None:
    """Puts the teacher's likeliest tokens into every micro-batch, where the loss wants them. *All ranks.*

    `vocab_size`: the policy's.
    """
    if teacher is None or not wants_topk(config.algorithm):
        return
    for batch in batches:
        found = teacher.compute_topk(batch, config.teacher.topk, vocab_size=vocab_size)
        for micro_batch, (ids_TK, logprobs_TK) in zip(batch.micro_batches, found, strict=True):
            micro_batch.teacher_topk_ids, micro_batch.teacher_topk_logprobs = ids_TK, logprobs_TK
