"""linear_logprobs against float64 autograd of the plain formula, on one rank and over a vocabulary split in two."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from helpers.spawn import run_ranks
from skyrl_mega_kernels.linear_logprobs import linear_logprobs


def make_case(num_tokens=37, hidden_size=24, vocab=101, *, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).mul(scale).to(dtype)
    weight = torch.randn(vocab, hidden_size, generator=generator).mul(hidden_size**-0.5).to(dtype)
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    grads = torch.randn(2, num_tokens, generator=generator)
    return hidden, weight, labels, grads


def eager(hidden, weight, labels, *, temperature=1.0, vocab_size=None):
    """The formula, materialised: logits in the inputs' dtype, softmax in float32 or better."""
    logits = (hidden @ weight[:vocab_size].t()).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    table = logits.log_softmax(-1)
    return table.gather(1, labels[:, None])[:, 0], -(table.exp() * table).sum(-1)


def run_with_grads(function, hidden, weight, labels, grads, **settings):
    """(logprobs, entropy, d hidden, d weight) in float64, for the loss grads[0] . logprobs + grads[1] . entropy."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logprobs, entropy = function(hidden, weight, labels, **settings)[:2]
    (logprobs @ grads[0].to(logprobs.dtype) + entropy @ grads[1].to(logprobs.dtype)).backward()
    return [tensor.detach().double() for tensor in (logprobs, entropy, hidden.grad, weight.grad)]


def oracle(hidden, weight, labels, grads, **settings):
    return run_with_grads(eager, hidden.double(), weight.double(), labels, grads.double(), **settings)


def assert_as_good_as_eager(ours, same_dtype_eager, exact, *, factor=2.5, floor=2e-6):
    for name, mine, theirs, true in zip(
        ("logprobs", "entropy", "d_hidden", "d_weight"), ours, same_dtype_eager, exact, strict=True
    ):
        scale = max(1.0, true.abs().max().item())
        error, allowed = (mine - true).abs().max().item(), factor * (theirs - true).abs().max().item() + floor * scale
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1024])
def test_values_and_gradients_match_the_float64_oracle_for_any_chunking(dtype, chunk_tokens):
    hidden, weight, labels, grads = make_case(dtype=dtype)
    settings = dict(temperature=0.7)
    ours = run_with_grads(
        linear_logprobs, hidden, weight, labels, grads, return_entropy=True, chunk_tokens=chunk_tokens, **settings
    )
    reference = run_with_grads(eager, hidden, weight, labels, grads, **settings)
    assert_as_good_as_eager(ours, reference, oracle(hidden, weight, labels, grads, **settings))


def test_float64_inputs_give_float64_outputs_and_pass_gradcheck():
    hidden, weight, labels, _ = make_case(5, 4, 7, dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    mask = torch.tensor([True, False, True, True, True])

    def outputs(hidden, weight):
        return linear_logprobs(
            hidden, weight, labels.clamp(max=5), loss_mask=mask, vocab_size=6, return_entropy=True, chunk_tokens=2
        )[:3]

    assert outputs(hidden, weight)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(outputs, (hidden, weight))


def test_masked_rows_are_exactly_zero_send_no_gradient_and_may_hold_any_label():
    hidden, weight, labels, grads = make_case()
    mask = torch.rand(len(labels), generator=torch.Generator().manual_seed(3)) < 0.4
    labels[~mask] = -100
    hidden[~mask] = torch.nan
    ours = run_with_grads(linear_logprobs, hidden, weight, labels, grads, loss_mask=mask, return_entropy=True, chunk_tokens=4)
    exact = oracle(hidden[mask], weight, labels[mask], grads[:, mask])
    for tensor in ours[:3]:
        assert (tensor[~mask] == 0).all()
    torch.testing.assert_close(ours[3], exact[3], rtol=1e-5, atol=1e-6)
    for mine, true in zip(ours[:3], exact[:3], strict=True):
        torch.testing.assert_close(mine[mask], true, rtol=1e-5, atol=1e-6)


def test_logits_near_plus_and_minus_110_lose_nothing():
    # A maximum that starts at 0 instead of -inf turns the rows at -110 into infinities.
    for offset in (-110.0, 110.0):
        hidden, weight, labels, grads = make_case()
        hidden[:, 0], weight[:, 0] = offset, 1.0
        ours = run_with_grads(linear_logprobs, hidden, weight, labels, grads, return_entropy=True)
        reference = run_with_grads(eager, hidden, weight, labels, grads)
        assert_as_good_as_eager(ours, reference, oracle(hidden, weight, labels, grads), floor=1e-5)


def test_padded_vocabulary_columns_count_neither_forward_nor_backward():
    hidden, weight, labels, grads = make_case()
    labels = labels % 90
    weight[90:] = 50.0
    ours = run_with_grads(linear_logprobs, hidden, weight, labels, grads, vocab_size=90, return_entropy=True)
    exact = oracle(hidden, weight, labels, grads, vocab_size=90)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
    assert (ours[3][90:] == 0).all()
    assert (ours[0] <= 0).all()


def test_entropy_of_a_uniform_distribution_is_log_vocab_and_of_a_certain_one_zero():
    weight = torch.zeros(50, 4)
    _, entropy, *_ = linear_logprobs(torch.randn(3, 4), weight, torch.zeros(3, dtype=torch.int64), return_entropy=True)
    torch.testing.assert_close(entropy, torch.full((3,), 50.0).log())
    weight[7] = 100.0
    logprobs, entropy, *_ = linear_logprobs(torch.ones(3, 4), weight, torch.full((3,), 7), return_entropy=True)
    assert (logprobs == 0).all()
    assert (entropy.abs() < 1e-30).all()


def test_entropy_is_computed_only_when_asked_for():
    hidden, weight, labels, _ = make_case()
    assert linear_logprobs(hidden, weight, labels).entropy is None


@pytest.mark.parametrize("num_tokens", [0, 6])
def test_no_rows_at_all_give_zeros_that_are_still_part_of_the_graph(num_tokens):
    hidden, weight, labels, _ = make_case(num_tokens)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, entropy, *_ = linear_logprobs(
        hidden, weight, labels, loss_mask=torch.zeros(num_tokens, dtype=torch.bool), return_entropy=True
    )
    assert logprobs.shape == entropy.shape == (num_tokens,)
    assert (logprobs == 0).all()
    (logprobs.sum() + entropy.sum()).backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_frozen_weight_gets_no_gradient_and_frozen_hidden_neither():
    hidden, weight, labels, _ = make_case()
    linear_logprobs(hidden.requires_grad_(), weight, labels).logprobs.sum().backward()
    assert weight.grad is None
    expected, hidden.grad = hidden.grad, None
    linear_logprobs(hidden.detach(), weight.requires_grad_(), labels).logprobs.sum().backward()
    assert hidden.grad is None
    assert weight.grad is not None
    assert expected.abs().max() > 0


@pytest.mark.parametrize("bad_label", [-1, 90, 100])
def test_labels_outside_the_valid_vocabulary_are_refused(bad_label):
    hidden, weight, labels, _ = make_case()
    labels = labels % 90
    labels[11] = bad_label
    with pytest.raises(ValueError, match=rf"\[0, 90\).*1 do not, the first is {bad_label}"):
        linear_logprobs(hidden, weight, labels, vocab_size=90)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(9, 5)}, "weight \\[V, H\\]"),
        ({"weight": torch.zeros(101, 24, dtype=torch.bfloat16)}, "share a floating dtype"),
        ({"labels": torch.zeros(37, dtype=torch.int32)}, "int64"),
        ({"loss_mask": torch.ones(37)}, "loss_mask must be bool"),
        ({"temperature": 0.0}, "temperature \\(0.0\\) must be positive"),
        ({"chunk_tokens": 0}, "chunk_tokens \\(0\\)"),
        ({"vocab_size": 102}, "vocab_size \\(102\\)"),
        ({"vocab_start": 10}, "vocab_start \\(10\\) must be 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    hidden, weight, labels, _ = make_case()
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{"hidden": hidden, "weight": weight, "labels": labels, **change})


def tensor_parallel_rank(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    # 97: the second shard is ragged. 50: it holds nothing but padding.
    for dtype, vocab_size in [(torch.float32, 97), (torch.float32, 50), (torch.bfloat16, 97)]:
        compare_shard_with_whole_vocabulary(rank, dtype, vocab_size)
    torch.distributed.destroy_process_group()


def compare_shard_with_whole_vocabulary(rank: int, dtype: torch.dtype, vocab_size: int) -> None:
    """One rank's outputs and gradients against those of the whole vocabulary in one process, in float64 and in `dtype`."""
    hidden, weight, labels, grads = make_case(dtype=dtype, vocab=100)
    labels = labels % vocab_size
    mask = torch.arange(len(labels)) % 3 != 1
    columns = slice(rank * 50, (rank + 1) * 50)
    settings = dict(temperature=0.8, return_entropy=True, loss_mask=mask, vocab_size=vocab_size, chunk_tokens=5)
    group = torch.distributed.group.WORLD
    ours = run_with_grads(linear_logprobs, hidden, weight[columns], labels, grads, tp_group=group, **settings)
    for reference in (hidden, hidden.double()):
        whole = run_with_grads(linear_logprobs, reference, weight.to(reference.dtype), labels, grads, **settings)
        whole[3] = whole[3][columns]
        # bfloat16 rounds each rank's half of d hidden before the float32 sum: one more rounding than a single process.
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for mine, true in zip(ours, whole, strict=True):
            torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance)
    for mine in ours[:3]:
        torch.distributed.all_gather(gathered := [torch.empty_like(mine) for _ in range(2)], mine)
        assert all(torch.equal(other, mine) for other in gathered), "ranks must hold identical outputs"

    nothing = run_with_grads(
        linear_logprobs,
        hidden,
        weight[columns],
        labels,
        grads,
        tp_group=group,
        **{**settings, "loss_mask": torch.zeros_like(mask)},
    )
    assert all((tensor == 0).all() for tensor in nothing)


def test_two_vocabulary_shards_equal_one_and_ranks_hold_identical_outputs():
    run_ranks(tensor_parallel_rank, 2)


MEMORY_PROBE = """
    import sys, torch
    from skyrl_mega_kernels.linear_logprobs import linear_logprobs

    def status(field):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

    num_tokens, chunk_tokens, vocab, width = int(sys.argv[1]), 64, 32768, 16
    hidden = torch.randn(num_tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(0, vocab, (num_tokens,))

    def step(rows):
        logprobs, entropy, *_ = linear_logprobs(
            hidden[:rows], weight, labels[:rows], return_entropy=True, chunk_tokens=chunk_tokens, backend="reference"
        )
        (logprobs + entropy).sum().backward()

    step(8)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    step(num_tokens)
    print(status("VmHWM") - before)
"""


def test_peak_memory_is_that_of_one_chunk_however_many_tokens():
    peaks = {}
    # Every large buffer gets a mapping of its own: freed at once, so that the high-water mark shows what was alive together.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for num_tokens in (64, 1024):
        output = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEMORY_PROBE), str(num_tokens)],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
        peaks[num_tokens] = int(output.stdout)
    one_chunk = 64 * 32768 * 4
    assert peaks[1024] < peaks[64] + one_chunk, f"peak grows with tokens: {peaks}; the logits of all rows are {16 * one_chunk}"
    assert peaks[1024] < 4 * one_chunk, f"peak {peaks}; a chunk of logits and one of probabilities are {2 * one_chunk}"
