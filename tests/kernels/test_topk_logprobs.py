"""topk_logprobs, logprobs_at and truncation_floor against float64 and against a sampler's own truncation."""

import os

import pytest
import torch

from helpers.lm_head import make_case, require
from helpers.spawn import run_ranks
from skyrl_mega_kernels.linear_logprobs import linear_logprobs
from skyrl_mega_kernels.topk_logprobs import logprobs_at, topk_logprobs, truncation_floor
from skyrl_mega_kernels.topk_logprobs.ops import topk_logprobs_op, topk_sparse_backward_op


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request, monkeypatch):
    require(request.param)
    monkeypatch.setenv("SKYRL_MEGA_KERNELS", "auto" if request.param == "cpu" else "reference")
    return request.param


def teacher_ids(num_tokens, k, vocab):
    generator = torch.Generator().manual_seed(11)
    return torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(num_tokens)])


def exact_at(hidden, weight, ids, grads, temperature):
    """(logprobs at ids, lse, d hidden, d weight) in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight.t() / temperature
    values, lse = logits.log_softmax(-1).gather(1, ids), logits.logsumexp(-1)
    ((values * grads).sum() + 0.3 * lse.sum()).backward()
    return values.detach(), lse.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("given", [True, False], ids=["given_ids", "own_top_k"])
def test_values_and_gradients_match_float64(dtype, given):
    hidden, weight, _, _ = make_case(dtype=dtype)
    logits = hidden.double() @ weight.double().t()
    ids = teacher_ids(37, 6, 101) if given else logits.sort(dim=1, descending=True).indices[:, :6]
    grads = torch.randn(37, 6, generator=torch.Generator().manual_seed(2))
    exact = exact_at(hidden, weight, ids, grads.double(), 0.7)
    hidden.requires_grad_()
    weight.requires_grad_()
    if given:
        out = logprobs_at(hidden, weight, ids, temperature=0.7)
    else:
        out = topk_logprobs(hidden, weight, 6, temperature=0.7)
    if dtype == torch.float32:
        assert torch.equal(out.ids, ids)
    ((out.logprobs * grads).sum() + 0.3 * out.lse.sum()).backward()
    if dtype == torch.bfloat16 and not given:
        return  # another order of near ties is as right; the values are compared below in float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for mine, true in zip((out.logprobs, out.lse, hidden.grad, weight.grad), exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)


def test_masked_rows_and_absent_ids_send_no_gradient():
    hidden, weight, _, _ = make_case()
    ids = teacher_ids(37, 4, 101)
    ids[:, 3] = -1
    mask = torch.arange(37) % 2 == 0
    hidden[~mask] = torch.nan
    hidden.requires_grad_()
    out = logprobs_at(hidden, weight.requires_grad_(), ids, loss_mask=mask)
    assert out.logprobs[mask, 3].isneginf().all()
    assert (out.logprobs[~mask] == 0).all()
    assert (out.ids[~mask] == -1).all()
    out.logprobs[:, :3].sum().backward()
    exact = exact_at(hidden.detach()[mask], weight.detach(), ids[mask, :3], torch.ones(19, 3), 1.0)
    assert (hidden.grad[~mask] == 0).all()
    assert weight.grad.isfinite().all()
    torch.testing.assert_close(out.logprobs[mask, :3].double(), exact[0], rtol=1e-5, atol=1e-5)


def test_main_grad_and_bias_are_served():
    hidden, weight, _, _ = make_case()
    ids = teacher_ids(37, 4, 101)
    bias = torch.linspace(-1, 1, 101).requires_grad_()
    plain = weight.clone().requires_grad_()
    logprobs_at(hidden, plain, ids, bias=bias).logprobs.sum().backward()
    exact_bias = bias.detach().double().requires_grad_()
    table = (hidden.double() @ weight.double().t() + exact_bias).log_softmax(-1)
    table.gather(1, ids).sum().backward()
    torch.testing.assert_close(bias.grad.double(), exact_bias.grad, rtol=1e-5, atol=1e-5)
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.ones(weight.shape)
    logprobs_at(hidden, weight, ids, bias=bias).logprobs.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + plain.grad, rtol=1e-5, atol=1e-5)


def test_the_custom_ops_keep_the_dispatchers_rules():
    hidden, weight, _, _ = make_case(9, 8, 21)
    ids, mask = teacher_ids(9, 3, 21), torch.arange(9) % 3 > 0
    with_grads = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    for given in (ids, None):
        torch.library.opcheck(topk_logprobs_op, (*with_grads, None, given, 3, mask, 0.7, 0, 21, "", 4, "reference", 1.5))
    buffers = (torch.zeros(21, 8), torch.zeros(21))
    torch.library.opcheck(topk_sparse_backward_op, (hidden, weight, ids, torch.ones(9, 3), mask, 0, 21, "", *buffers))


@pytest.mark.parametrize("bad", [-2, 101])
def test_ids_outside_the_vocabulary_are_refused(bad):
    hidden, weight, _, _ = make_case()
    ids = teacher_ids(37, 4, 101)
    ids[5, 2] = bad
    with pytest.raises(ValueError, match=r"\[0, 101\), or be -1"):
        logprobs_at(hidden, weight, ids)
    with pytest.raises(ValueError, match="k \\(0\\) must be at least 1"):
        topk_logprobs(hidden, weight, 0)


def sampler_mask(logits, top_k, top_p):
    """What vLLM's sampler keeps: top-k with its ties, then the nucleus of the rest, in ascending order as it computes it."""
    values, order = logits.sort(dim=-1, descending=False)
    if top_k:
        kth = values.gather(1, torch.full((len(values), 1), values.shape[1] - top_k))
        values = values.masked_fill(values < kth, -torch.inf)
    if top_p < 1:
        mass = values.softmax(dim=-1).cumsum(dim=-1)
        dropped = mass <= 1 - top_p
        dropped[:, -1] = False
        values = values.masked_fill(dropped, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(1, order, values)


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (0, 0.6), (20, 0.8), (1, 1.0), (0, 1e-6), (500, 0.999)])
def test_renormalised_logprobs_are_those_of_a_truncated_sampler(top_k, top_p):
    hidden, weight, _, _ = make_case(scale=2.0)
    kept = sampler_mask((hidden.double() @ weight.double().t()) / 0.9, min(top_k, 101), top_p)
    generator = torch.Generator().manual_seed(4)
    labels = torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(1)
    floor = truncation_floor(hidden, weight, top_k=top_k, top_p=top_p, temperature=0.9)
    ours = linear_logprobs(hidden, weight, labels, temperature=0.9, floor=floor)
    torch.testing.assert_close(
        ours.logprobs.double(), kept.log_softmax(-1).gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )


def test_no_truncation_is_no_floor_and_uncounted_rows_have_none():
    hidden, weight, _, _ = make_case()
    assert truncation_floor(hidden, weight).isneginf().all()
    mask = torch.arange(37) < 5
    floor = truncation_floor(hidden, weight, top_k=3, loss_mask=mask, chunk_tokens=2)
    assert floor[:5].isfinite().all()
    assert floor[5:].isneginf().all()
    with pytest.raises(ValueError, match="top_p \\(0\\) in \\(0, 1\\]"):
        truncation_floor(hidden, weight, top_p=0)


def tensor_parallel_rank(rank: int, backend: str) -> None:
    os.environ["SKYRL_MEGA_KERNELS"] = backend
    torch.distributed.init_process_group("gloo")
    ranks, group = torch.distributed.get_world_size(), torch.distributed.group.WORLD
    width = 100 // ranks
    columns = slice(rank * width, (rank + 1) * width)
    hidden, weight, _, _ = make_case(vocab=100)
    grads = torch.randn(37, 5, generator=torch.Generator().manual_seed(2))
    for given in (teacher_ids(37, 5, 97), None):
        results = []
        for shard, place in ((weight, {}), (weight[columns], {"tp_group": group})):
            mine, part = hidden.clone().requires_grad_(), shard.clone().requires_grad_()
            if given is None:
                out = topk_logprobs(mine, part, 5, vocab_size=97, **place)
            else:
                out = logprobs_at(mine, part, given, vocab_size=97, **place)
            ((out.logprobs * grads).sum() + out.lse.sum()).backward()
            results.append((out.logprobs, out.ids.float(), mine.grad, part.grad))
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs[columns] if ours.shape[0] == width else theirs, rtol=1e-5, atol=1e-5)
    whole = truncation_floor(hidden, weight, top_k=40, top_p=0.7, vocab_size=97)
    split = truncation_floor(hidden, weight[columns], top_k=40, top_p=0.7, vocab_size=97, tp_group=group)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)
    torch.distributed.destroy_process_group()


def test_vocabulary_shards_equal_one(backend):
    run_ranks(tensor_parallel_rank, 2, "auto" if backend == "cpu" else backend)
