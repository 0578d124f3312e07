"""One pass over a batch's micro-batches: what each rank computes of them, through Megatron's schedule for the layout.

Policy, reference and critic all take this way, with and without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from skyrl_mega.data.context_shards import context_part
from skyrl_mega.types import MicroBatch, TrainBatch

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


#: Tokens of a rank's matrix products come in multiples of this, by recipe of `model.fp8`.
FP8_TOKENS = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}

#: (what the last stage's model gave, the rank's part of the micro-batch) -> a number, or a row of numbers, for each of its
#: tokens.
PerToken = Callable[[torch.Tensor, MicroBatch], torch.Tensor]


def packing_multiples(config: Config, topology: Topology) -> dict[str, int]:
    """What the layout asks of `balance_and_pack`: tokens per micro-batch, and micro-batches per update, in multiples."""
    return {
        # Context-parallel ranks pad their parts themselves.
        "pad_to_multiple": _token_multiple(config, topology) if topology.cp_size == 1 else 1,
        # The interleaved schedule sends micro-batches through the stages in groups of the pipeline's size.
        "micro_batch_multiple": topology.pp_size if config.parallel.virtual_pipeline > 1 else 1,
    }


def _token_multiple(config: Config, topology: Topology) -> int:
    """The number of tokens that a rank computes at once must be a multiple of this."""
    return (topology.tp_size if config.parallel.sequence_parallel else 1) * FP8_TOKENS.get(config.model.fp8, 1)


def my_part(micro_batch: MicroBatch, config: Config, topology: Topology) -> MicroBatch:
    """What this context-parallel rank computes of the micro-batch, on its device."""
    multiple = _token_multiple(config, topology)
    return to_device(context_part(micro_batch, topology.cp_rank, topology.cp_size, pad_to_multiple=multiple), topology.device)


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch with its tensors on `device`."""
    tensors = {f.name: getattr(micro_batch, f.name) for f in fields(micro_batch)}
    moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    return replace(micro_batch, **moved)


def whole(values_T: torch.Tensor, part: MicroBatch, topology: Topology) -> torch.Tensor:
    """A value for each token of the whole micro-batch, in its order, from those of every rank's part. *All context ranks.*"""
    if part.context is None:
        return values_T
    places = part.context.key_places[: part.context.num_tokens].to(values_T.device)
    return topology.gather_context(values_T)[places]


def run_schedule(
    chunks: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], forward_step: Any, *, forward_only: bool
) -> list:
    """Megatron's forward-backward schedule over the micro-batches; returns the loss functions' third results.

    `chunks` are this rank's, wrapped or not; with several of them it is the interleaved schedule, arXiv:2104.04473.

    Only the last pipeline stage has a loss: the list is empty on the others.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=max(mb.num_tokens for mb in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def forward_per_token(
    chunks: Sequence[PolicyModel], batch: TrainBatch, config: Config, topology: Topology, per_token: PerToken, *, phase: str
) -> list[torch.Tensor]:
    """`per_token` of every micro-batch without gradient: one [T] or [T, ...] on CPU each, whole on every rank of the model.

    *All ranks.* Every context-parallel rank gets all T of them, every pipeline stage those of the last.
    """
    from skyrl_mega.models.build import forward_hidden

    if not batch.micro_batches:
        return []

    def forward_step(micro_batches: Iterator[MicroBatch], module: torch.nn.Module) -> tuple:
        topology.progress()
        micro_batch = my_part(next(micro_batches), config, topology)

        def collect(output: torch.Tensor) -> tuple:
            values_T = whole(per_token(output, micro_batch), micro_batch, topology)
            return output, torch.zeros([], dtype=torch.int, device=output.device), values_T.cpu()

        return forward_hidden(module, micro_batch), collect

    with torch.no_grad(), topology.deadline(phase):
        values = run_schedule(chunks, batch.micro_batches, forward_step, forward_only=True)
    return topology.from_last_stage(values, phase=phase)
