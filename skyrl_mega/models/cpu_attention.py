"""Causal attention on CPU as blocks of matmuls, for sequences too long to keep their scores.

torch's own flash attention for CPU runs its bfloat16 backward at a quarter of what the machine's matmuls reach. The same
algorithm (arXiv:2205.14135: scores of one block of queries at a time, computed again in the backward pass) written with
batched matmuls is about 1.7 times as fast, forward and backward, in bfloat16, and saves only its inputs.

What is rounded: scores, their softmax and their gradients are float32; weights and gradients of scores are rounded to the
inputs' dtype where a matmul takes them, and so is every block's share of dK and dV before it is added up in float32.

Shape letters: B sequences, L their length, H query heads, K key/value heads, G = H / K, D head size, R = L * G rows: the G
query heads of one key/value head are stacked (row l * G + g), so that keys and values are never repeated.
"""

from __future__ import annotations

import torch

#: Queries of one block: large enough for the matmuls, small enough that the scores of one block stay in the cache.
BLOCK_QUERIES = 64


def causal_attention(q_BLHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention within each sequence, [B, L, H, D]; differentiable once. CPU tensors of one dtype, any strides."""
    return _CausalAttention.apply(q_BLHD, k_BLKD, v_BLKD, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BLHD, k_BLKD, v_BLKD, scale):
        ctx.save_for_backward(q_BLHD, k_BLKD, v_BLKD)
        ctx.scale = scale
        groups = q_BLHD.size(2) // k_BLKD.size(2)
        out_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
        for q_LHD, k_LKD, v_LKD, out_LHD in zip(q_BLHD, k_BLKD, v_BLKD, out_BLHD, strict=True):
            q_KRD, v_KLD = _stack(q_LHD, groups), v_LKD.transpose(0, 1)
            scaled_KRD, keys_KDL = q_KRD.float() * scale, k_LKD.permute(1, 2, 0).float()
            out_KRD = torch.empty_like(q_KRD)
            for rows, start, end in _blocks(q_LHD.size(0), groups):
                weights = _weights(scaled_KRD[:, rows], keys_KDL, start, end, groups)
                torch.bmm(weights.to(v_KLD.dtype), v_KLD[:, :end], out=out_KRD[:, rows])
            _unstack(out_KRD, groups, out_LHD)
        return out_BLHD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BLHD):
        saved, scale = ctx.saved_tensors, ctx.scale
        groups = saved[0].size(2) // saved[1].size(2)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in saved]
        for q_LHD, k_LKD, v_LKD, grad_LHD, dq_LHD, dk_LKD, dv_LKD in zip(*saved, grad_BLHD, *grads, strict=True):
            q_KRD, grad_KRD = _stack(q_LHD, groups), _stack(grad_LHD, groups)
            k_KLD = k_LKD.transpose(0, 1).contiguous()
            scaled_KRD, keys_KDL = q_KRD.float() * scale, k_LKD.permute(1, 2, 0).float()
            grad_float_KRD, values_KDL = grad_KRD.float(), v_LKD.permute(1, 2, 0).float()
            dq_KRD = torch.empty_like(q_KRD)
            dk_KLD, dv_KLD = (torch.zeros(k_KLD.shape, dtype=torch.float32) for _ in range(2))
            for rows, start, end in _blocks(q_LHD.size(0), groups):
                weights = _weights(scaled_KRD[:, rows], keys_KDL, start, end, groups)
                dv_KLD[:, :end] += torch.bmm(weights.to(q_KRD.dtype).transpose(1, 2), grad_KRD[:, rows])
                d_weights = torch.bmm(grad_float_KRD[:, rows], values_KDL[:, :, :end])
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, torch.float32).to(q_KRD.dtype)
                torch.bmm(d_scores, k_KLD[:, :end], out=dq_KRD[:, rows])
                dk_KLD[:, :end] += torch.bmm(d_scores.transpose(1, 2), q_KRD[:, rows])
            _unstack(dq_KRD.mul_(scale), groups, dq_LHD)
            dk_LKD.copy_(dk_KLD.mul_(scale).transpose(0, 1))
            dv_LKD.copy_(dv_KLD.transpose(0, 1))
        return (*grads, None)


def _weights(scaled_KrD: torch.Tensor, keys_KDL: torch.Tensor, start: int, end: int, groups: int) -> torch.Tensor:
    """Attention weights float32 [K, r, end] of the queries start .. end - 1."""
    scores = torch.bmm(scaled_KrD, keys_KDL[:, :, :end])
    future = torch.full((end - start, end - start), float("-inf")).triu(1).repeat_interleave(groups, 0)
    scores[:, :, start:] += future
    return torch.softmax(scores, -1)


def _blocks(length: int, groups: int) -> list[tuple[slice, int, int]]:
    """(stacked rows, first query, end) of each block."""
    bounds = [(start, min(start + BLOCK_QUERIES, length)) for start in range(0, length, BLOCK_QUERIES)]
    return [(slice(start * groups, end * groups), start, end) for start, end in bounds]


def _stack(x_LHD: torch.Tensor, groups: int) -> torch.Tensor:
    """[L, H, D] -> [K, L * G, D]."""
    return x_LHD.unflatten(1, (-1, groups)).transpose(0, 1).flatten(1, 2)


def _unstack(x_KRD: torch.Tensor, groups: int, out_LHD: torch.Tensor) -> None:
    """The inverse of `_stack`, into `out_LHD`."""
    out_LHD.unflatten(1, (-1, groups)).copy_(x_KRD.unflatten(1, (-1, groups)).transpose(0, 1))
