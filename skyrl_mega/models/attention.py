"""Causal self-attention over packed sequences: what `models.attention_layout` describes, computed by one of three backends.

Shape letters: T query rows, N key rows, B segments of one bucket, L their padded length, M the padded length of their keys,
H query heads, K key/value heads, G = H / K query heads per key/value head, D head size, E that of values (D in most models).

Backends, all exact, all with shared prompts and context parallelism:

- **sdpa** (any device). Segments of similar shape are padded into one batch (a bucket), so that a pack of a hundred short
  sequences costs one kernel call instead of a hundred. A sequence that sees only itself needs no mask: it is padded on the right,
  where under a causal mask no token attends to. Short buckets on CPU use two batched matmuls instead of torch's SDPA, whose
  bfloat16 backward on CPU is slow there (22 tokens x 93 sequences, 9/3 heads, one core: 57 ms against 7 ms forward and backward).
  Windows and soft caps: the masks of the buckets; where the buckets are not short, soft caps run in blocks of matmuls
  (`cpu_attention`), which torch's SDPA can't, and so do windows on CPU, where whole blocks fall out.
- **flash** (CUDA, bfloat16): one call of `flash_attn.flash_attn_varlen_func` (arXiv:2307.08691) on the packed row. Where segments
  see more than themselves, each gets its keys and values gathered, and the causal mask is aligned to the bottom right. Windows
  and soft caps are arguments of it.
- **transformer_engine** (CUDA): the same through TransformerEngine's attention in its packed ("thd") layout; no soft caps.

With context parallelism keys and values are gathered over its ranks first (arXiv:2407.21783 section 3.3.2): one all-gather
forward and one reduce-scatter backward of 2 K D numbers a token, few where query heads share keys and values.

Megatron sees the pack as one sequence [T, 1, H, D], with the rotary frequencies of each token's own position; only the layout
knows the boundaries. (Megatron's packed layout would rotate sequence by sequence, reading each boundary back from the device.)
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega.models.attention_layout import AttentionLayout, Bucket
from skyrl_mega.models.cpu_attention import causal_attention


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, *, softcap: bool = False) -> str:
    """The attention backend that will run: sdpa, flash or transformer_engine.

    `auto` takes the best that this device and dtype have, and that caps scores where the model does (`softcap`). Raises
    BackendUnavailableError where a backend asked for by name can't run.
    """
    problems = {
        "sdpa": "",
        "flash": _flash_problem(device, dtype),
        "transformer_engine": _transformer_engine_problem(device, softcap),
    }
    if name == "auto":
        return next(backend for backend in ("transformer_engine", "flash", "sdpa") if not problems[backend])
    if name not in problems:
        raise ConfigError(f"`model.attention` must be auto, sdpa, flash or transformer_engine, not {name!r}.")
    if problems[name]:
        raise BackendUnavailableError(f"`model.attention` is {name}, but {problems[name]}; or set model.attention=auto.")
    return name


def _flash_problem(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"flash-attn runs on CUDA only and the device is {device.type}: set trainer.device=cuda"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn has no kernels for {dtype}: set model.dtype=bfloat16"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed: pip install 'skyrl-mega[flash]'"
    return ""


def _transformer_engine_problem(device: torch.device, softcap: bool) -> str:
    if device.type != "cuda":
        return f"TransformerEngine runs on CUDA only and the device is {device.type}: set trainer.device=cuda"
    if importlib.util.find_spec("transformer_engine") is None:
        return "the package transformer-engine is not installed: pip install 'skyrl-mega[te]'"
    if softcap:
        return "its attention has no soft cap for scores, which this model has: set model.attention=flash"
    return ""


class _ToSlots(torch.autograd.Function):
    """Packed rows -> bucket slots. Padding carries no gradient (see module docstring), so the backward only picks real slots."""

    @staticmethod
    def forward(ctx: Any, x_T: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        return x_T.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad_slots: torch.Tensor) -> tuple:
        (slots,) = ctx.saved_tensors
        return grad_slots.index_select(0, slots), None, None


class _FromSlots(torch.autograd.Function):
    """Bucket slots -> packed rows; padding slots get a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x_slots: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, padding)
        return x_slots.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple:
        rows, padding = ctx.saved_tensors
        return grad_T.index_select(0, rows).index_fill_(0, padding, 0), None, None, None


def packed_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of each segment; [T, H, D], [N, K, D] and [N, K, E] -> [T, H, E], any device and dtype, differentiable.

    N is T, or the rows of all context-parallel ranks. A query sees the last `window` keys up to its own, and scores become
    softcap * tanh(scores / softcap), where these are given.
    """
    buckets = layout.buckets
    attend = partial(_bucket_attention, scale=scale, window=window, softcap=softcap)
    if layout.is_one_batch:
        return attend(q, k, v, buckets[0])
    q = _ToSlots.apply(q, layout.rows, layout.slots)
    if layout.is_plain:
        k, v = (_ToSlots.apply(x, layout.rows, layout.slots) for x in (k, v))
    else:
        k, v = (x.index_select(0, layout.key_rows) for x in (k, v))
    query_sizes = [bucket.query_rows.numel() for bucket in buckets]
    key_sizes = [bucket.key_rows.numel() for bucket in buckets]
    parts = zip(buckets, q.split(query_sizes), k.split(key_sizes), v.split(key_sizes), strict=True)
    out = torch.cat([attend(q_, k_, v_, bucket) for bucket, q_, k_, v_ in parts])
    return _FromSlots.apply(out, layout.rows, layout.slots, layout.padding_slots)


def _bucket_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bucket: Bucket,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[B * L, H, D], [B * M, K, D] and [B * M, K, E] -> [B * L, H, E]."""
    q, k, v = (x.reshape(bucket.num_segments, -1, *x.shape[1:]) for x in (q, k, v))
    if bucket.short:
        out_BLHD = _short_attention(q, k, v, bucket.mask(window), scale, softcap)
    elif softcap is not None or (q.device.type == "cpu" and not bucket.has_prefixes):
        mask = bucket.mask(window) if bucket.has_prefixes else None
        out_BLHD = causal_attention(
            q,
            k,
            v,
            scale,
            window=window if window is not None and window < bucket.length else None,
            softcap=softcap,
            mask_BLM=None if mask is None else mask[:, 0],
        )
    else:
        mask = bucket.mask(window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out_BHLD = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
        out_BLHD = out_BHLD.transpose(1, 2)
    return out_BLHD.flatten(0, 1)


def _short_attention(
    q_BLHD: torch.Tensor,
    k_BMKD: torch.Tensor,
    v_BMKE: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention as two batched matmuls, scores and softmax in float32; causal, or by an added `mask`; -> [B, L, H, E].

    The G query heads that share a key/value head are stacked, so that keys and values are not repeated over heads.
    """
    B, L, H, D = q_BLHD.shape
    M, K = k_BMKD.shape[1:3]
    G = H // K
    q = q_BLHD.view(B, L, K, G, D).permute(0, 2, 3, 1, 4).reshape(B * K, G * L, D)
    k, v = (x.transpose(1, 2).reshape(B * K, M, -1) for x in (k_BMKD, v_BMKE))
    scores = torch.bmm(q.float(), k.float().transpose(1, 2)).view(B, K, G, L, M)
    if mask is None:
        mask = torch.full((L, L), float("-inf"), device=q.device).triu(1)
    if softcap is not None:
        scores, scale = torch.tanh(scores * (scale / softcap)) * softcap, 1.0
    weights = torch.add(mask, scores, alpha=scale).softmax(-1).to(v.dtype)
    out = torch.bmm(weights.view(B * K, G * L, M), v)
    return out.view(B, K, G, L, -1).permute(0, 3, 1, 2, 4).reshape(B, L, H, -1)


def gather_context(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all ranks of `group` end to end. *All ranks of `group`.* Backward adds up all ranks' gradients of a row."""
    return tensor_parallel.gather_from_sequence_parallel_region(x, group=group)


class _BottomRight(Enum):
    """A mask of TransformerEngine's that Megatron's AttnMaskType does not list; Megatron passes on the name."""

    padding_causal_bottom_right = 1


class PackedAttention(MegatronModule):
    """Megatron's core attention over a pack: [T, 1, H, D], [T, 1, K, D] and [T, 1, K, E] -> [T, 1, H * E]. No dropout.

    Built by the layer spec with one of the backends of `choose_backend`. With context parallelism every rank of the group calls.
    `windows` says how many keys a query sees in each layer of the whole model (None: all; empty: all in every layer).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        backend: str,
        windows: Sequence[int | None] = (),
        softcap: float | None = None,
    ) -> None:
        super().__init__(config=config)
        self.backend = backend
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.window = windows[layer_number - 1] if windows else None
        self.softcap = softcap
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        if backend == "transformer_engine":
            from megatron.core.extensions.transformer_engine import TEDotProductAttention

            # Keys are gathered here: TransformerEngine's own context parallelism would split sequences in its own way.
            alone = copy.copy(config)
            alone.context_parallel_size = 1
            if self.window is not None:
                alone.window_size, alone.window_attn_skip_freq = self._left_and_right, None
            self.engine = TEDotProductAttention(
                alone,
                layer_number,
                AttnMaskType.padding_causal,
                attention_type,
                softmax_scale=softmax_scale,
                k_channels=k_channels,
                v_channels=v_channels,
                cp_comm_type=cp_comm_type,
                pg_collection=pg_collection,
            )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: AttentionLayout | None = None,
    ) -> torch.Tensor:
        if packed_seq_params is None:
            raise TypeError("PackedAttention needs the pack's AttentionLayout; call the model through PolicyModel.forward.")
        layout = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if self.context_group is not None:
            sizes = [k.size(2), v.size(2)]
            k, v = gather_context(torch.cat([k, v], dim=2), self.context_group).split(sizes, dim=2)
        if self.backend == "sdpa":
            out = packed_sdpa(q, k, v, layout, self.scale, window=self.window, softcap=self.softcap)
        else:
            if layout.varlen.key_rows is not None:
                k, v = (x.index_select(0, layout.varlen.key_rows) for x in (k, v))
            out = (self._flash if self.backend == "flash" else self._transformer_engine)(q, k, v, layout)
        return out.reshape(out.size(0), 1, -1)

    @property
    def _left_and_right(self) -> tuple[int, int]:
        """The window as flash-attn and TransformerEngine count it: keys left and right of the query's own; -1 for all."""
        return (-1, -1) if self.window is None else (self.window - 1, 0)

    def _flash(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout) -> torch.Tensor:
        from flash_attn import flash_attn_varlen_func

        bounds_q, bounds_k, longest_q, longest_k, _ = layout.varlen
        size = v.size(2)
        if size != k.size(2):
            # flash-attn 2 wants one head size: added zeros change no score, and give zeros, which are cut off.
            largest = max(size, k.size(2))
            q, k, v = (F.pad(x, (0, largest - x.size(2))) for x in (q, k, v))
        # Since flash-attn 2.1 a causal mask over queries and keys of unequal length is aligned to the bottom right.
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            bounds_q,
            bounds_k,
            longest_q,
            longest_k,
            softmax_scale=self.scale,
            causal=True,
            window_size=self._left_and_right,
            softcap=self.softcap or 0.0,
        )
        return out[..., :size]

    def _transformer_engine(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout) -> torch.Tensor:
        from megatron.core.packed_seq_params import PackedSeqParams

        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=layout.varlen.cu_seqlens_q,
            cu_seqlens_kv=layout.varlen.cu_seqlens_k,
            max_seqlen_q=layout.varlen.max_seqlen_q,
            max_seqlen_kv=layout.varlen.max_seqlen_k,
        )
        mask = AttnMaskType.padding_causal if layout.is_plain else _BottomRight.padding_causal_bottom_right
        return self.engine(q, k, v, None, attn_mask_type=mask, packed_seq_params=params)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Attention has no parameters."""
        return {}
