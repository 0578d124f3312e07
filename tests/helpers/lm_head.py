"""Cases and oracles that the tests of the LM-head operators share."""

from __future__ import annotations

import pytest
import torch

from skyrl_mega_kernels.linear_logprobs.ops import OPERATOR

BACKENDS = ("reference", "cpu", "triton")


def require(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Skips the test, with the reason, where `backend` can't run on this machine's CPU tensors."""
    reason = OPERATOR.unavailable(backend, torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")


def make_case(num_tokens=37, hidden_size=24, vocab=101, *, dtype=torch.float32, scale=1.0, seed=0):
    """hidden [T, H], weight [V, H], labels [T] and incoming gradients [2, T] of logprobs and entropy."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).mul(scale).to(dtype)
    weight = torch.randn(vocab, hidden_size, generator=generator).mul(hidden_size**-0.5).to(dtype)
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    grads = torch.randn(2, num_tokens, generator=generator)
    return hidden, weight, labels, grads


def eager(hidden, weight, labels, *, temperature=1.0, vocab_size=None, bias=None, floor=None, logit_softcap=None):
    """The formula, materialised: logits in the inputs' dtype, softmax in float32 or better. Returns (logprobs, entropy, lse)."""
    logits = (hidden @ weight[:vocab_size].t()).to(torch.promote_types(hidden.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias[:vocab_size]
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    logits = logits / temperature
    if floor is not None:
        kept = (logits >= floor[:, None]).scatter(1, labels[:, None], True)
        logits = logits.masked_fill(~kept, -torch.inf)
    table = logits.log_softmax(-1)
    entropy = -(table.exp() * table.masked_fill(table.isneginf(), 0.0)).sum(-1)
    return table.gather(1, labels[:, None])[:, 0], entropy, logits.logsumexp(-1)


def run_with_grads(function, hidden, weight, labels, grads, **settings):
    """(logprobs, entropy, d hidden, d weight) in float64, for the loss grads[0] . logprobs + grads[1] . entropy."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logprobs, entropy = function(hidden, weight, labels, **settings)[:2]
    (logprobs @ grads[0].to(logprobs.dtype) + entropy @ grads[1].to(logprobs.dtype)).backward()
    return [tensor.detach().double() for tensor in (logprobs, entropy, hidden.grad, weight.grad)]


def oracle(hidden, weight, labels, grads, **settings):
    """`run_with_grads` of the formula in float64."""
    settings = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
    return run_with_grads(eager, hidden.double(), weight.double(), labels, grads.double(), **settings)


def assert_as_good_as_eager(ours, same_dtype_eager, exact, *, factor=2.5, floor=2e-6):
    """Each of ours errs at most `factor` times as much as eager in the same dtype does, plus a small constant."""
    for name, mine, theirs, true in zip(
        ("logprobs", "entropy", "d_hidden", "d_weight"), ours, same_dtype_eager, exact, strict=True
    ):
        scale = max(1.0, true.abs().max().item())
        error, allowed = (mine - true).abs().max().item(), factor * (theirs - true).abs().max().item() + floor * scale
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
