"""linear_policy_loss: the same loss and gradients as linear_logprobs followed by the loss, with the logits made once."""

import os

import pytest
import torch

from helpers.lm_head import make_case, require
from helpers.spawn import run_ranks
from skyrl_mega.algorithms.loss import Objective
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.config.schema import AlgorithmConfig, KLConfig
from skyrl_mega_kernels.linear_logprobs import linear_logprobs
from skyrl_mega_kernels.linear_policy_loss import linear_policy_loss

ALGORITHM = AlgorithmConfig(entropy_coef=0.03, kl=KLConfig(coef=0.1, estimator="k3"))


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    require(request.param)
    return request.param


def make_batch(labels, seed=5):
    """Per-token inputs of the objective [T], for a third of the tokens masked out."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = len(labels)
    mask = torch.arange(num_tokens) % 3 != 1
    other = [-4.6 + 0.1 * torch.randn(num_tokens, generator=generator) for _ in range(3)]
    return mask, torch.randn(num_tokens, generator=generator), other, mask.float() / mask.sum()


def objective(labels, index, logprobs, entropy):
    """The ordinary objective of skyrl_mega.algorithms on the tokens `index` of the pack."""
    mask, advantages, (old, rollout, ref), weights = make_batch(labels)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=old[index].to(logprobs.dtype),
        rollout_logprobs=rollout[index].to(logprobs.dtype),
        advantages=advantages[index].to(logprobs.dtype),
        loss_mask=mask[index],
        entropy=entropy,
        ref_logprobs=ref[index].to(logprobs.dtype),
    )
    loss, stats = Objective(ALGORITHM)(inputs, weights[index].to(logprobs.dtype))
    return loss, {**stats.sums, "tokens": torch.tensor(float(len(index)))}


def two_steps(hidden, weight, labels, **settings):
    """[loss, d hidden, d weight] by linear_logprobs and then the objective."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprobs(hidden, weight, labels, loss_mask=make_batch(labels)[0], return_entropy=True, **settings)
    loss, _ = objective(labels, torch.arange(len(labels)), out.logprobs, out.entropy)
    loss.backward()
    return [tensor.detach().double() for tensor in (loss, hidden.grad, weight.grad)]


def one_pass(hidden, weight, labels, **settings):
    """The same by linear_policy_loss, with what its chunks collected."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_policy_loss(
        *(hidden, weight, labels, lambda *chunk: objective(labels, *chunk)),
        loss_mask=make_batch(labels)[0],
        return_entropy=True,
        **settings,
    )
    out.loss.backward()
    return [tensor.detach().double() for tensor in (out.loss, hidden.grad, weight.grad)], out.collected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1024])
def test_loss_and_gradients_match_float64_as_well_as_two_steps_do(dtype, chunk_tokens, backend):
    hidden, weight, labels, _ = make_case(dtype=dtype)
    exact = two_steps(hidden.double(), weight.double(), labels, temperature=0.7, backend="reference")
    theirs = two_steps(hidden, weight, labels, temperature=0.7, backend=backend)
    ours, collected = one_pass(hidden, weight, labels, temperature=0.7, chunk_tokens=chunk_tokens, backend=backend)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert (mine - true).abs().max() <= 2.5 * (other - true).abs().max() + 2e-6
    assert sum(stats["tokens"] for stats in collected) == make_batch(labels)[0].sum()
    assert sum(stats["loss/total"] for stats in collected) == pytest.approx(ours[0].item(), rel=1e-5)


def test_float64_passes_gradcheck_through_the_policy_loss():
    hidden, weight, labels, _ = make_case(6, 4, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: (
            linear_policy_loss(
                *(hidden, weight, labels, lambda *chunk: objective(labels, *chunk)),
                loss_mask=make_batch(labels)[0],
                return_entropy=True,
                chunk_tokens=2,
            ).loss
        ),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_padded_columns_bias_and_floor_mean_what_they_mean_to_linear_logprobs(backend):
    hidden, weight, labels, _ = make_case()
    labels = labels % 90
    weight[90:] = 50.0
    floor = torch.full((37,), 0.1)
    settings = dict(vocab_size=90, bias=torch.linspace(-1, 1, 101), floor=floor, backend=backend)
    expected = two_steps(hidden, weight, labels, **settings)
    ours, _ = one_pass(hidden, weight, labels, chunk_tokens=8, **settings)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_main_grad_is_added_to_and_a_scaled_loss_is_refused(backend):
    hidden, weight, labels, _ = make_case()
    expected, _ = one_pass(hidden, weight, labels, backend=backend)
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.full(weight.shape, 0.5)
    settings = dict(loss_mask=make_batch(labels)[0], return_entropy=True, backend=backend, chunk_tokens=9)
    out = linear_policy_loss(hidden.requires_grad_(), weight, labels, lambda *chunk: objective(labels, *chunk), **settings)
    out.loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad.double(), 0.5 + expected[2], rtol=1e-5, atol=1e-6)
    out = linear_policy_loss(hidden, weight, labels, lambda *chunk: objective(labels, *chunk), **settings)
    with pytest.raises(RuntimeError, match=r"scaled by 2\.0"):
        (2 * out.loss).backward()


def test_without_main_grad_the_loss_may_be_scaled(backend):
    hidden, weight, labels, _ = make_case()
    expected, _ = one_pass(hidden, weight, labels, backend=backend)
    weight.requires_grad_()
    out = linear_policy_loss(
        *(hidden, weight, labels, lambda *chunk: objective(labels, *chunk)),
        loss_mask=make_batch(labels)[0],
        return_entropy=True,
        backend=backend,
    )
    (3 * out.loss).backward()
    torch.testing.assert_close(weight.grad.double(), 3 * expected[2], rtol=1e-5, atol=1e-6)
    assert hidden.grad is None


def test_no_gradient_is_computed_without_grad_mode_and_no_token_still_gives_a_loss(backend):
    hidden, weight, labels, _ = make_case()
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros(weight.shape)
    settings = dict(return_entropy=True, backend=backend)
    with torch.no_grad():
        linear_policy_loss(hidden, weight, labels, lambda *chunk: objective(labels, *chunk), **settings)
    assert (weight.main_grad == 0).all()
    nothing = torch.zeros(37, dtype=torch.bool)
    out = linear_policy_loss(
        hidden.requires_grad_(), weight, labels, lambda *chunk: objective(labels, *chunk), loss_mask=nothing, **settings
    )
    assert out.loss == 0
    assert len(out.collected) == 1
    out.loss.backward()
    assert (hidden.grad == 0).all()


def test_a_loss_function_that_returns_no_scalar_is_refused():
    hidden, weight, labels, _ = make_case()
    with pytest.raises(ValueError, match=r"must return a scalar loss; got shape \(37,\)"):
        linear_policy_loss(hidden, weight, labels, lambda index, logprobs, entropy: (logprobs, None))


def tensor_parallel_rank(rank: int, backend: str) -> None:
    os.environ["SKYRL_MEGA_KERNELS"] = backend
    torch.distributed.init_process_group("gloo")
    ranks, group = torch.distributed.get_world_size(), torch.distributed.group.WORLD
    width = 100 // ranks
    cases = [(torch.float32, 97, None), (torch.float32, 97, 1.5), (torch.float32, 50, None), (torch.bfloat16, 97, None)]
    for dtype, vocab_size, softcap in cases:
        hidden, weight, labels, _ = make_case(dtype=dtype, vocab=100)
        labels = labels % vocab_size
        columns = slice(rank * width, (rank + 1) * width)
        settings = dict(vocab_size=vocab_size, temperature=0.8, chunk_tokens=8, logit_softcap=softcap)
        ours, _ = one_pass(hidden, weight[columns], labels, tp_group=group, **settings)
        whole, _ = one_pass(hidden, weight, labels, **settings)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for mine, true in zip(ours, (whole[0], whole[1], whole[2][columns]), strict=True):
            torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance)
        torch.distributed.all_gather(gathered := [torch.empty_like(ours[1]) for _ in range(ranks)], ours[1])
        assert all(torch.equal(other, ours[1]) for other in gathered), "ranks must hold identical gradients"
    torch.distributed.destroy_process_group()


def test_vocabulary_shards_equal_one(backend):
    run_ranks(tensor_parallel_rank, 2, "auto" if backend == "cpu" else backend)
