"""Blocked causal attention on CPU: values and gradients against float64, for any strides, saving only its inputs."""

import pytest
import torch
import torch.nn.functional as F

from skyrl_mega.models.cpu_attention import BLOCK_QUERIES, causal_attention

SCALE = 0.21


def oracle(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True).transpose(1, 2)


def gradients(function, inputs, grad):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def make_inputs(length, heads, kv_heads, dtype, value_dim=16):
    generator = torch.Generator().manual_seed(length)
    sizes = [(heads, 16), (kv_heads, 16), (kv_heads, value_dim), (heads, value_dim)]
    shapes = [(2, length, *size) for size in sizes]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("length", [1, BLOCK_QUERIES, 3 * BLOCK_QUERIES + 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_float32_equals_float64_within_rounding(length, heads, kv_heads):
    *inputs, grad = make_inputs(length, heads, kv_heads, torch.float32, value_dim=16 if heads == 6 else 9)
    ours = gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), inputs, grad)
    exact = gradients(oracle, [x.double() for x in inputs], grad.double())
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).abs().max() <= 5e-6 * max(1.0, theirs.abs().max())


def test_bfloat16_is_as_exact_as_torch():
    *inputs, grad = make_inputs(4 * BLOCK_QUERIES, 6, 2, torch.bfloat16)
    exact = gradients(oracle, [x.double() for x in inputs], grad.double())
    ours = gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), inputs, grad)
    torchs = gradients(oracle, inputs, grad)
    for mine, theirs, right in zip(ours, torchs, exact, strict=True):
        assert (mine - right).norm() <= 2 * (theirs - right).norm() + 1e-3 * right.norm()


def test_views_of_one_projection_are_taken_as_they_are():
    *inputs, grad = make_inputs(BLOCK_QUERIES + 3, 6, 2, torch.float32)
    joined = torch.cat(inputs, dim=2)
    views = joined.split([6, 2, 2], dim=2)
    assert not views[0].is_contiguous()
    for mine, theirs in zip(
        gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), views, grad.transpose(0, 1).contiguous().transpose(0, 1)),
        gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), inputs, grad),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_only_its_inputs_are_saved():
    *inputs, _ = make_inputs(2 * BLOCK_QUERIES, 6, 2, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        causal_attention(*leaves, SCALE)
    assert {t.data_ptr() for t in saved} == {x.data_ptr() for x in leaves}
