"""Which experts a pass chose, kept with its micro-batches, so that the updates after it can replay them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from skyrl_mega.models.router import routers
from skyrl_mega.training.schedule import my_part, whole
from skyrl_mega.types import MicroBatch, TrainBatch

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


@contextmanager
def recorded_routing(chunks: Sequence[PolicyModel], batch: TrainBatch, config: Config, topology: Topology) -> Iterator[None]:
    """Fills routed_experts of the batch's micro-batches with what the one pass without gradient in the block chose. *All ranks.*

    The same on every rank of the model. In that pass the routers choose for themselves.
    """
    for micro_batch in batch.micro_batches:
        micro_batch.routed_experts = None
    for router in routers(chunks):
        router.choice.recorded = []
    try:
        yield
        with topology.deadline("routing"):
            # A chunk sees its micro-batches in their order, whatever the schedule.
            rows = [_whole_rows(chunks, number, mb, config, topology) for number, mb in enumerate(batch.micro_batches)]
    finally:
        for router in routers(chunks):
            router.choice.recorded = None
    for micro_batch, rows_TLK in zip(batch.micro_batches, rows, strict=True):
        micro_batch.routed_experts = rows_TLK


def _whole_rows(
    chunks: Sequence[PolicyModel], number: int, micro_batch: MicroBatch, config: Config, topology: Topology
) -> torch.Tensor:
    """int16 [T, layers, K] on CPU, from what every stage's layers chose for every rank's tokens."""
    architecture = chunks[0].architecture
    assert architecture.experts is not None  # or there were nothing to replay
    part = my_part(micro_batch, config, topology)
    splits_tokens = config.parallel.sequence_parallel and topology.tp_size > 1
    num_rows = -(-part.num_tokens // topology.tp_size) if splits_tokens else part.num_tokens
    # int32: not every backend of torch.distributed adds smaller ones.
    shape = (num_rows, architecture.num_layers, architecture.experts.per_token)
    rows_TLK = torch.zeros(shape, dtype=torch.int32, device=topology.device)
    for router in routers(chunks):
        rows_TLK[:, router.layer_number - 1] = router.choice.recorded[number].int()
    if topology.pp_size > 1:
        dist.all_reduce(rows_TLK, group=topology.pp_group)
    if splits_tokens:
        gathered = rows_TLK.new_empty(topology.tp_size * num_rows, *shape[1:])
        dist.all_gather_into_tensor(gathered, rows_TLK, group=topology.tp_group)
        rows_TLK = gathered[: part.num_tokens]
    return whole(rows_TLK, part, topology).to(torch.int16).cpu()
