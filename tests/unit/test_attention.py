"""Packed attention against a float64 loop over sequences; the choice of backend."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega.models.attention import SHORT_SEQUENCE, PackedSequences, choose_backend, make_buckets, packed_sdpa
from skyrl_mega.parallel.device import install_megatron_cpu_shim

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

PACKS = {
    "one_token": [1],
    "equal_lengths": [22] * 5,
    "similar_lengths": [22, 18, 26, 20, 25],
    "ragged": [7, 33, 5, 20, 1, 90, 2],
    "long_and_short": [SHORT_SEQUENCE + 60, 3, SHORT_SEQUENCE + 1, 40],
    "empty_sequence_inside": [4, 0, 9],
}


def _pack(lengths, heads=6, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(total, h, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, PackedSequences(cu_seqlens, max(lengths))


def _oracle(q, k, v, packed, scale):
    """Masked softmax per sequence in float64, keys and values repeated per query head."""
    repeats = q.size(1) // k.size(1)
    q, k, v = q.double(), k.double().repeat_interleave(repeats, 1), v.double().repeat_interleave(repeats, 1)
    outs = []
    bounds = packed.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), v[start:end]))
    return torch.cat(outs)


def _torch_per_sequence(q, k, v, packed, scale):
    """torch's own SDPA, one call per sequence, in the inputs' dtype."""
    outs = []
    bounds = packed.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        one = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


def _with_gradients(function, q, k, v, packed, scale):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, packed, scale)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out.double() * weights).sum().backward()
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4)])
def test_packed_attention_equals_a_float64_loop_over_sequences(lengths, heads, kv_heads):
    inputs = _pack(lengths, heads, kv_heads)
    got = _with_gradients(packed_sdpa, *inputs, 0.3)
    want = _with_gradients(_oracle, *inputs, 0.3)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["similar_lengths", "long_and_short"])
def test_bfloat16_errs_no_more_than_twice_as_much_as_torch_per_sequence(name):
    inputs = _pack(PACKS[name], dtype=torch.bfloat16)
    got = _with_gradients(packed_sdpa, *inputs, 0.25)
    torchs = _with_gradients(_torch_per_sequence, *inputs, 0.25)
    want = _with_gradients(_oracle, *inputs, 0.25)
    for x, reference, y in zip(got, torchs, want, strict=True):
        error, allowed = (x.double() - y.double()).abs().mean(), (reference.double() - y.double()).abs().mean()
        assert error <= 2 * allowed + 1e-4


def test_no_sequence_sees_another():
    q, k, v, packed = _pack([9, 9, 30])
    before = packed_sdpa(q, k, v, packed, 1.0)
    k[9:18], v[9:18] = 100.0, -100.0
    after = packed_sdpa(q, k, v, packed, 1.0)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[18:], after[18:])
    assert not torch.equal(before[9:18], after[9:18])


def test_buckets_hold_every_token_once_and_bound_the_padding():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 700, (60,), generator=generator).tolist()
    packed = _pack(lengths, 1, 1, 1)[3]
    buckets = make_buckets(packed.cu_seqlens)
    rows = torch.cat([bucket.rows for bucket in buckets])
    assert torch.equal(rows[packed.slots], torch.arange(sum(lengths)))
    assert packed.padding_slots.numel() == rows.numel() - sum(lengths)
    assert sum(bucket.num_sequences for bucket in buckets) == 60
    assert len(buckets) <= 15
    assert rows.numel() <= 1.25 * sum(lengths) + 16 * 60


def test_equal_lengths_are_one_bucket_that_needs_no_gathering():
    (bucket,) = make_buckets(torch.tensor([0, 22, 44, 66], dtype=torch.int32))
    assert (bucket.num_sequences, bucket.length, bucket.whole) == (3, 22, True)


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
    installed.clear()
    with pytest.raises(BackendUnavailableError, match="flash-attn is not installed"):
        choose_backend("flash", CUDA, torch.bfloat16)
