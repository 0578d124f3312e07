"""The bytes of a checkpoint: one file of tensors per rank, and the index that says where everything lies.

The format is that of torch.distributed.checkpoint as Megatron's `torch_dist` backend reads it:

    __3_0.distcp    the pieces that rank 3 wrote, one after the other, each as torch.save writes it
    .metadata       which pieces there are of each tensor, and their file, position and length
    common.pt       what is no tensor (nothing of ours)
    metadata.json   the name of the format

While it is written, each rank leaves `part_00003.pkl` when its file is complete and durable; rank 0 makes the index of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from skyrl_mega.checkpoint.manifest import FileRecord
from skyrl_mega.checkpoint.pieces import Piece, own_storage
from skyrl_mega.errors import CheckpointError

INDEX_FILE = ".metadata"
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class Entry:
    """Where a piece lies in its file. `dtype` is None for an object."""

    key: str
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    global_size: tuple[int, ...]
    dtype: torch.dtype | None
    position: int
    length: int


@dataclass(frozen=True)
class Part:
    """What one rank wrote."""

    file: FileRecord
    entries: list[Entry]


def write_part(directory: Path, rank: int, pieces: Sequence[Piece]) -> Part:
    """Writes a rank's pieces to its file, durably, and then the mark that says so. The same bytes for the same values."""
    name = f"__{rank}_0.distcp"
    entries: list[Entry] = []
    with open(directory / name, "wb", buffering=2**20) as raw:
        stream: Any = _HashingStream(raw)
        for piece in pieces:
            position = stream.tell()
            if isinstance(piece.value, bytes):
                stream.write(piece.value)
            else:
                torch.save(own_storage(piece.value), stream)
            entries.append(
                Entry(piece.key, piece.offset, piece.sizes, piece.global_size, piece.dtype, position, stream.tell() - position)
            )
        raw.flush()
        os.fsync(raw.fileno())
    part = Part(FileRecord(name, stream.tell(), stream.checksum()), entries)
    mark = part_file(directory, rank)
    unfinished = mark.with_suffix(".unfinished")
    unfinished.write_bytes(pickle.dumps(part))
    os.replace(unfinished, mark)
    return part


def part_file(directory: Path, rank: int) -> Path:
    """The mark that a rank leaves when its file is complete."""
    return directory / f"part_{rank:05d}.pkl"


def mark_failed(directory: Path, rank: int) -> None:
    """Says that a rank's file will not be complete, as far as the file system still takes that."""
    with contextlib.suppress(OSError):
        part_file(directory, rank).with_suffix(".failed").touch()


def has_failed(directory: Path, rank: int) -> bool:
    return part_file(directory, rank).with_suffix(".failed").exists()


def write_index(directory: Path, world_size: int) -> list[FileRecord]:
    """Makes the index of the parts of all ranks and removes their marks; returns the records of the tensor files. Rank 0 only.

    Raises CheckpointError where the parts do not make up every tensor exactly once.
    """
    parts: list[Part] = [pickle.loads(part_file(directory, rank).read_bytes()) for rank in range(world_size)]
    with open(directory / INDEX_FILE, "wb") as file:
        pickle.dump(_index(parts), file)
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
    for rank in range(world_size):
        part_file(directory, rank).unlink()
    return [part.file for part in parts]


def stored_keys(directory: Path) -> set[str]:
    """The names of the tensors and objects that a checkpoint holds. Raises OSError, pickle.UnpicklingError."""
    with open(directory / INDEX_FILE, "rb") as file:
        return set(pickle.load(file).state_dict_metadata)


def _index(parts: Sequence[Part]) -> Any:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    contents: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for part in parts:
        for entry in part.entries:
            info = _StorageInfo(part.file.name, entry.position, entry.length)
            if entry.dtype is None:
                contents[entry.key] = BytesStorageMetadata()
                index = MetadataIndex(entry.key)
            else:
                size = torch.Size(entry.global_size)
                tensor = contents.setdefault(entry.key, TensorStorageMetadata(TensorProperties(entry.dtype), size, []))
                if not isinstance(tensor, TensorStorageMetadata) or (tensor.size, tensor.properties.dtype) != (size, entry.dtype):
                    raise CheckpointError(f"ranks disagree about {entry.key}: {tensor}, {entry}; this is a bug, please report it")
                index = MetadataIndex(entry.key, torch.Size(entry.offset), len(tensor.chunks))
                tensor.chunks.append(ChunkStorageMetadata(torch.Size(entry.offset), torch.Size(entry.sizes)))
            if index in storage:
                raise CheckpointError(f"two ranks wrote {entry.key} at {entry.offset}; this is a bug, please report it")
            storage[index] = info
    for key, tensor in contents.items():
        if isinstance(tensor, TensorStorageMetadata):
            stored = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if stored != math.prod(tensor.size):
                raise CheckpointError(
                    f"the ranks wrote {stored} of the {math.prod(tensor.size)} elements of {key}; this is a bug, please report it"
                )
    return Metadata(state_dict_metadata=contents, storage_data=storage)


class _HashingStream:
    """A file that checksums what passes to it; as much of a file as torch.save asks for."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._hash = xxhash.xxh3_64()
        self._size = 0

    def write(self, content: Any) -> int:
        view = memoryview(content)
        self._hash.update(view)
        self._raw.write(view)
        self._size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._raw.flush()

    def tell(self) -> int:
        return self._size

    def checksum(self) -> str:
        return self._hash.hexdigest()
