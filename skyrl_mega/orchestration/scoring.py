"""What models say of a step's samples before their advantages are known: logprobs of policy, reference and teacher, values.

Only for algorithms that need it (`advantages.needs`): a critic's values, a KL penalty inside the reward, a teacher. Others
compute what the loss needs later, on the packed updates, where samples without an advantage cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from skyrl_mega.algorithms.advantages import needs
from skyrl_mega.data.packing import balance_and_pack, unpack, unpack_states
from skyrl_mega.orchestration.served_teacher import ServedTeacher
from skyrl_mega.orchestration.step_recorder import gather_rows
from skyrl_mega.training.reference import ReferenceModel
from skyrl_mega.training.schedule import packing_multiples
from skyrl_mega.types import TrainBatch, TrainSample

if TYPE_CHECKING:
    from skyrl_mega.orchestration.loop import Parts


def score_samples(parts: Parts, samples: Sequence[TrainSample]) -> None:
    """Fills those of old_logprobs, ref_logprobs, teacher_logprobs and values that the advantages need. *All ranks.*

    A teacher behind a server is asked here for all that the step wants of it.
    """
    wanted = needs(parts.config.algorithm)
    loaded_teacher = parts.teacher if isinstance(parts.teacher, ReferenceModel) else None
    if isinstance(parts.teacher, ServedTeacher):
        parts.teacher.ask(samples)
    passes = {
        "old_logprobs": parts.policy.compute_logprobs,
        "ref_logprobs": parts.reference.compute_logprobs if parts.reference is not None else None,
        "teacher_logprobs": loaded_teacher.compute_logprobs if loaded_teacher is not None else None,
        "values": parts.critic.compute_values if parts.critic is not None else None,
    }
    chosen = {name: compute for name, compute in passes.items() if name in wanted and compute is not None}
    if not chosen:
        return
    # A critic is asked for the state after the last token too, which no branch of a shared prompt holds.
    batch = _pack_all(parts, samples, share_prompts=parts.share_prompts and "values" not in chosen)
    for name, compute in chosen.items():
        rows = gather_rows(compute(batch), batch, samples, parts.topology, unpack_states if name == "values" else unpack)
        for sample in samples:
            setattr(sample, name, rows[sample.sample_index])


def _pack_all(parts: Parts, samples: Sequence[TrainSample], *, share_prompts: bool) -> TrainBatch:
    topology = parts.topology
    return balance_and_pack(
        [replace(sample, advantages=torch.zeros(sample.num_tokens)) for sample in samples],
        tokens_per_micro_batch=parts.config.trainer.tokens_per_micro_batch,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        skip_zero_advantage=False,
        share_prompts=share_prompts,
        **packing_multiples(parts.config, topology),
    )
