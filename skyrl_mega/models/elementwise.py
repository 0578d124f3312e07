"""RMS norm and gated activations on CPU, saving only their inputs for the backward pass.

torch has no fused CPU kernel for either: written with its operators, autograd keeps a float32 copy of the norm's input, a second
one of its normalised rows, and three intermediate results of SwiGLU: 16 of the 32 kB per token and layer of SmolLM2's training
step, and each of them is written to and read from main memory. Here a backward pass computes them again, a few hundred rows at a
time, so that they stay in the cache.

Elsewhere (CUDA without TransformerEngine) torch's own operators run, which are fused there.
Shape letters: N rows, H hidden size, F feed-forward size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

#: Rows of one pass, of about as many values: the few copies of them that a pass makes fit the second-level cache.
CHUNK_VALUES = 2**17


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float, *, unit_offset: bool = False) -> torch.Tensor:
    """RMS norm over the last dimension (arXiv:1910.07467), any leading shape; the statistics are float32.

    With `unit_offset` (Gemma) the normalised row is multiplied by 1 + weight, in float32, and then rounded; without it is
    rounded first.
    """
    if x.device.type != "cpu":
        if not unit_offset:
            return F.rms_norm(x, weight_H.shape, weight_H, eps)
        return F.rms_norm(x.float(), weight_H.shape, 1 + weight_H.float(), eps).to(x.dtype)
    return _RMSNorm.apply(x, weight_H, eps, unit_offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_H, eps, unit_offset):
        ctx.save_for_backward(x, weight_H)
        ctx.eps, ctx.unit_offset = eps, unit_offset
        factor_H = 1 + weight_H.float() if unit_offset else weight_H
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows, out_rows in zip(*_row_chunks(x, out), strict=True):
            normed, _ = _normed(rows, eps)
            if unit_offset:
                out_rows.copy_(normed.mul_(factor_H))
            else:
                torch.mul(normed.to(x.dtype), factor_H, out=out_rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight_H = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        weight = weight_H.float() + 1 if ctx.unit_offset else weight_H.float()
        grad_weight = torch.zeros_like(weight)
        for rows, grad_rows, grad_x_rows in zip(*_row_chunks(x, grad, grad_x), strict=True):
            normed, scale = _normed(rows, ctx.eps)
            upper = grad_rows.to(torch.float32, copy=True)
            product = upper * normed
            grad_weight += product.sum(0)
            # d/dx of x * scale(x): the gradient without its component along the normalised row.
            along = product.mul_(weight).mean(-1, keepdim=True)
            grad_x_rows.copy_(upper.mul_(weight).sub_(normed.mul_(along)).mul_(scale))
        return grad_x, grad_weight.to(weight_H.dtype), None, None


def _normed(x_NH: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised rows [N, H], their scales [N, 1]), float32."""
    values = x_NH.to(torch.float32, copy=True)
    scale = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return values.mul_(scale), scale


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh formula (arXiv:1606.08415 section 2), Hugging Face's gelu_pytorch_tanh."""
    return F.gelu(x, approximate="tanh")


class SwiGLU:
    """silu(gate) * up of [..., 2 F], the gate in the first half -> [..., F]; arXiv:2002.05202.

    No torch module: Megatron's checkpoints ask each module of a feed-forward for its part, and this one has none.
    """

    activation = staticmethod(F.silu)
    derivative = staticmethod(torch.ops.aten.silu_backward)

    def __init__(self, config: Any = None) -> None:
        pass

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            gate, up = x.chunk(2, dim=-1)
            return self.activation(gate) * up
        return _Gated.apply(x, type(self))


class GeGLU(SwiGLU):
    """gelu_tanh(gate) * up, as SwiGLU."""

    activation = staticmethod(gelu_tanh)
    derivative = staticmethod(partial(torch.ops.aten.gelu_backward, approximate="tanh"))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        ctx.save_for_backward(x)
        ctx.kind = kind
        out = x.new_empty(*x.shape[:-1], x.size(-1) // 2)
        for rows, out_rows in zip(*_row_chunks(x, out), strict=True):
            gate, up = rows.chunk(2, dim=-1)
            torch.mul(kind.activation(gate), up, out=out_rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows, grad_rows, grad_x_rows in zip(*_row_chunks(x, grad, grad_x), strict=True):
            (gate, up), (grad_gate, grad_up) = rows.chunk(2, dim=-1), grad_x_rows.chunk(2, dim=-1)
            torch.mul(grad_rows, ctx.kind.activation(gate), out=grad_up)
            grad_gate.copy_(ctx.kind.derivative(grad_rows * up, gate))
        return grad_x, None


def _row_chunks(first: torch.Tensor, *others: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """For each tensor its rows (all leading dimensions flattened) in chunks of the same numbers of rows."""
    count = max(1, CHUNK_VALUES // first.size(-1))
    return [x.flatten(0, -2).split(count) for x in (first, *others)]
