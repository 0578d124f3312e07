"""LM heads with capped logits (Gemma 2): every operator against the formula in float64, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from helpers.lm_head import assert_as_good_as_eager, eager, make_case, oracle, require, run_with_grads
from skyrl_mega_kernels.linear_logprobs import linear_logprobs
from skyrl_mega_kernels.linear_policy_loss import linear_policy_loss
from skyrl_mega_kernels.topk_logprobs import logprobs_at, topk_logprobs, truncation_floor

CAP, TEMPERATURE = 1.5, 0.7
#: Triton's own kernels are tested in its interpreter (`triton_interpreter_session.py`).
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


def capped64(hidden, weight):
    logits = hidden.double() @ weight.double().t()
    return (CAP * torch.tanh(logits / CAP) / TEMPERATURE).log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@BACKENDS
@pytest.mark.parametrize("with_floor", [False, True])
def test_logprobs_and_entropy_of_capped_logits(dtype, with_floor, backend):
    require(backend, dtype)
    hidden, weight, labels, grads = make_case(dtype=dtype)
    settings = {"temperature": TEMPERATURE, "logit_softcap": CAP}
    if with_floor:
        settings["floor"] = torch.linspace(-3, 0, labels.numel())

    def operator(*tensors, **kwargs):
        out = linear_logprobs(*tensors, return_entropy=True, chunk_tokens=8, backend=backend, **kwargs)
        return out.logprobs, out.entropy

    ours = run_with_grads(operator, hidden, weight, labels, grads, **settings)
    same_dtype = run_with_grads(eager, hidden, weight, labels, grads, **settings)
    assert_as_good_as_eager(ours, same_dtype, oracle(hidden, weight, labels, grads, **settings))


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)])
def test_a_loss_in_one_pass_over_capped_logits(backend, dtype):
    require(backend, dtype)
    hidden, weight, labels, _ = make_case(dtype=dtype)
    factors = torch.linspace(-1, 2, labels.numel(), dtype=torch.float64)

    def loss_fn(index, logprobs, entropy):
        return (factors[index].to(dtype) * (logprobs + 0.3 * entropy)).sum(), None

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    settings = {"temperature": TEMPERATURE, "logit_softcap": CAP}
    loss = linear_policy_loss(*leaves, labels, loss_fn, return_entropy=True, chunk_tokens=8, backend=backend, **settings).loss
    loss.backward()
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logprobs, entropy, _ = eager(*exact, labels, **settings)
    expected = (factors * (logprobs + 0.3 * entropy)).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.to(dtype))
    for mine, theirs in zip(leaves, exact, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.to(dtype))


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)])
def test_chosen_and_given_tokens_of_capped_logits(backend, dtype):
    require(backend, dtype)
    hidden, weight, _, _ = make_case(dtype=dtype)
    settings = {"temperature": TEMPERATURE, "logit_softcap": CAP, "chunk_tokens": 8, "backend": backend}
    top = topk_logprobs(hidden, weight, 4, **settings)
    expected = capped64(hidden, weight).topk(4)
    assert torch.equal(top.ids, expected.indices)
    torch.testing.assert_close(top.logprobs, expected.values.to(dtype))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    ids = torch.randint(0, weight.size(0), (hidden.size(0), 3), generator=torch.Generator().manual_seed(1))
    ids[2, 1] = -1
    found = logprobs_at(*leaves, ids, **settings).logprobs
    factors = torch.linspace(-1, 1, ids.numel(), dtype=dtype).view_as(ids)
    (found.masked_fill(ids < 0, 0) * factors).sum().backward()
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    table = capped64(*exact).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
    (table * factors).sum().backward()
    torch.testing.assert_close(found.masked_fill(ids < 0, 0), table.to(dtype))
    for mine, theirs in zip(leaves, exact, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.to(dtype))


def test_a_samplers_cut_is_that_of_capped_logits():
    hidden, weight, _, _ = make_case(dtype=torch.float64)
    floor = truncation_floor(hidden, weight, top_k=5, temperature=TEMPERATURE, logit_softcap=CAP)
    logits = CAP * torch.tanh(hidden @ weight.t() / CAP) / TEMPERATURE
    assert torch.equal((logits >= floor[:, None]).sum(1), torch.full((hidden.size(0),), 5))


def test_caps_that_are_none_are_refused():
    hidden, weight, labels, _ = make_case()
    with pytest.raises(ValueError, match=r"logit_softcap \(0.0\) must be positive"):
        linear_logprobs(hidden, weight, labels, logit_softcap=0.0)
