"""linear_logprobs against float64 autograd of the plain formula, on one rank and over a split vocabulary, on every backend."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from helpers.lm_head import assert_as_good_as_eager, eager, make_case, oracle, require, run_with_grads
from helpers.spawn import run_ranks
from skyrl_mega.errors import BackendUnavailableError
from skyrl_mega_kernels.backends import backends_that_ran
from skyrl_mega_kernels.linear_logprobs import linear_logprobs
from skyrl_mega_kernels.linear_logprobs.ops import linear_logprobs_backward_op, linear_logprobs_op


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request, monkeypatch):
    """Every test of this file runs on each backend; what a backend can't do (float64 on cpu) `auto` leaves to the reference."""
    require(request.param)
    monkeypatch.setenv("SKYRL_MEGA_KERNELS", "auto" if request.param == "cpu" else "reference")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1024])
def test_values_and_gradients_match_the_float64_oracle_for_any_chunking(dtype, chunk_tokens, backend):
    hidden, weight, labels, grads = make_case(dtype=dtype)
    settings = dict(temperature=0.7)
    ours = run_with_grads(
        linear_logprobs, hidden, weight, labels, grads, return_entropy=True, chunk_tokens=chunk_tokens, **settings
    )
    assert backend in backends_that_ran()["linear_logprobs"]
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


def tensor_parallel_rank(rank: int, backend: str) -> None:
    os.environ["SKYRL_MEGA_KERNELS"] = backend
    torch.distributed.init_process_group("gloo")
    # 97: the last shard is ragged. 50: with two ranks the second holds nothing but padding.
    for dtype, vocab_size in [(torch.float32, 97), (torch.float32, 50), (torch.bfloat16, 97)]:
        compare_shard_with_whole_vocabulary(rank, dtype, vocab_size, None)
        compare_sequence_parallel(rank, dtype, vocab_size)
    compare_shard_with_whole_vocabulary(rank, torch.float32, 97, 1.5)
    torch.distributed.destroy_process_group()


def compare_shard_with_whole_vocabulary(rank: int, dtype: torch.dtype, vocab_size: int, softcap: float | None) -> None:
    """One rank's outputs and gradients against those of the whole vocabulary in one process, in float64 and in `dtype`."""
    hidden, weight, labels, grads = make_case(dtype=dtype, vocab=100)
    labels = labels % vocab_size
    mask = torch.arange(len(labels)) % 3 != 1
    width = 100 // torch.distributed.get_world_size()
    columns = slice(rank * width, (rank + 1) * width)
    settings = dict(temperature=0.8, return_entropy=True, loss_mask=mask, vocab_size=vocab_size, chunk_tokens=5)
    settings["logit_softcap"] = softcap
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
        torch.distributed.all_gather(gathered := [torch.empty_like(mine) for _ in range(100 // width)], mine)
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

    topk = linear_logprobs(hidden, weight[columns], labels, tp_group=group, top_k=7, **settings)
    whole = linear_logprobs(hidden, weight, labels, top_k=7, **settings)
    torch.testing.assert_close(topk.topk_logprobs, whole.topk_logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(topk.topk_ids, whole.topk_ids)


def compare_sequence_parallel(rank: int, dtype: torch.dtype, vocab_size: int) -> None:
    """Each rank holding its own rows of the sequence (the last one padded) against each holding all of them."""
    hidden, weight, labels, grads = make_case(dtype=dtype, vocab=100)
    labels = labels % vocab_size
    ranks = torch.distributed.get_world_size()
    width, per_rank = 100 // ranks, -(-len(labels) // ranks)
    weight = weight[rank * width : (rank + 1) * width]
    settings = dict(vocab_size=vocab_size, tp_group=torch.distributed.group.WORLD, return_entropy=True)
    whole = run_with_grads(linear_logprobs, hidden, weight, labels, grads, **settings)
    mine = torch.nn.functional.pad(hidden, (0, 0, 0, per_rank * ranks - len(labels)))[rank * per_rank : (rank + 1) * per_rank]
    ours = run_with_grads(linear_logprobs, mine, weight, labels, grads, sequence_parallel=True, **settings)
    for name in (0, 1, 3):
        assert torch.equal(ours[name], whole[name])
    expected = torch.nn.functional.pad(whole[2], (0, 0, 0, per_rank * ranks - len(labels)))
    torch.testing.assert_close(ours[2], expected[rank * per_rank : (rank + 1) * per_rank], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shards_equal_one_and_ranks_hold_identical_outputs(ranks, backend):
    run_ranks(tensor_parallel_rank, ranks, "auto" if backend == "cpu" else backend)


def test_lse_is_that_of_the_tempered_logits_and_differentiable():
    hidden, weight, labels, grads = make_case()
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    true = eager(*exact, labels, temperature=0.7)[2]
    (true @ grads[0].double()).backward()
    hidden.requires_grad_()
    weight.requires_grad_()
    ours = linear_logprobs(hidden, weight, labels, temperature=0.7).lse
    torch.testing.assert_close(ours.double(), true, rtol=1e-6, atol=1e-6)
    (ours @ grads[0]).backward()
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, rtol=1e-5, atol=1e-6)


def test_bias_counts_forward_and_gets_its_gradient():
    hidden, weight, labels, grads = make_case()
    bias = torch.linspace(-2, 2, len(weight))
    exact = bias.double().requires_grad_()
    true = eager(hidden.double(), weight.double(), labels, bias=exact, temperature=0.7)
    (true[0] @ grads[0].double() + true[1] @ grads[1].double()).backward()
    bias.requires_grad_()
    ours = linear_logprobs(hidden, weight, labels, bias=bias, temperature=0.7, return_entropy=True)
    torch.testing.assert_close(ours.logprobs.double(), true[0], rtol=1e-5, atol=1e-5)
    (ours.logprobs @ grads[0] + ours.entropy @ grads[1]).backward()
    torch.testing.assert_close(bias.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_floor_leaves_out_what_is_below_it_but_never_the_label(dtype):
    hidden, weight, labels, grads = make_case(dtype=dtype)
    # Above every logit for one row: only the label is left there. Floors lie midway between two logits, away from rounding.
    sorted_logits = (hidden.double() @ weight.double().t()).div(0.7).sort(dim=1, descending=True).values
    floor = (sorted_logits[:, 9:11].sum(1) / 2).float()
    floor[3] = 1e4
    settings = dict(temperature=0.7, floor=floor)
    ours = run_with_grads(linear_logprobs, hidden, weight, labels, grads, return_entropy=True, **settings)
    same_dtype = run_with_grads(eager, hidden, weight, labels, grads, **settings)
    exact = oracle(hidden, weight, labels, grads, **settings)
    assert_as_good_as_eager(ours, same_dtype, exact)
    assert ours[0][3] == 0
    assert ours[1][3] == 0
    assert (ours[2][3] == 0).all()


def test_top_k_are_the_likeliest_tokens_in_order_with_the_lower_id_first_in_a_tie():
    hidden, weight, labels, _ = make_case()
    weight[60] = weight[17]
    ours = linear_logprobs(hidden, weight, labels, temperature=0.7, top_k=101)
    table = (hidden.double() @ weight.double().t() / 0.7).log_softmax(-1)
    torch.testing.assert_close(ours.topk_logprobs.double(), table.sort(descending=True).values, rtol=1e-5, atol=1e-5)
    for ids in ours.topk_ids.tolist():
        assert sorted(ids) == list(range(101))
        assert ids.index(17) + 1 == ids.index(60)
    assert torch.equal(linear_logprobs(hidden, weight, labels, temperature=0.7, top_k=5).topk_ids, ours.topk_ids[:, :5])
    beyond = linear_logprobs(hidden, weight, labels, top_k=3, vocab_size=2, loss_mask=labels < 2)
    assert (beyond.topk_ids[labels < 2, 2] == -1).all()
    assert beyond.topk_logprobs[labels < 2, 2].isneginf().all()
    assert (beyond.topk_ids[labels >= 2] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_megatrons_main_grad_is_added_to_in_float32_and_autograd_gets_none(dtype):
    hidden, weight, labels, grads = make_case(dtype=dtype)
    expected = run_with_grads(linear_logprobs, hidden, weight, labels, grads, return_entropy=True)
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.full(weight.shape, 0.5)
    hidden.requires_grad_()
    for _ in range(2):
        out = linear_logprobs(hidden, weight, labels, return_entropy=True)
        (out.logprobs @ grads[0] + out.entropy @ grads[1]).backward()
    assert weight.grad is None
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # the expected gradient itself is rounded to bfloat16
    torch.testing.assert_close(weight.main_grad.double(), 0.5 + 2 * expected[3], rtol=tolerance, atol=tolerance)
    exact = oracle(hidden.detach(), weight.detach(), labels, grads)
    assert (weight.main_grad.double() - 0.5 - 2 * exact[3]).abs().max() <= 2 * (expected[3] - exact[3]).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_batch_invariant_mode_gives_a_row_the_same_bits_in_any_batch(dtype):
    hidden, weight, labels, grads = make_case(150, 40, 301, dtype=dtype)
    settings = dict(return_entropy=True, batch_invariant=True, chunk_tokens=64)
    whole = run_with_grads(linear_logprobs, hidden, weight, labels, grads, **settings)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    for rows in (order, order[:1], order[:33], order[40:129]):
        part = run_with_grads(linear_logprobs, hidden[rows], weight, labels[rows], grads[:, rows], **settings)
        for mine, expected in zip(part[:3], whole[:3], strict=True):
            assert torch.equal(mine, expected[rows])


def test_the_custom_ops_keep_the_dispatchers_rules(backend):
    hidden, weight, labels, _ = make_case(9, 8, 21)
    mask = torch.arange(9) % 3 > 0
    with_grads = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    torch.library.opcheck(
        linear_logprobs_op, (*with_grads, None, labels, mask, None, 0.7, 0, 21, "", False, True, 2, 4, False, backend, 1.5)
    )
    torch.library.opcheck(
        linear_logprobs_backward_op,
        (
            *(hidden, weight, None, labels, mask, None, torch.ones(9), torch.ones(3, 9)),
            *(0.7, 0, 21, "", False, True, torch.zeros(21, 8), None, True, 4, False, backend, 1.5),
        ),
    )


def test_torch_compile_goes_through_without_a_graph_break():
    hidden, weight, labels, grads = make_case()
    mask = torch.arange(37) % 3 != 1

    def function(hidden, weight, labels, **settings):
        return linear_logprobs(hidden, weight, labels, loss_mask=mask, return_entropy=True)

    expected = run_with_grads(function, hidden, weight, labels, grads)
    ours = run_with_grads(torch.compile(function, fullgraph=True, backend="aot_eager"), hidden, weight, labels, grads)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_a_backend_that_can_not_run_is_an_error_that_names_those_that_can():
    hidden, weight, labels, _ = make_case(dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match=r"backend cpu .*float64.*Able: reference"):
        linear_logprobs(hidden, weight, labels, backend="cpu")


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


def test_peak_memory_is_that_of_one_chunk_however_many_tokens(backend):
    if backend != "reference":
        pytest.skip("holds no chunks of rows; its peak is asserted in test_peak_memory.py")
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
