"""Attention over packs, with shared prompts and context parallelism, against float64; the choice of backend."""

from __future__ import annotations

import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from helpers.packs import dense_attention, make_pack, random_qkv, visible, with_gradients
from skyrl_mega.data.context_shards import context_part
from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega.models.attention import PackedAttention, choose_backend, packed_sdpa
from skyrl_mega.models.attention_layout import SHORT_KEYS, AttentionLayout
from skyrl_mega.parallel.device import install_megatron_cpu_shim

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCALE = 0.3
#: Packs whose values have another head size than their queries and keys, as in multi-latent attention.
VALUE_DIM = {"ragged": 10, "long_and_short": 24, "shared_twice": 24, "shared_long": 10}

#: lengths, prefix segments
PACKS = {
    "one_token": ([1], None),
    "equal_lengths": ([22] * 5, None),
    "similar_lengths": ([22, 18, 26, 20, 25], None),
    "ragged": ([7, 33, 5, 20, 1, 90, 2], None),
    "long_and_short": ([SHORT_KEYS + 60, 3, SHORT_KEYS + 1, 40], None),
    "empty_sequence_inside": ([4, 0, 9], None),
    "shared": ([16, 5, 7, 4, 30, 6], [-1, 0, 0, 0, -1, -1]),
    "shared_twice": ([9, 1, 20, 11, 3, 40, 2], [-1, 0, 0, -1, 3, 3, 3]),
    "shared_long": ([SHORT_KEYS, 30, 8, 60, 12], [-1, 0, 0, -1, 3]),
}


def _layout(pack):
    return AttentionLayout(pack.cu_seqlens, pack.max_seqlen, pack.prefix_segments, pack.context)


def _attend_in_parts(attend, pack, size, q, k, v):
    """What `size` context ranks compute, each from its own queries and all ranks' keys, put together in the pack's order."""
    if size == 1:
        return attend(q, k, v, _layout(pack))
    outs = []
    for rank in range(size):
        part = context_part(pack, rank, size, pad_to_multiple=2)
        places = part.context.key_places[: pack.num_tokens]
        # Rows of padding, this rank's and others', hold numbers that would show in any result they reached.
        full = [
            torch.full((size * part.num_tokens, *x.shape[1:]), 1e3, dtype=x.dtype).index_copy(0, places, x) for x in (q, k, v)
        ]
        queries = full[0][rank * part.num_tokens : (rank + 1) * part.num_tokens]
        outs.append(attend(queries, *full[1:], _layout(part)))
    return torch.cat(outs)[places]


def _sdpa(q, k, v, layout):
    return packed_sdpa(q, k, v, layout, SCALE)


def _dense(pack):
    return partial(dense_attention, sees=visible(pack), scale=SCALE)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", PACKS)
def test_attention_equals_dense_float64_however_it_is_packed_shared_and_split(name, size):
    pack = make_pack(*PACKS[name])
    heads = (4, 4) if name == "ragged" else (6, 2)
    qkv = random_qkv(pack.num_tokens, *heads, value_dim=VALUE_DIM.get(name))
    got = with_gradients(partial(_attend_in_parts, _sdpa, pack, size), qkv)
    for x, y in zip(got, with_gradients(_dense(pack), qkv), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)


#: window, soft cap. 1 sees itself alone; 12 lies inside trunks and branches; 70 beyond a block of queries.
SIGHTS = [(1, None), (12, None), (70, None), (None, 2.0), (12, 2.0), (1000, 2.0)]


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["equal_lengths", "ragged", "long_and_short", "shared_twice", "shared_long"])
def test_windows_and_soft_caps_equal_dense_float64(name, size, sight):
    window, softcap = sight
    pack = make_pack(*PACKS[name])
    qkv = random_qkv(pack.num_tokens)
    attend = partial(packed_sdpa, scale=SCALE, window=window, softcap=softcap)
    got = with_gradients(partial(_attend_in_parts, attend, pack, size), qkv)
    dense = partial(dense_attention, sees=visible(pack, window), scale=SCALE, softcap=softcap)
    for x, y in zip(got, with_gradients(dense, qkv), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)


def test_layers_of_one_pack_share_its_layout_and_have_masks_of_their_own():
    layout = _layout(make_pack(*PACKS["shared_long"]))
    shared = [bucket for bucket in layout.buckets if bucket.has_prefixes]
    full, narrow, again = ([bucket.mask(window) for bucket in shared] for window in (None, 12, None))
    assert all(x is y for x, y in zip(full, again, strict=True))
    assert all(not torch.equal(x, y) for x, y in zip(full, narrow, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_attention_equals_dense_float64_on_random_groups(seed, size):
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(1, high, (), generator=generator))

    lengths, prefixes = [], []
    for _ in range(5):
        trunk, branches = len(lengths), draw(5) - 1
        lengths += [draw(70), *(draw(40) for _ in range(branches))]
        prefixes += [-1] + [trunk] * branches
    pack = make_pack(lengths, prefixes)
    qkv = random_qkv(pack.num_tokens, seed=seed)
    got = with_gradients(partial(_attend_in_parts, _sdpa, pack, size), qkv)
    for x, y in zip(got, with_gradients(_dense(pack), qkv), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)


# ---- kernels of CUDA: their index arithmetic, on stand-ins with the same contract ------------------------------------------


def _varlen_stand_in(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    softmax_scale,
    causal,
    window_size=(-1, -1),
    softcap=0.0,
):
    """flash-attn's contract: sequence i's queries see sequence i's keys, causally, aligned to the bottom right.

    A window (left, right) counts keys beside the query's own, -1 for all; a soft cap of 0 is none.
    """
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (q.size(0), k.size(0)) == (int(cu_seqlens_q[-1]), int(cu_seqlens_k[-1]))
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    of_query = torch.repeat_interleave(cu_seqlens_q.diff().long())
    of_key = torch.repeat_interleave(cu_seqlens_k.diff().long())
    from_end_q = cu_seqlens_q[1:].long()[of_query] - torch.arange(len(of_query))
    from_end_k = cu_seqlens_k[1:].long()[of_key] - torch.arange(len(of_key))
    sees = (of_query[:, None] == of_key[None, :]) & (from_end_k[None, :] >= from_end_q[:, None])
    if window_size[0] >= 0:
        assert window_size[1] == 0
        sees &= from_end_k[None, :] - from_end_q[:, None] <= window_size[0]
    return dense_attention(q, k, v, sees, softmax_scale, softcap or None)


def _flash_stand_in(q, k, v, *args, **kwargs):
    assert q.size(2) == k.size(2) == v.size(2), "flash-attn 2 takes one head size"
    return _varlen_stand_in(q, k, v, *args, **kwargs)


class _TransformerEngineStandIn(torch.nn.Module):
    """The part of Megatron's TEDotProductAttention that we use; masks as in TransformerEngine's documentation."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        *,
        softmax_scale,
        k_channels,
        v_channels,
        cp_comm_type,
        pg_collection,
    ):
        super().__init__()
        assert config.context_parallel_size == 1, "TransformerEngine refuses bottom-right masks under its own context parallelism"
        assert config.window_attn_skip_freq is None
        self.scale, self.window_size = softmax_scale, config.window_size or (-1, -1)

    def forward(self, q, k, v, attention_mask, *, attn_mask_type, packed_seq_params):
        p = packed_seq_params
        assert p.qkv_format == "thd"
        if attn_mask_type.name == "padding_causal":
            assert torch.equal(p.cu_seqlens_q, p.cu_seqlens_kv)
        else:
            assert attn_mask_type.name == "padding_causal_bottom_right"
        bounds = (p.cu_seqlens_q, p.cu_seqlens_kv, p.max_seqlen_q, p.max_seqlen_kv)
        out = _varlen_stand_in(q, k, v, *bounds, softmax_scale=self.scale, causal=True, window_size=self.window_size)
        return out.flatten(1)


def _module(backend, *, context=1, layer=1, **sight):
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=96, num_attention_heads=6, num_query_groups=2, kv_channels=16, context_parallel_size=context
    )
    groups = types.SimpleNamespace(cp=None)
    settings = dict(softmax_scale=SCALE, pg_collection=groups, backend=backend, **sight)
    return PackedAttention(config, layer, AttnMaskType.causal, "self", **settings)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("backend", ["flash", "transformer_engine"])
def test_varlen_kernels_get_bounds_and_keys_that_make_them_exact(backend, name, size, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=_flash_stand_in))
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.TEDotProductAttention", _TransformerEngineStandIn)
    module = _module(backend, context=size)
    module.context_group = None  # here the keys arrive gathered

    def attend(q, k, v, layout):
        out = module(q[:, None], k[:, None], v[:, None], None, packed_seq_params=layout)
        return out.view(*q.shape[:2], -1)

    pack = make_pack(*PACKS[name])
    qkv = random_qkv(pack.num_tokens, value_dim=VALUE_DIM.get(name), dtype=torch.float64)
    got = with_gradients(partial(_attend_in_parts, attend, pack, size), qkv)
    for x, y in zip(got, with_gradients(_dense(pack), qkv), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("backend", "softcap"), [("flash", 2.0), ("flash", None), ("transformer_engine", None)])
@pytest.mark.parametrize("name", ["ragged", "shared_twice"])
def test_varlen_kernels_are_told_a_layers_window_and_soft_cap(backend, softcap, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=_varlen_stand_in))
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.TEDotProductAttention", _TransformerEngineStandIn)
    pack = make_pack(*PACKS[name])
    qkv = random_qkv(pack.num_tokens, dtype=torch.float64)
    for layer, window in ((1, None), (2, 6)):
        module = _module(backend, context=2, layer=layer, windows=(None, 6), softcap=softcap)
        module.context_group = None

        def attend(q, k, v, layout, module=module):
            return module(q[:, None], k[:, None], v[:, None], None, packed_seq_params=layout).view(q.shape)

        got = _attend_in_parts(attend, pack, 2, *qkv)
        torch.testing.assert_close(got, dense_attention(*qkv, visible(pack, window), SCALE, softcap), rtol=1e-9, atol=1e-9)


def test_plain_packs_reach_varlen_kernels_without_a_copy_of_the_keys():
    assert _layout(make_pack([3, 9, 4])).varlen.key_rows is None


# ---- numerics and form -----------------------------------------------------------------------------------------------------


def _torch_per_sequence(pack, q, k, v):
    """torch's own SDPA, one call per sequence, in the inputs' dtype; keys of a trunk in front of a branch's own."""
    bounds = pack.cu_seqlens.tolist()
    prefixes = [-1] * (len(bounds) - 1) if pack.prefix_segments is None else pack.prefix_segments.tolist()
    outs = []
    for start, end, prefix in zip(bounds[:-1], bounds[1:], prefixes, strict=True):
        trunk = slice(bounds[prefix], bounds[prefix + 1]) if prefix >= 0 else slice(0, 0)
        one = [q[start:end], *(torch.cat([x[trunk], x[start:end]]) for x in (k, v))]
        one = [x.transpose(0, 1)[None] for x in one]
        mask = torch.ones(end - start, one[1].size(2), dtype=torch.bool).tril(one[1].size(2) - (end - start))
        outs.append(F.scaled_dot_product_attention(*one, attn_mask=mask, scale=SCALE, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("name", ["similar_lengths", "long_and_short", "shared_twice", "shared_long"])
@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_errs_no_more_than_twice_as_much_as_torch_per_sequence(name, size):
    pack = make_pack(*PACKS[name])
    qkv = random_qkv(pack.num_tokens, dtype=torch.bfloat16)
    got = with_gradients(partial(_attend_in_parts, _sdpa, pack, size), qkv)
    torchs = with_gradients(partial(_torch_per_sequence, pack), qkv)
    want = with_gradients(_dense(pack), qkv)
    for x, reference, y in zip(got, torchs, want, strict=True):
        error, allowed = (x.double() - y.double()).abs().mean(), (reference.double() - y.double()).abs().mean()
        assert error <= 2 * allowed + 1e-4


def test_no_sequence_sees_another():
    pack = make_pack([9, 9, 30])
    q, k, v = random_qkv(pack.num_tokens)
    before = _sdpa(q, k, v, _layout(pack))
    k[9:18], v[9:18] = 100.0, -100.0
    after = _sdpa(q, k, v, _layout(pack))
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[18:], after[18:])
    assert not torch.equal(before[9:18], after[9:18])


@pytest.mark.parametrize("shared", [False, True])
def test_buckets_hold_every_token_once_and_bound_the_padding(shared):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 700, (60,), generator=generator).tolist()
    prefixes = [-1 if i % 4 == 0 else i // 4 * 4 for i in range(60)] if shared else None
    layout = _layout(make_pack(lengths, prefixes))
    rows = layout.rows
    assert torch.equal(rows[layout.slots], torch.arange(sum(lengths)))
    assert layout.padding_slots.numel() == rows.numel() - sum(lengths)
    assert sum(bucket.num_segments for bucket in layout.buckets) == 60
    assert len(layout.buckets) <= (15 if not shared else 45)
    assert rows.numel() <= 1.15 * sum(lengths) + 8 * 60
    if shared:
        seen = sum(lengths) + sum(lengths[prefix] for prefix in prefixes if prefix >= 0)
        assert layout.key_rows.numel() <= 1.15 * seen + 16 * 60


def test_equal_lengths_are_one_bucket_that_needs_no_gathering():
    layout = _layout(make_pack([22, 22, 22]))
    (bucket,) = layout.buckets
    assert (bucket.num_segments, bucket.length, bucket.mask()) == (3, 22, None)
    assert bucket.mask(22) is None
    assert bucket.mask(21) is not None
    assert layout.is_one_batch
    assert not _layout(make_pack([22, 21, 22])).is_one_batch


def test_sequences_that_see_only_themselves_need_no_mask_beside_those_that_share():
    layout = _layout(make_pack([5, 5, 7, 4], [-1, 0, 0, 0]))
    masks = {bucket.num_keys - bucket.length: bucket.mask() for bucket in layout.buckets}
    assert masks.pop(0) is None
    assert all(mask is not None for mask in masks.values())
    assert masks


def test_a_layout_for_another_pack_is_refused():
    part = context_part(make_pack([5, 9]), 0, 2)
    with pytest.raises(ValueError, match=r"longer|shorter"):
        AttentionLayout(torch.tensor([0, 7], dtype=torch.int32), 7, None, part.context).segments  # noqa: B018


def test_the_choice_of_backend_states_its_remedy(monkeypatch):
    install_megatron_cpu_shim()
    assert choose_backend("auto", CPU, torch.bfloat16) == "sdpa"
    with pytest.raises(BackendUnavailableError, match=r"flash.*CUDA only.*model.attention=auto"):
        choose_backend("flash", CPU, torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match=r"transformer_engine.*CUDA only"):
        choose_backend("transformer_engine", CPU, torch.bfloat16)
    with pytest.raises(ConfigError, match="must be auto, sdpa, flash"):
        choose_backend("eager", CPU, torch.float32)
    installed = {"flash_attn"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert choose_backend("auto", CUDA, torch.bfloat16) == "flash"
    assert choose_backend("auto", CUDA, torch.float32) == "sdpa"
    with pytest.raises(BackendUnavailableError, match=r"no kernels for torch.float32.*model.dtype=bfloat16"):
        choose_backend("flash", CUDA, torch.float32)
    with pytest.raises(BackendUnavailableError, match="transformer-engine is not installed"):
        choose_backend("transformer_engine", CUDA, torch.bfloat16)
    installed.add("transformer_engine")
    assert choose_backend("auto", CUDA, torch.bfloat16) == "transformer_engine"
    assert choose_backend("auto", CUDA, torch.bfloat16, softcap=True) == "flash"
    with pytest.raises(BackendUnavailableError, match=r"transformer_engine, but its attention has no soft cap.*attention=flash"):
        choose_backend("transformer_engine", CUDA, torch.bfloat16, softcap=True)
    installed.clear()
    with pytest.raises(BackendUnavailableError, match="flash-attn is not installed"):
        choose_backend("flash", CUDA, torch.bfloat16)
