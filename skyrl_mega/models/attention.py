"""Causal self-attention over packed sequences: T tokens of S sequences in one row, none attending to another.

Shape letters: T packed tokens, S sequences, B sequences of one bucket, L their padded length, H query heads, K key/value heads,
G = H / K query heads per key/value head, D head size.

Backends, all exact:

- **sdpa** (any device). Sequences of similar length are padded on the right into one [B, L] batch (a bucket), so that a pack of a
  hundred short sequences costs one kernel call instead of a hundred. Padding needs no mask: under a causal mask no token attends
  to what stands to its right. Short buckets on CPU use two batched matmuls instead of torch's SDPA, whose bfloat16 backward on
  CPU is slow there (22 tokens x 93 sequences, 9/3 heads, one core: 57 ms against 7 ms forward and backward).
- **flash** (CUDA, bfloat16): `flash_attn.flash_attn_varlen_func` on the packed row as it is (arXiv:2307.08691).
- **transformer_engine** (CUDA): TransformerEngine's own attention in its packed ("thd") layout.

Megatron sees the pack as one sequence [T, 1, H, D], with the rotary frequencies of each token's own position; only this module
knows the boundaries. (Megatron's packed layout would rotate sequence by sequence, reading each boundary back from the device.)
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega.models.shared_prompts import SharedPromptLayout, shared_prompt_sdpa

#: Up to this padded length a CPU bucket runs as batched matmuls: measured faster in bfloat16 and equal in float32.
SHORT_SEQUENCE = 192
#: A bucket takes sequences up to SLACK_FACTOR x its shortest + SLACK_TOKENS: bounds the padding without many small calls.
SLACK_FACTOR, SLACK_TOKENS = 1.25, 16


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention backend that will run: sdpa, flash or transformer_engine.

    `auto` takes the best that this device and dtype have. Raises BackendUnavailableError where a backend asked for by name
    can't run.
    """
    problems = {"sdpa": "", "flash": _flash_problem(device, dtype), "transformer_engine": _transformer_engine_problem(device)}
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


def _transformer_engine_problem(device: torch.device) -> str:
    if device.type != "cuda":
        return f"TransformerEngine runs on CUDA only and the device is {device.type}: set trainer.device=cuda"
    if importlib.util.find_spec("transformer_engine") is None:
        return "the package transformer-engine is not installed: pip install 'skyrl-mega[te]'"
    return ""


@dataclass
class Bucket:
    """Sequences padded to one length. `rows` int64 [B * L]: the packed row that fills each slot (padding repeats a row).

    `whole` is True when the bucket is the packed row as it stands: equal lengths, no padding, no gathering.
    """

    num_sequences: int
    length: int
    rows: torch.Tensor
    whole: bool


@dataclass
class PackedSequences:
    """Where the sequences of a pack begin and end; given to every attention layer of one forward pass.

    cu_seqlens int32 [S+1] on the model's device, cu_seqlens[0] == 0, cu_seqlens[-1] == T.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    #: Set where sequences share prompts; only the sdpa backend knows what to do with it.
    shared: SharedPromptLayout | None = None
    #: Read by Megatron's SelfAttention: anything but "thd" makes it treat the pack as one sequence, which is what we want.
    qkv_format: str = "packed"

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The sequences by similar length, made once per pack."""
        return make_buckets(self.cu_seqlens)

    @cached_property
    def rows(self) -> torch.Tensor:
        """int64: the packed row that fills each slot of the buckets, end to end."""
        return torch.cat([bucket.rows for bucket in self.buckets])

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [T]: the slot where each packed row ended up."""
        rows = self.rows
        slots = torch.empty(int(self.cu_seqlens[-1]), dtype=torch.int64, device=rows.device)
        # Padding slots repeat the last row of their sequence and stand to the right of its own slot: written backwards, the
        # first slot of a row wins.
        slots[rows.flip(0)] = torch.arange(rows.numel() - 1, -1, -1, device=rows.device)
        return slots

    @cached_property
    def padding_slots(self) -> torch.Tensor:
        """int64: the slots that hold padding."""
        real = torch.zeros(self.rows.numel(), dtype=torch.bool, device=self.rows.device)
        real[self.slots] = True
        return (~real).nonzero().squeeze(1)


def make_buckets(cu_seqlens: torch.Tensor) -> list[Bucket]:
    """Groups the sequences of a pack into buckets of similar length, shortest first. Empty sequences are left out."""
    bounds = cu_seqlens.tolist()
    sequences = sorted((end - start, start) for start, end in itertools.pairwise(bounds) if end > start)
    groups: list[list[tuple[int, int]]] = []
    limit = -1.0
    for sequence in sequences:
        if sequence[0] > limit:
            groups.append([])
            limit = sequence[0] * SLACK_FACTOR + SLACK_TOKENS
        groups[-1].append(sequence)
    return [_make_bucket(group, bounds[-1], cu_seqlens.device) for group in groups]


def _make_bucket(group: list[tuple[int, int]], num_tokens: int, device: torch.device) -> Bucket:
    length = group[-1][0]
    lengths_B = torch.tensor([n for n, _ in group])
    starts_B = torch.tensor([start for _, start in group])
    rows_BL = starts_B[:, None] + torch.minimum(torch.arange(length)[None, :], lengths_B[:, None] - 1)
    rows = rows_BL.flatten()
    whole = rows.numel() == num_tokens and torch.equal(rows, torch.arange(num_tokens))
    return Bucket(len(group), length, rows.to(device), whole)


class _ToSlots(torch.autograd.Function):
    """Packed rows -> bucket slots. Padding carries no gradient (see module docstring), so the backward only picks real slots."""

    @staticmethod
    def forward(ctx, x_T: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        return x_T.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad_slots: torch.Tensor):
        (slots,) = ctx.saved_tensors
        return grad_slots.index_select(0, slots), None, None


class _FromSlots(torch.autograd.Function):
    """Bucket slots -> packed rows; padding slots get a zero gradient."""

    @staticmethod
    def forward(ctx, x_slots: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, padding)
        return x_slots.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad_T: torch.Tensor):
        rows, padding = ctx.saved_tensors
        return grad_T.index_select(0, rows).index_fill_(0, padding, 0), None, None, None


def packed_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences, scale: float
) -> torch.Tensor:
    """Causal attention within each sequence; [T, H, D], [T, K, D], [T, K, D] -> [T, H, D], any device and dtype."""
    buckets = packed.buckets
    if len(buckets) == 1 and buckets[0].whole:
        return _bucket_attention(query, key, value, buckets[0], scale)
    query, key, value = (_ToSlots.apply(x, packed.rows, packed.slots) for x in (query, key, value))
    sizes = [bucket.rows.numel() for bucket in buckets]
    parts = zip(buckets, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    out = torch.cat([_bucket_attention(q, k, v, bucket, scale) for bucket, q, k, v in parts])
    return _FromSlots.apply(out, packed.rows, packed.slots, packed.padding_slots)


def _bucket_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bucket: Bucket, scale: float) -> torch.Tensor:
    """[B * L, H, D] and [B * L, K, D] twice -> [B * L, H, D]."""
    q, k, v = (x.reshape(bucket.num_sequences, bucket.length, *x.shape[1:]) for x in (q, k, v))
    if q.device.type == "cpu" and bucket.length <= SHORT_SEQUENCE:
        out_BLHD = _short_attention(q, k, v, scale)
    else:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out_BHLD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
        out_BLHD = out_BHLD.transpose(1, 2)
    return out_BLHD.flatten(0, 1)


def _short_attention(q_BLHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention as two batched matmuls, scores and softmax in float32; -> [B, L, H, D].

    The G query heads that share a key/value head are stacked, so that keys and values are never repeated.
    """
    B, L, H, D = q_BLHD.shape
    K = k_BLKD.size(2)
    G = H // K
    q = q_BLHD.view(B, L, K, G, D).permute(0, 2, 3, 1, 4).reshape(B * K, G * L, D)
    k, v = (x.transpose(1, 2).reshape(B * K, L, D) for x in (k_BLKD, v_BLKD))
    scores = torch.bmm(q.float(), k.float().transpose(1, 2)).view(B * K, G, L, L)
    future = torch.full((L, L), float("-inf"), device=q.device).triu(1)
    weights = torch.add(future, scores, alpha=scale).softmax(-1).to(v.dtype)
    out = torch.bmm(weights.view(B * K, G * L, L), v)
    return out.view(B, K, G, L, D).permute(0, 3, 1, 2, 4).reshape(B, L, H, D)


class PackedAttention(MegatronModule):
    """Megatron's core attention for packed sequences: [T, 1, H, D] and [T, 1, K, D] twice -> [T, 1, H * D].

    Built by the layer spec with one of the backends of `choose_backend`. No dropout; context parallelism is not supported here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        backend: str,
    ) -> None:
        super().__init__(config=config)
        self.backend = backend
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        if backend == "transformer_engine":
            from megatron.core.extensions.transformer_engine import TEDotProductAttention

            self.engine = TEDotProductAttention(
                config,
                layer_number,
                AttnMaskType.padding_causal,
                attention_type,
                softmax_scale=softmax_scale,
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
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        if packed_seq_params is None:
            raise TypeError("PackedAttention needs the pack's PackedSequences; call the model through PolicyModel.forward.")
        packed = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if packed.shared is not None and self.backend != "sdpa":
            raise BackendUnavailableError(
                f"the {self.backend} attention can't share prompts: set trainer.share_prompts=off, or model.attention=sdpa."
            )
        if packed.shared is not None:
            out = shared_prompt_sdpa(q, k, v, packed.shared, self.scale)
        elif self.backend == "flash":
            out = self._flash(q, k, v, packed)
        elif self.backend == "transformer_engine":
            out = self._transformer_engine(q, k, v, packed)
        else:
            out = packed_sdpa(q, k, v, packed, self.scale)
        return out.reshape(out.size(0), 1, -1)

    def _flash(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        from flash_attn import flash_attn_varlen_func

        bounds, longest = packed.cu_seqlens, packed.max_seqlen
        return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, softmax_scale=self.scale, causal=True)

    def _transformer_engine(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        from megatron.core.packed_seq_params import PackedSeqParams

        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=packed.cu_seqlens,
            cu_seqlens_kv=packed.cu_seqlens,
            max_seqlen_q=packed.max_seqlen,
            max_seqlen_kv=packed.max_seqlen,
        )
        return self.engine(q, k, v, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=params)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Attention has no parameters."""
        return {}
