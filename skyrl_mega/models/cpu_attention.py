"""Causal attention as blocks of matmuls, for sequences too long to keep their scores: on CPU, and wherever scores are capped.

torch's own flash attention for CPU runs its bfloat16 backward at a quarter of what the machine's matmuls reach. The same
algorithm (arXiv:2205.14135: scores of one block of queries at a time, computed again in the backward pass) written with
batched matmuls is about 1.7 times as fast, forward and backward, in bfloat16, and saves only its inputs.

Beyond plain causal attention: a sliding window (keys that a block can't see are left out), a soft cap (scores become
cap * tanh(score / cap), arXiv:2408.00118 section 2), and with a mask more keys than queries.

What is rounded: scores, their softmax and their gradients are float32; weights and gradients of scores are rounded to the
inputs' dtype where a matmul takes them, and so is every block's share of dK and dV before it is added up in float32.

Shape letters: B sequences, L their length, M their keys, H query heads, K key/value heads, G = H / K, D head size, E that of
values (D in most models), R = L * G rows: the G query heads of one key/value head are stacked (row l * G + g), so that keys and
values are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

#: Queries of one block: large enough for the matmuls, small enough that the scores of one block stay in the cache.
BLOCK_QUERIES = 64


def causal_attention(
    q_BLHD: torch.Tensor,
    k_BMKD: torch.Tensor,
    v_BMKE: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    mask_BLM: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention within each sequence, [B, L, H, E]; differentiable once. Tensors of one dtype, any strides.

    A query sees the last `window` keys up to its own, all without one. With `mask_BLM` (bool, True where a query sees a key; B
    may be 1) it decides alone, and M may be larger than L: the last L keys are then the queries' own.
    """
    return _CausalAttention.apply(q_BLHD, k_BMKD, v_BMKE, scale, window, softcap, mask_BLM)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BLHD, k_BMKD, v_BMKE, scale, window, softcap, mask_BLM):
        ctx.save_for_backward(q_BLHD, k_BMKD, v_BMKE)
        ctx.scale, ctx.sight = scale, (window, softcap, mask_BLM)
        groups = q_BLHD.size(2) // k_BMKD.size(2)
        out_BLHE = q_BLHD.new_empty(*q_BLHD.shape[:3], v_BMKE.size(3))
        for number, (q_LHD, k_MKD, v_MKE, out_LHE) in enumerate(zip(q_BLHD, k_BMKD, v_BMKE, out_BLHE, strict=True)):
            q_KRD, v_KME = _stack(q_LHD, groups), v_MKE.transpose(0, 1)
            scaled_KRD, keys_KDM = q_KRD.float() * scale, k_MKD.permute(1, 2, 0).float()
            out_KRE = q_KRD.new_empty(*q_KRD.shape[:2], v_KME.size(2))
            for block in _blocks(q_LHD.size(0), k_MKD.size(0), groups, number, *ctx.sight):
                weights, _ = block.weights(scaled_KRD, keys_KDM)
                torch.bmm(weights.to(v_KME.dtype), v_KME[:, block.keys], out=out_KRE[:, block.rows])
            _unstack(out_KRE, groups, out_LHE)
        return out_BLHE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BLHE):
        saved, scale = ctx.saved_tensors, ctx.scale
        groups = saved[0].size(2) // saved[1].size(2)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in saved]
        of_sequences = enumerate(zip(*saved, grad_BLHE, *grads, strict=True))
        for number, (q_LHD, k_MKD, v_MKE, grad_LHE, dq_LHD, dk_MKD, dv_MKE) in of_sequences:
            q_KRD, grad_KRE = _stack(q_LHD, groups), _stack(grad_LHE, groups)
            k_KMD = k_MKD.transpose(0, 1).contiguous()
            scaled_KRD, keys_KDM = q_KRD.float() * scale, k_MKD.permute(1, 2, 0).float()
            grad_float_KRE, values_KEM = grad_KRE.float(), v_MKE.permute(1, 2, 0).float()
            dq_KRD = torch.empty_like(q_KRD)
            dk_KMD, dv_KME = (torch.zeros(x.transpose(0, 1).shape, dtype=torch.float32, device=x.device) for x in (k_MKD, v_MKE))
            for block in _blocks(q_LHD.size(0), k_MKD.size(0), groups, number, *ctx.sight):
                rows, keys = block.rows, block.keys
                weights, slope = block.weights(scaled_KRD, keys_KDM)
                dv_KME[:, keys] += torch.bmm(weights.to(q_KRD.dtype).transpose(1, 2), grad_KRE[:, rows])
                d_weights = torch.bmm(grad_float_KRE[:, rows], values_KEM[:, :, keys])
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, torch.float32)
                if slope is not None:
                    d_scores *= slope
                d_scores = d_scores.to(q_KRD.dtype)
                torch.bmm(d_scores, k_KMD[:, keys], out=dq_KRD[:, rows])
                dk_KMD[:, keys] += torch.bmm(d_scores.transpose(1, 2), q_KRD[:, rows])
            _unstack(dq_KRD.mul_(scale), groups, dq_LHD)
            dk_MKD.copy_(dk_KMD.mul_(scale).transpose(0, 1))
            dv_MKE.copy_(dv_KME.transpose(0, 1))
        return (*grads, None, None, None, None)


@dataclass(frozen=True)
class _Block:
    """Queries start .. end - 1 of a sequence, stacked `rows`, and the `keys` among which are all that they see."""

    start: int
    end: int
    groups: int
    keys: slice
    window: int | None
    softcap: float | None
    mask_LM: torch.Tensor | None

    @property
    def rows(self) -> slice:
        return slice(self.start * self.groups, self.end * self.groups)

    def weights(self, scaled_KRD: torch.Tensor, keys_KDM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(attention weights, the soft cap's derivative at each score or None), float32 [K, rows, keys]."""
        scores = torch.bmm(scaled_KRD[:, self.rows], keys_KDM[:, :, self.keys])
        slope = None
        if self.softcap is not None:
            tanh = torch.tanh(scores / self.softcap)
            scores, slope = tanh * self.softcap, 1 - tanh.square()
        if self.mask_LM is not None or self.window is not None:
            scores.masked_fill_(~self._sees(scores.device).repeat_interleave(self.groups, 0), float("-inf"))
        else:
            count = self.end - self.start
            future = torch.full((count, count), float("-inf"), device=scores.device).triu(1).repeat_interleave(self.groups, 0)
            scores[:, :, self.start :] += future
        return torch.softmax(scores, -1), slope

    def _sees(self, device: torch.device) -> torch.Tensor:
        """bool [end - start, keys]."""
        if self.mask_LM is not None:
            return self.mask_LM[self.start : self.end, self.keys]
        assert self.window is not None
        queries = torch.arange(self.start, self.end, device=device)[:, None]
        keys = torch.arange(self.keys.start, self.keys.stop, device=device)
        return (keys <= queries) & (queries - keys < self.window)


def _blocks(
    length: int,
    num_keys: int,
    groups: int,
    number: int,
    window: int | None,
    softcap: float | None,
    mask_BLM: torch.Tensor | None,
) -> Iterator[_Block]:
    """The blocks of queries of sequence `number`."""
    mask_LM = None if mask_BLM is None else mask_BLM[min(number, mask_BLM.size(0) - 1)]
    for start in range(0, length, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, length)
        first = 0 if window is None or mask_LM is not None else max(0, start - window + 1)
        yield _Block(start, end, groups, slice(first, num_keys - length + end), window, softcap, mask_LM)


def _stack(x_LHD: torch.Tensor, groups: int) -> torch.Tensor:
    """[L, H, D] -> [K, L * G, D]."""
    return x_LHD.unflatten(1, (-1, groups)).transpose(0, 1).flatten(1, 2)


def _unstack(x_KRD: torch.Tensor, groups: int, out_LHD: torch.Tensor) -> None:
    """The inverse of `_stack`, into `out_LHD`."""
    out_LHD.unflatten(1, (-1, groups)).copy_(x_KRD.unflatten(1, (-1, groups)).transpose(0, 1))
