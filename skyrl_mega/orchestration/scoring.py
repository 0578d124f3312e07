"""What models say of a step's samples before their advantages are known: logprobs of policy, reference and teacher, values.

Only for algorithms that need it (`advantages.needs`): a critic's values, a KL penalty inside the reward, a teacher. Others
compute what the loss needs later, on the packed updates, where samples without an advantage cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from skyrl_mega.algorithms.advantages import needs
from skyrl_mega.data.packing import balance_and_pack, unpack_states
from skyrl_mega.orchestration.served_teacher import ServedTeacher
from skyrl_mega.orchestration.step_recorder import gather_rows
from skyrl_mega.training.reference import ReferenceModel
from skyrl_mega.training.schedule import packing_multiples
from skyrl_mega.types import TrainBatch, TrainSample

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.orchestration.loop import Parts
    from skyrl_mega.parallel.topology import Topology


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
    }
    chosen = {name: compute for name, compute in passes.items() if name in wanted and compute is not None}
    critic = parts.critic if "values" in wanted else None
    # A critic is asked for the state after the last token too, which no branch of a shared prompt holds.
    share_prompts = parts.share_prompts and critic is None
    batch = None
    for name, compute in chosen.items():
        batch = batch or _pack_all(parts.config, parts.topology, samples, share_prompts=share_prompts)
        _fill(name, gather_rows(compute(batch), batch, samples, parts.topology), samples)
    if critic is not None:
        if batch is None or critic.topology is not parts.topology:
            batch = _pack_all(critic.config, critic.topology, samples, share_prompts=False)
        values = critic.compute_values(batch)
        _fill("values", gather_rows(values, batch, samples, critic.topology, unpack_states), samples)


def _fill(name: str, rows: Mapping[int, torch.Tensor], samples: Sequence[TrainSample]) -> None:
    for sample in samples:
        setattr(sample, name, rows[sample.sample_index])


def _pack_all(config: Config, topology: Topology, samples: Sequence[TrainSample], *, share_prompts: bool) -> TrainBatch:
    return balance_and_pack(
        [replace(sample, advantages=torch.zeros(sample.num_tokens)) for sample in samples],
        tokens_per_micro_batch=config.trainer.tokens_per_micro_batch,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        skip_zero_advantage=False,
        share_prompts=share_prompts,
        **packing_multiples(config, topology),
    )
