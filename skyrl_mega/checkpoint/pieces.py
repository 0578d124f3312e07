"""Which pieces of the whole state this rank writes, and where they are kept while they are written.

Megatron's sharded state says of every tensor which block of which global tensor it is, and which of several copies. Of each
block exactly one rank writes: copies over tensor and pipeline ranks are left to the first, copies over data-parallel ranks are
dealt out evenly. All ranks of a data-parallel group see the same blocks in the same order, so they agree without a message.
"""

from __future__ import annotations

import ctypes
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

_ALIGNMENT = 64


@dataclass(frozen=True)
class Piece:
    """A block of a global tensor (`value`: a contiguous tensor), or an object (`value`: bytes; offset and sizes are empty)."""

    key: str
    offset: tuple[int, ...]
    global_size: tuple[int, ...]
    value: torch.Tensor | bytes

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if isinstance(self.value, torch.Tensor) else ()

    @property
    def dtype(self) -> torch.dtype | None:
        return self.value.dtype if isinstance(self.value, torch.Tensor) else None

    @property
    def size_bytes(self) -> int:
        return self.value.nbytes if isinstance(self.value, torch.Tensor) else len(self.value)


def pieces_to_write(state: dict[str, Any]) -> list[Piece]:
    """The pieces of a sharded state that are this rank's to write, in an order that depends on nothing but the state.

    The state is of one layout, which is in force.

    Tensors share memory with the state. Those of a part whose name ends in `model` have copies over data-parallel ranks, which
    are dealt out; of the rest the first copy is written.
    """
    pieces: list[Piece] = []
    deal = _Deal()
    for name, part in state.items():
        for entry, owner in _blocks(part):
            first, copy = _copy_of(entry.replica_id)
            is_dealt = name.endswith("model") and isinstance(entry.data, torch.Tensor)
            writer = deal.writer(entry, is_expert=not getattr(owner, "allreduce", True)) if is_dealt else 0
            if first and copy == writer:
                pieces.append(_piece(entry))
    return pieces


def _blocks(part: Any) -> Iterator[tuple[Any, Any]]:
    """(ShardedTensor or ShardedObject, the parameter it is cut from) of everything in a nested sharded state."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    # A lone object (the random states) is no container that nested_values would enter.
    for entry in nested_values({"": part}):
        if isinstance(entry, ShardedTensorFactory):
            yield from ((block, entry.data) for block in nested_values(entry.build()))
        elif isinstance(entry, (ShardedTensor, ShardedObject)):
            yield entry, entry.data


def _copy_of(replica_id: int | tuple[int, ...]) -> tuple[bool, int]:
    """(whether it is the first copy over tensor and pipeline ranks, the number of the copy over data-parallel ranks)."""
    if isinstance(replica_id, int):
        return True, replica_id
    return not any(replica_id[:-1]), replica_id[-1]


class _Deal:
    """Deals blocks out to data-parallel ranks: each to the rank that has least to write so far."""

    def __init__(self) -> None:
        self._load: dict[int, list[int]] = defaultdict(list)

    def writer(self, block: Any, *, is_expert: bool) -> int:
        """The data-parallel rank that writes `block`. Called for every block, on every rank, in the same order."""
        from megatron.core import parallel_state

        size = (
            parallel_state.get_expert_data_parallel_world_size()
            if is_expert
            else parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        )
        load = self._load[is_expert]
        load.extend([0] * (size - len(load)))
        writer = load.index(min(load))
        load[writer] += block.data.nbytes
        return writer


def _piece(entry: Any) -> Piece:
    if not isinstance(entry.data, torch.Tensor):
        packed = io.BytesIO()
        torch.save([entry.data], packed)  # a list, as Megatron's loader expects
        return Piece(entry.unique_key, (), (), packed.getvalue())
    value = entry.data.detach()
    value = value.view((1,) * entry.prepend_axis_num + tuple(value.shape)).contiguous()
    return Piece(entry.key, tuple(entry.global_offset), tuple(entry.global_shape), value)


# ---- host memory ----------------------------------------------------------------------------------------------------------


class HostCopy:
    """Memory that a rank's pieces are copied to, so that training can change the originals while the copy is written.

    Allocated at the first copy and kept: later copies touch no new page, the memory of a run does not creep. Page-locked where
    pieces come from a GPU.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def size_bytes(self) -> int:
        return self._buffer.nbytes

    def of(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces, with values in this memory; good until the next call."""
        starts, end = [], 0
        for piece in pieces:
            starts.append(end)
            end += -(-piece.size_bytes // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(isinstance(piece.value, torch.Tensor) and piece.value.is_cuda for piece in pieces)
        if end > self._buffer.nbytes:
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        copies = []
        for piece, start in zip(pieces, starts, strict=True):
            if isinstance(piece.value, bytes):
                copies.append(piece)
                continue
            room = self._buffer[start : start + piece.size_bytes].view(piece.value.dtype).view(piece.value.shape)
            room.copy_(piece.value, non_blocking=True)
            copies.append(replace(piece, value=room))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def own_storage(value: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, in a storage that holds nothing else: torch.save writes a tensor's whole storage.

    A contiguous CPU tensor is not copied; the caller keeps it alive.
    """
    value = value.detach().cpu().contiguous()
    if value.numel() == 0 or value.untyped_storage().nbytes() == value.nbytes:
        return value
    memory = (ctypes.c_byte * value.nbytes).from_address(value.data_ptr())
    return torch.frombuffer(memory, dtype=value.dtype).view(value.shape)
