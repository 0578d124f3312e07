"""Weights as differences to the version before: for links so slow that it pays to compute in order to send less.

After a small optimizer step in bfloat16 most weights round to what they were. The sender keeps the bytes it sent last, each
receiver the bytes it received, both in host memory (one copy of the model each). A tensor is cut into blocks of 65,536
elements; each block travels as the smallest of

- nothing, where no bit changed;
- SPARSE: the places (2 bytes each) and the XOR of the elements that changed;
- ZSTD: the XOR of the whole block, compressed;
- XOR: the XOR of the whole block as it is, where nothing helps.

In the payload a tensor begins with its block table, (kind: 1 byte, bytes: 4 bytes) for each block, then come the blocks.
XOR is exact for every dtype, and undoing it needs no knowledge of floating point. Checksums are taken over the tensors
that result, so a receiver whose copy differs from the sender's refuses.

A base is named by the joint checksum of its version. A receiver that holds another base than the sender's (new, or it lost
a version) makes the whole push a full one, for all: they receive the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.transport.checksum import tensor_checksum
from skyrl_mega.rollout.transport.encode import FullEncoder, NamedTensors, Written
from skyrl_mega.rollout.transport.layout import ALIGNMENT, TensorSlot, dtype_name, place

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK_ELEMENTS = 65536  # so that a place fits in 2 bytes
SAME, SPARSE, ZSTD, XOR = range(4)
ENTRY_BYTES = 5
#: A version of the receiver's own that no sender has: nothing, or a mixture.
NO_BASE = ""


def _words(values: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor as unsigned words of its element size (8-byte elements: as bytes)."""
    import numpy as np
    import torch

    width = values.element_size()
    return values.reshape(-1).view(torch.uint8).numpy().view({2: np.uint16, 4: np.uint32}.get(width, np.uint8))


def encode_difference(current: torch.Tensor, base: torch.Tensor, compressor: Any) -> list[bytes]:
    """The block table and the blocks that turn `base` into `current`; both contiguous on CPU, of one shape and dtype."""
    import numpy as np

    difference = _words(current) ^ _words(base)
    width = difference.itemsize
    table, blocks = bytearray(), []
    for start in range(0, len(difference), BLOCK_ELEMENTS):
        block = difference[start : start + BLOCK_ELEMENTS]
        kind, content = SAME, b""
        if block.any():
            kind, content = ZSTD, compressor.compress(block.data)
            if np.count_nonzero(block) * (2 + width) < len(content):
                changed = np.flatnonzero(block)
                kind, content = SPARSE, changed.astype("<u2").tobytes() + block[changed].tobytes()
            if len(content) >= block.nbytes:
                kind, content = XOR, block.tobytes()
        table += bytes([kind]) + len(content).to_bytes(4, "little")
        blocks.append(content)
    return [bytes(table), *blocks]


def apply_difference(base: torch.Tensor, encoded: torch.Tensor) -> None:
    """Turns `base` (contiguous, CPU) into the tensor that `encode_difference` saw, in place. `encoded` is uint8.

    Raises WeightSyncError if `encoded` is damaged.
    """
    import numpy as np
    import zstandard

    words, content = _words(base), encoded.numpy()
    num_blocks = -(-len(words) // BLOCK_ELEMENTS)
    at, decompressor = num_blocks * ENTRY_BYTES, zstandard.ZstdDecompressor()
    try:
        for index in range(num_blocks):
            entry = content[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES].tobytes()
            kind, size = entry[0], int.from_bytes(entry[1:], "little")
            block, piece = words[index * BLOCK_ELEMENTS : (index + 1) * BLOCK_ELEMENTS], content[at : at + size]
            at += size
            if kind == SPARSE:
                count = size // (2 + words.itemsize)
                places = np.frombuffer(piece[: 2 * count].tobytes(), "<u2")
                block[places] ^= np.frombuffer(piece[2 * count :].tobytes(), words.dtype)
            elif kind in (ZSTD, XOR):
                plain = piece.tobytes() if kind == XOR else decompressor.decompress(piece.tobytes(), max_output_size=block.nbytes)
                block ^= np.frombuffer(plain, words.dtype)
            elif kind != SAME:
                raise WeightSyncError(
                    f"a difference of weights names block kind {kind}; there are {SAME} to {XOR}: it is damaged."
                )
    except (ValueError, IndexError, zstandard.ZstdError) as error:
        raise WeightSyncError(f"a difference of weights can't be read, it is damaged: {error}.") from error


class DeltaEncoder(FullEncoder):
    """Differences to the last committed version where every receiver holds it; else full tensors, which they keep."""

    needs_base = True

    def __init__(self) -> None:
        import zstandard

        self._compressor = zstandard.ZstdCompressor(level=1)
        self._base: dict[str, torch.Tensor] = {}
        self._base_name = NO_BASE
        super().__init__()

    @property
    def encoding(self) -> str:
        return "delta" if self._sends_differences else "kept"

    def begin(self, bases: Sequence[str]) -> None:
        self._sends_differences = self._base_name != NO_BASE and all(base == self._base_name for base in bases)
        self._base_name = NO_BASE  # until this version is committed, what is kept is a mixture
        super().begin(bases)

    def bound(self, tensors: NamedTensors) -> int:
        tables = sum(ENTRY_BYTES * (tensor.numel() // BLOCK_ELEMENTS + 1) + ALIGNMENT for _, tensor in tensors)
        return super().bound(tensors) + tables

    def write(self, tensors: NamedTensors, buffer: torch.Tensor) -> Written:
        """As the full encoder's.

        Raises WeightSyncError if a tensor is not of the base's shape and dtype: its model is another one.
        """
        import numpy as np
        import torch

        on_host = [(name, tensor.detach().to("cpu").contiguous()) for name, tensor in tensors]
        if not self._sends_differences:
            written = super().write(on_host, buffer)
            for name, tensor in on_host:
                kept = self._base.get(name)
                if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                    kept = self._base[name] = torch.empty_like(tensor)
                kept.copy_(tensor)
            return written
        started = time.perf_counter()
        target, at, slots = buffer.numpy(), 0, []
        for name, tensor in on_host:
            base = self._base.get(name)
            if base is None or base.shape != tensor.shape or base.dtype != tensor.dtype:
                raise WeightSyncError(
                    f"{name} must be of the shape and dtype it had in the version before: send that model anew."
                )
            begin = at
            for piece in encode_difference(tensor, base, self._compressor):
                target[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                at += len(piece)
            base.copy_(tensor)
            summing = time.perf_counter()
            size, checksum = tensor.numel() * tensor.element_size(), tensor_checksum(base)
            self.checksum_s += time.perf_counter() - summing
            slots.append(TensorSlot(name, dtype_name(tensor), tuple(tensor.shape), begin, size, at - begin, checksum))
            at = place([at])[1]
        self._account(slots, at, started)
        return Written(at, tuple(slots), ((0, buffer[:at]),))

    def committed(self) -> None:
        self._base_name = self.totals()["checksum"]

    def abandoned(self) -> None:
        self._base_name = NO_BASE
