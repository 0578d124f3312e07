"""Weights of linear layers in 8 bits, on their way to engines and in them: half the bytes of bfloat16, and 8-bit products there.

The format is that of compressed-tensors' FP8 checkpoints, which vLLM loads (`rollout/vllm_fp8.py`): each matrix `X.weight` [N, K]
becomes float8_e4m3fn with a float32 scale for each of its N output channels, `X.weight_scale` [N, 1], by which it is multiplied.
Rounding is to nearest, so a number is off by at most 2^-4 of itself, or 2^-18 of its channel's largest where that is more. The
engine makes its activations 8-bit too, one scale per token. What it samples is then not quite the policy's: engines tell the
log-probabilities they sampled with, and `algorithm.off_policy` corrects by them.

Embedding, LM head, norms and biases stay as they are. The policy itself is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from skyrl_mega.config.schema import RolloutConfig
    from skyrl_mega.protocols import WeightSource

#: Largest number of float8_e4m3fn.
LARGEST = 448.0
#: What becomes 8-bit: the matrices of attention and feed-forward.
_QUANTIZED = "_proj.weight"
SCALE_SUFFIX = "_scale"


def quantize(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [N, K], float32 [N, 1]): a scale per row. A row of zeros has scale 1."""
    import torch

    rows = weight_NK.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    # Clamped: a row's largest number divided by its rounded scale may be a bit beyond, which would become NaN.
    return (rows / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


class Fp8Source:
    """A `WeightSource` whose linear layers are 8-bit. *All ranks*, as the source it wraps."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def fused_groups(self) -> Sequence[tuple[str, ...]]:
        """Those of the source; a scale follows its matrix."""
        return [tuple(name for member in group for name in _names(member)) for group in self._source.fused_groups()]

    def iter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """As the source's; matrices are quantized from what they are in `dtype`."""
        for name, tensor in self._source.iter_weights(dtype):
            if name.endswith(_QUANTIZED):
                yield from zip(_names(name), quantize(tensor), strict=True)
            else:
                yield name, tensor


def as_engines_take(source: WeightSource, rollout: RolloutConfig) -> WeightSource:
    """The source as engines of these settings take it: 8-bit with `rollout.quantization=fp8`."""
    return Fp8Source(source) if rollout.quantization == "fp8" else source


def _names(name: str) -> tuple[str, ...]:
    return (name, name + SCALE_SUFFIX) if name.endswith(_QUANTIZED) else (name,)
