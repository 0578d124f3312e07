"""Norm and activation on CPU: values and gradients against float64, and nothing saved but their inputs."""

import pytest
import torch
import torch.nn.functional as F

from skyrl_mega.models.elementwise import CHUNK_VALUES, GeGLU, SwiGLU, rms_norm

#: Relative to the largest value: a few rounding steps of the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


def norm64(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def gated64(activation):
    def gated(x):
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    return gated


def gelu64(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gradients(function, inputs, grad):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(function, oracle, inputs, dtype, rows):
    grad = torch.randn(*rows, oracle(*inputs).shape[-1], dtype=torch.float64).to(dtype)
    before = grad.clone()
    inputs = [x.to(dtype) for x in inputs]
    ours = gradients(function, inputs, grad)
    theirs = gradients(oracle, [x.double() for x in inputs], grad.double())
    assert torch.equal(grad, before), "the incoming gradient was written to"
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


#: One chunk, several chunks of which the last is partial, a single row.
ROWS = [(7, 1), (2 * CHUNK_VALUES // 96 + 5, 1), (1, 1)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_and_its_gradients_are_those_of_float64(dtype, rows):
    torch.manual_seed(0)
    inputs = [torch.randn(*rows, 96, dtype=torch.float64) * 3, torch.rand(96, dtype=torch.float64) + 0.5]
    check(lambda x, w: rms_norm(x, w, 1e-5), norm64, inputs, dtype, rows)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("ours", "activation"), [(SwiGLU(), F.silu), (GeGLU(), gelu64)], ids=["swiglu", "geglu"])
def test_gated_activations_and_their_gradients_are_those_of_float64(ours, activation, dtype, rows):
    torch.manual_seed(0)
    check(ours, gated64(activation), [torch.randn(*rows, 2 * 96, dtype=torch.float64)], dtype, rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_norm_with_a_unit_offset_and_its_gradients_are_those_of_float64(dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(*ROWS[1], 96, dtype=torch.float64) * 3, 0.3 * torch.randn(96, dtype=torch.float64)]
    check(lambda x, w: rms_norm(x, w, 1e-5, unit_offset=True), lambda x, w: norm64(x, 1 + w), inputs, dtype, ROWS[1])


def test_a_unit_offset_is_added_before_rounding():
    """As in Hugging Face: in bfloat16 1 + 2^-9 is 1, and a row times it is not itself."""
    x, weight = torch.full((1, 96), 1.0078125).bfloat16(), torch.full((96,), 2.0**-9).bfloat16()
    exact = norm64(x.double(), 1 + weight.double()).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5, unit_offset=True), exact)


@pytest.mark.parametrize("function", [lambda x: rms_norm(x, torch.ones(x.size(-1), requires_grad=True), 1e-5), SwiGLU(), GeGLU()])
def test_only_the_input_is_saved(function):
    x = torch.randn(64, 1, 96, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(x)
    large = [t for t in saved if t.numel() > 96]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(3, 96, requires_grad=True)
    rms_norm(x, torch.ones(96), 1e-5).sum().backward()
    assert torch.isfinite(x.grad).all()
