"""The public operators on a GPU, on every backend that can run there: against float64, and against each other."""

import pytest
import torch

from helpers.lm_head import assert_as_good_as_eager, eager, make_case, oracle, run_with_grads
from helpers.loss_terms_cases import KINDS, assert_terms_as_good_as_torch, terms_case
from helpers.policy_loss_cases import assert_as_good_as_torch, random_case
from skyrl_mega_kernels.backends import backends_that_ran
from skyrl_mega_kernels.linear_logprobs import linear_logprobs
from skyrl_mega_kernels.linear_policy_loss import linear_policy_loss
from skyrl_mega_kernels.logits_logprobs import logits_logprobs
from skyrl_mega_kernels.logits_logprobs.ops import OPERATOR as LOGITS
from skyrl_mega_kernels.policy_loss import LOSSES
from skyrl_mega_kernels.segmented_gae import segmented_gae
from skyrl_mega_kernels.segmented_gae.ops import OPERATOR as GAE
from skyrl_mega_kernels.topk_logprobs import topk_logprobs, truncation_floor

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
GPU = torch.device("cuda")


def case_on_gpu(dtype, num_tokens=1000, hidden_size=576, vocab=49152):
    return [tensor.to(GPU) for tensor in make_case(num_tokens, hidden_size, vocab, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_linear_logprobs_is_as_good_as_eager(dtype, backend):
    hidden, weight, labels, grads = case_on_gpu(dtype)
    ours = run_with_grads(linear_logprobs, hidden, weight, labels, grads, return_entropy=True, temperature=0.7, backend=backend)
    theirs = run_with_grads(eager, hidden, weight, labels, grads, temperature=0.7)
    assert_as_good_as_eager(ours, theirs, oracle(hidden, weight, labels, grads, temperature=0.7), factor=3)


def test_auto_runs_triton_and_one_pass_gives_the_gradients_of_two(monkeypatch):
    monkeypatch.delenv("SKYRL_MEGA_KERNELS", raising=False)
    hidden, weight, labels, grads = case_on_gpu(torch.bfloat16)
    expected = run_with_grads(linear_logprobs, hidden, weight, labels, grads, return_entropy=True)
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros(weight.shape, device=GPU)
    hidden.requires_grad_()
    linear_policy_loss(
        *(hidden, weight, labels),
        lambda index, logprobs, entropy: (logprobs @ grads[0][index] + entropy @ grads[1][index], None),
        return_entropy=True,
        chunk_tokens=300,
    ).loss.backward()
    assert "triton" in backends_that_ran()["linear_policy_loss"]
    torch.testing.assert_close(hidden.grad.double(), expected[2], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.main_grad.double(), expected[3], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("k", [5, 200])
def test_top_k_and_truncation_agree_with_torch(k):
    hidden, weight, _, _ = case_on_gpu(torch.float32, 200)
    logits = hidden.double() @ weight.double().t()
    values = logits.log_softmax(-1).sort(descending=True).values
    torch.testing.assert_close(topk_logprobs(hidden, weight, k).logprobs.double(), values[:, :k], rtol=1e-3, atol=1e-3)
    kth = logits.sort(descending=True).values[:, k - 1]
    torch.testing.assert_close(truncation_floor(hidden, weight, top_k=k).double(), kth, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_logprobs_matches_float64(dtype, backend, inplace):
    if (reason := LOGITS.unavailable(backend, GPU, dtype)) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 30011, generator=generator).mul(3).to(GPU, dtype)
    labels = torch.randint(0, 30011, (300,), generator=generator).to(GPU)
    exact = logits.double().requires_grad_()
    table = exact.log_softmax(-1)
    true = table.gather(1, labels[:, None])[:, 0], -(table.exp() * table).sum(-1)
    (true[0].sum() + true[1].sum()).backward()
    leaf = logits.clone().requires_grad_()
    out = logits_logprobs(leaf * 1.0, labels, return_entropy=True, top_k=20, inplace_backward=inplace, backend=backend)
    torch.testing.assert_close(out.logprobs.double(), true[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), true[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.topk_logprobs.double(), table.topk(20).values, rtol=1e-5, atol=1e-5)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("lengths", [[64] * 2000, [100_000], [0, 1, 3000, 257, 0, 40_000]], ids=["many", "one", "mixed"])
def test_segmented_gae_matches_the_reference_in_float64(backend, lengths):
    if (reason := GAE.unavailable(backend, GPU, torch.float32)) is not None:
        pytest.skip(reason)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, int(cu_seqlens[-1]), generator=generator)
    bootstrap = torch.randn(len(lengths), generator=generator)
    settings = dict(gamma=0.99, lam=0.95)
    exact = segmented_gae(rewards.double(), values.double(), cu_seqlens, bootstrap_values=bootstrap.double(), **settings)
    ours = segmented_gae(
        *(rewards.to(GPU), values.to(GPU), cu_seqlens.to(GPU)), bootstrap_values=bootstrap.to(GPU), backend=backend, **settings
    )
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.cpu().double(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses_match_float64(name):
    assert_as_good_as_torch(name, random_case([5000, 0, 311, 1], device="cuda"), "triton")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_loss_terms_match_float64(kind):
    assert_terms_as_good_as_torch(kind, terms_case([5000, 0, 311, 1], device="cuda"), "triton")
