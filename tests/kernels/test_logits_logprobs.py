"""logits_logprobs against float64 autograd of the plain formula, on every backend this machine has, whole and over shards."""

import subprocess
import sys
import textwrap

import pytest
import torch

from helpers.spawn import run_ranks
from skyrl_mega.errors import BackendUnavailableError
from skyrl_mega_kernels.logits_logprobs import logits_logprobs
from skyrl_mega_kernels.logits_logprobs import ops as logits_ops

BACKENDS = ("reference", "cpu")
DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = dict(temperature=0.7, return_entropy=True)


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = logits_ops.OPERATOR.unavailable(request.param, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def make_case(num_tokens=19, vocab=1037, *, dtype=torch.float32, offset=0.0, seed=0):
    """logits [T, V], labels [T] and incoming gradients [3, T] of logprobs, entropy and lse."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, vocab, generator=generator).mul(3).add(offset).to(dtype)
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return logits, labels, torch.randn(3, num_tokens, generator=generator)


def eager(logits, labels, *, temperature=1.0, floor=None, return_entropy=True):
    """The formula: softmax in float32 or better."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if floor is not None:
        z = z.masked_fill((z < floor[:, None]).scatter(1, labels[:, None], False), -torch.inf)
    table = z.log_softmax(-1)
    entropy = -(table.exp() * table.masked_fill(table.isneginf(), 0.0)).sum(-1)
    return table.gather(1, labels[:, None])[:, 0], entropy, z.logsumexp(-1)


def run_with_grads(function, logits, labels, grads, **settings):
    """(logprobs, entropy, lse, d logits) in float64, for the loss grads . (logprobs, entropy, lse)."""
    logits = logits.detach().clone().requires_grad_()
    outputs = function(logits * 1, labels, **settings)[:3]
    torch.stack([output @ grad.to(output.dtype) for output, grad in zip(outputs, grads, strict=True)]).sum().backward()
    return [tensor.detach().double() for tensor in (*outputs, logits.grad)]


def oracle(logits, labels, grads, **settings):
    settings = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
    return run_with_grads(eager, logits.double(), labels, grads.double(), **settings)


def assert_as_good_as_eager(ours, same_dtype_eager, exact, *, factor=3.0, floor=2e-6):
    for name, mine, theirs, true in zip(("logprobs", "entropy", "lse", "d_logits"), ours, same_dtype_eager, exact, strict=True):
        scale = max(1.0, true.abs().max().item())
        error, allowed = (mine - true).abs().max().item(), factor * (theirs - true).abs().max().item() + floor * scale
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def sorted_top_k(logits, top_k, temperature):
    """Top-k by a stable sort: descending, the lower id first among equals."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    ids = z.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return z.log_softmax(-1).gather(1, ids), ids


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 511, 512, 513, 4099])
def test_values_and_gradients_match_the_float64_oracle_for_any_vocabulary(backend, dtype, vocab):
    case = make_case(7, vocab, dtype=dtype)
    ours = run_with_grads(logits_logprobs, *case, **SETTINGS, backend=backend)
    assert_as_good_as_eager(ours, run_with_grads(eager, *case, **SETTINGS), oracle(*case, **SETTINGS))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("offset", [-110.0, 110.0])
def test_logits_near_plus_and_minus_110_lose_nothing(backend, dtype, offset):
    case = make_case(dtype=dtype, offset=offset)
    ours = run_with_grads(logits_logprobs, *case, return_entropy=True, backend=backend)
    assert_as_good_as_eager(ours, run_with_grads(eager, *case), oracle(*case), floor=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_few_tokens_are_as_good_as_many(backend, num_tokens):
    case = make_case(num_tokens)
    ours = run_with_grads(logits_logprobs, *case, **SETTINGS, backend=backend)
    assert_as_good_as_eager(ours, run_with_grads(eager, *case, **SETTINGS), oracle(*case, **SETTINGS))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_columns_below_the_floor_are_as_if_they_were_not_there_but_for_the_labels(backend, dtype):
    logits, labels, grads = make_case(dtype=dtype)
    z = logits.float() / 0.7
    floor = z.topk(5, dim=1).values[:, -1].contiguous()
    floor[0] = torch.inf  # only the label is left
    settings = dict(SETTINGS, floor=floor)
    ours = run_with_grads(logits_logprobs, logits, labels, grads, **settings, backend=backend)
    exact = oracle(logits, labels, grads, **settings)
    assert_as_good_as_eager(ours, run_with_grads(eager, logits, labels, grads, **settings), exact)
    kept = (z >= floor[:, None]).scatter(1, labels[:, None], True)
    assert (ours[3][~kept] == 0).all()
    assert ours[0][0] == 0
    top = logits_logprobs(logits, labels, temperature=0.7, floor=floor, top_k=8, backend=backend)
    assert (top.topk_logprobs[1:, :5].isfinite()).all()
    assert (top.topk_logprobs[1:, 5:].isneginf()).all() or dtype == torch.bfloat16  # bfloat16 logits tie at the floor


def test_a_logit_of_minus_infinity_has_probability_zero(backend):
    logits, labels, grads = make_case()
    allowed = torch.arange(1037) % 3 == 0
    labels = labels // 3 * 3
    banned = logits.masked_fill(~allowed, -torch.inf)
    ours = run_with_grads(logits_logprobs, banned, labels, grads, **SETTINGS, backend=backend)
    exact = oracle(logits[:, allowed], labels // 3, grads, **SETTINGS)
    for mine, true in zip(ours[:3], exact[:3], strict=True):
        torch.testing.assert_close(mine, true, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[3][:, allowed], exact[3], rtol=1e-5, atol=1e-6)
    assert (ours[3][:, ~allowed] == 0).all()


def test_a_logit_that_is_not_a_number_makes_its_own_row_so_and_no_other(backend):
    logits, labels, _ = make_case(5)
    logits[1, 700], logits[3] = torch.nan, torch.nan
    output = logits_logprobs(logits, labels, return_entropy=True, backend=backend)
    for tensor in (output.logprobs, output.entropy, output.lse):
        assert tensor.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_masked_rows_are_exactly_zero_get_zero_gradient_and_may_hold_anything(backend, dtype):
    logits, labels, grads = make_case(dtype=dtype)
    mask = torch.rand(len(labels), generator=torch.Generator().manual_seed(3)) < 0.5
    exact = oracle(logits[mask], labels[mask], grads[:, mask], **SETTINGS)
    reference = run_with_grads(eager, logits[mask], labels[mask], grads[:, mask], **SETTINGS)
    labels[~mask] = -100
    logits[~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(400)[: logits.shape[1]].to(dtype)
    ours = run_with_grads(logits_logprobs, logits, labels, grads, **SETTINGS, loss_mask=mask, backend=backend)
    assert all((tensor[~mask] == 0).all() for tensor in ours)
    assert_as_good_as_eager([tensor[mask] for tensor in ours], reference, exact)
    top = logits_logprobs(logits, labels, loss_mask=mask, top_k=3, backend=backend)
    assert (top.topk_logprobs[~mask] == 0).all()
    assert (top.topk_ids[~mask] == -1).all()


@pytest.mark.parametrize("num_tokens", [0, 6])
def test_no_rows_that_count_give_zeros_that_are_still_part_of_the_graph(backend, num_tokens):
    logits, labels, grads = make_case(num_tokens)
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    ours = run_with_grads(logits_logprobs, logits, labels, grads, **SETTINGS, loss_mask=mask, backend=backend)
    assert ours[3].shape == logits.shape
    assert all((tensor == 0).all() for tensor in ours)


def test_padding_columns_count_neither_forward_nor_backward(backend):
    logits, labels, grads = make_case()
    labels, logits[:, 1000:] = labels % 1000, 50.0
    ours = run_with_grads(logits_logprobs, logits, labels, grads, **SETTINGS, vocab_size=1000, backend=backend)
    exact = oracle(logits[:, :1000], labels, grads, **SETTINGS)
    exact[3] = torch.nn.functional.pad(exact[3], (0, 37))
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
    assert (ours[3][:, 1000:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vocab", "top_k"), [(1037, 1), (1037, 20), (1037, 600), (9, 9)])
def test_top_k_is_what_a_stable_sort_gives_ties_included(backend, dtype, vocab, top_k):
    logits, labels, _ = make_case(vocab=vocab, dtype=dtype)
    logits[:, ::3] = logits[:, ::3].round()  # many ties
    output = logits_logprobs(logits, labels, temperature=0.7, top_k=top_k, backend=backend)
    logprobs, ids = sorted_top_k(logits, top_k, 0.7)
    assert torch.equal(output.topk_ids, ids)
    torch.testing.assert_close(output.topk_logprobs, logprobs, rtol=1e-5, atol=1e-5)
    assert not output.topk_logprobs.requires_grad


def test_top_k_beyond_the_vocabulary_ends_in_minus_infinity_and_no_id(backend):
    logits, labels, _ = make_case(vocab=5)
    output = logits_logprobs(logits, labels, top_k=7, backend=backend)
    assert (output.topk_ids[:, 5:] == -1).all()
    assert output.topk_logprobs[:, 5:].isneginf().all()
    assert torch.equal(output.topk_ids[:, :5], sorted_top_k(logits, 5, 1.0)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_inplace_backward_gives_the_same_gradient_in_the_memory_of_the_logits(backend, dtype):
    source, labels, grads = make_case(dtype=dtype)
    mask = torch.arange(len(labels)) % 4 != 0
    results = {}
    for inplace in (False, True):
        leaf = source.clone().requires_grad_()
        logits = leaf * 1
        logits.retain_grad()
        output = logits_logprobs(
            logits, labels, **SETTINGS, loss_mask=mask, vocab_size=1037, inplace_backward=inplace, backend=backend
        )
        (output.logprobs @ grads[0] + output.entropy @ grads[1]).backward()
        results[inplace] = leaf.grad
        overwritten = torch.equal(logits.detach(), leaf.grad)
        assert overwritten == inplace
    assert torch.equal(results[False], results[True])


def test_inplace_backward_works_on_columns_and_rows_cut_from_a_larger_tensor(backend):
    source, labels, grads = make_case()
    leaf = source.clone().requires_grad_()
    padded = torch.nn.functional.pad(leaf * 1, (3, 5))
    output = logits_logprobs(padded[:, 3:-5], labels, return_entropy=True, inplace_backward=True, backend=backend)
    (output.logprobs @ grads[0] + output.entropy @ grads[1]).backward()
    expected = oracle(source, labels, torch.cat([grads[:2], torch.zeros(1, len(labels))]))[3]
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_inplace_backward_where_it_would_be_wrong_is_refused(backend):
    source, labels, _ = make_case()
    settings = dict(inplace_backward=True, backend=backend)
    with pytest.raises(ValueError, match="leaf of the graph"):
        logits_logprobs(source.clone().requires_grad_(), labels, **settings)
    with pytest.raises(ValueError, match=r"leaf of the graph .* or a view of one"):
        logits_logprobs(source.clone().requires_grad_()[:, :1037], labels, **settings)
    with pytest.raises(ValueError, match="expanded"):
        logits_logprobs((source[:1].clone().requires_grad_() * 1).expand(len(labels), -1), labels, **settings)
    # Another operation's backward needs the logits: tanh computes its gradient from its output.
    capped = source.clone().requires_grad_().tanh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits_logprobs(capped, labels, **settings).logprobs.sum().backward()
    # Backward twice: the second would start from gradients.
    loss = logits_logprobs(source.clone().requires_grad_() * 1, labels, **settings).logprobs.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # Somebody changed the logits between forward and backward.
    logits = source.clone().requires_grad_() * 1
    loss = logits_logprobs(logits, labels, **settings).logprobs.sum()
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_float64_logits_give_float64_outputs_and_pass_gradcheck():
    logits, labels, _ = make_case(5, 7)
    mask = torch.tensor([True, False, True, True, True])

    def outputs(logits):
        return tuple(logits_logprobs(logits, labels % 6, temperature=0.8, loss_mask=mask, vocab_size=6, return_entropy=True)[:3])

    logits = logits.double().requires_grad_()
    assert all(output.dtype == torch.float64 for output in outputs(logits))
    assert torch.autograd.gradcheck(outputs, (logits,))


def test_float16_logits_are_as_good_as_eager():
    case = make_case(dtype=torch.float16)
    ours = run_with_grads(logits_logprobs, *case, **SETTINGS)
    assert_as_good_as_eager(ours, run_with_grads(eager, *case, **SETTINGS), oracle(*case, **SETTINGS))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_row_has_the_same_bits_alone_and_anywhere_in_a_batch(backend, dtype):
    if backend == "reference":
        pytest.skip("torch's reductions choose their blocking by the number of rows")
    logits, labels, grads = make_case(dtype=dtype)
    whole = run_with_grads(logits_logprobs, logits, labels, grads, **SETTINGS, backend=backend)
    wide = torch.full((len(labels), 1041), 7.0, dtype=dtype)
    wide[:, 1:1038] = logits
    strided = logits_logprobs(wide[:, 1:1038], labels, **SETTINGS, backend=backend)
    assert torch.equal(strided.entropy.double(), whole[1])
    for row in (0, 7, 18):
        one = slice(row, row + 1)
        alone = run_with_grads(logits_logprobs, logits[one], labels[one], grads[:, one], **SETTINGS, backend=backend)
        assert all(torch.equal(mine[0], theirs[row]) for mine, theirs in zip(alone, whole, strict=True))


def test_threads_share_the_rows_and_change_no_bit(backend):
    case, results, threads = make_case(40, 20_000), [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run_with_grads(logits_logprobs, *case, **SETTINGS, backend="cpu" if backend == "cpu" else "reference"))
    finally:
        torch.set_num_threads(threads)
    if backend == "cpu":
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    else:
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_columns_that_are_not_contiguous_are_read_correctly(backend):
    logits, labels, grads = make_case()
    transposed = logits.t().contiguous().t()
    for inplace in (False, True):
        ours = run_with_grads(logits_logprobs, transposed, labels, grads, **SETTINGS, inplace_backward=inplace, backend=backend)
        expected = run_with_grads(logits_logprobs, logits, labels, grads, **SETTINGS, backend=backend)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(37, 2, 2)}, r"logits must be \[T, V\]"),
        ({"logits": torch.zeros(37, 9, dtype=torch.int64)}, "floating dtype"),
        ({"labels": torch.zeros(37, dtype=torch.int32)}, "int64"),
        ({"loss_mask": torch.ones(37)}, "loss_mask must be bool"),
        ({"floor": torch.zeros(37, dtype=torch.bfloat16)}, "floor must be torch.float32"),
        ({"temperature": 0.0}, r"temperature \(0.0\) must be positive"),
        ({"top_k": -1}, r"top_k \(-1\)"),
        ({"vocab_size": 10}, r"vocab_size \(10\)"),
        ({"vocab_start": 3}, r"vocab_start \(3\) must be 0"),
        ({"labels": torch.full((37,), 9)}, r"labels must lie in \[0, 9\).*37 do not, the first is 9"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        logits_logprobs(**{"logits": torch.zeros(37, 9), "labels": torch.zeros(37, dtype=torch.int64), **change})


def test_a_backend_that_cannot_run_is_an_error_with_the_reason():
    logits, labels, _ = make_case()
    with pytest.raises(BackendUnavailableError, match="NVIDIA"):
        logits_logprobs(logits, labels, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="float64"):
        logits_logprobs(logits.double(), labels, backend="cpu")


def test_opcheck_passes(backend):
    logits, labels, grads = make_case(4, 33)
    mask = torch.tensor([True, True, False, True])
    settings = (0.7, 0, 33, "")
    for requires_grad in (False, True):
        arguments = (logits.clone().requires_grad_(requires_grad), labels, mask, None, *settings, True, 3, False, backend)
        torch.library.opcheck(logits_ops.logits_logprobs_op, arguments)
    backward = (labels, mask, None, torch.zeros(4), grads[:, :4].contiguous(), *settings[:3], backend)
    torch.library.opcheck(logits_ops.logits_logprobs_backward_op, (logits, *backward))
    torch.library.opcheck(logits_ops.logits_logprobs_backward_inplace_op, (logits.clone(), *backward))


def test_compiled_graphs_go_through_forward_and_backward_without_a_break(backend):
    logits, labels, grads = make_case()

    def loss(logits):
        output = logits_logprobs(logits * 2, labels, return_entropy=True, backend=backend)
        return output.logprobs @ grads[0] + output.entropy @ grads[1]

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


def tensor_parallel_rank(rank: int, world_size: int) -> None:
    torch.distributed.init_process_group("gloo")
    for backend in BACKENDS:
        for dtype in DTYPES:
            if logits_ops.OPERATOR.unavailable(backend, torch.device("cpu"), dtype) is None:
                # 97: the last shard is ragged. 30: the last ones hold nothing but padding.
                for vocab_size in (97, 30):
                    compare_shard_with_whole_vocabulary(rank, world_size, dtype, vocab_size, backend)
    torch.distributed.destroy_process_group()


def compare_shard_with_whole_vocabulary(rank, world_size, dtype, vocab_size, backend) -> None:
    logits, labels, grads = make_case(vocab=100, dtype=dtype)
    labels, mask = labels % vocab_size, torch.arange(len(labels)) % 3 != 1
    logits[:, ::4] = logits[:, ::4].round()  # ties across shards
    columns = slice(rank * 100 // world_size, (rank + 1) * 100 // world_size)
    group = torch.distributed.group.WORLD
    settings = dict(**SETTINGS, loss_mask=mask, vocab_size=vocab_size, backend=backend)
    for inplace in (False, True):
        ours = run_with_grads(
            logits_logprobs, logits[:, columns], labels, grads, tp_group=group, inplace_backward=inplace, **settings
        )
        whole = run_with_grads(logits_logprobs, logits, labels, grads, **settings)
        whole[3] = whole[3][:, columns]
        for mine, true in zip(ours, whole, strict=True):
            # The gradient is rounded to the logits' dtype, which may fall to either side.
            tolerance = 1e-2 if dtype == torch.bfloat16 and mine.dim() == 2 else 1e-5
            torch.testing.assert_close(mine, true, rtol=tolerance, atol=1e-5)
    for mine in ours[:3]:
        torch.distributed.all_gather(gathered := [torch.empty_like(mine) for _ in range(world_size)], mine)
        assert all(torch.equal(other, mine) for other in gathered), "ranks must hold identical outputs"
    settings = dict(temperature=0.7, vocab_size=vocab_size, backend=backend)
    top = logits_logprobs(logits[:, columns], labels, tp_group=group, top_k=40, **settings)
    found = min(40, vocab_size)
    logprobs, ids = sorted_top_k(logits[:, :vocab_size], found, 0.7)
    assert torch.equal(top.topk_ids[:, :found], ids)
    torch.testing.assert_close(top.topk_logprobs[:, :found], logprobs, rtol=1e-5, atol=1e-5)
    assert (top.topk_ids[:, found:] == -1).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_vocabulary_shards_equal_the_whole_and_ranks_hold_identical_outputs(world_size):
    run_ranks(tensor_parallel_rank, world_size, world_size)


ISA_PROBE = """
    import sys, torch
    from skyrl_mega_kernels.logits_logprobs import logits_logprobs
    for logits, labels, expected in torch.load(sys.argv[1]):
        leaf = logits.requires_grad_()
        output = logits_logprobs(leaf, labels, temperature=0.7, return_entropy=True, top_k=9, backend="cpu")
        (output.logprobs + output.entropy + output.lse).sum().backward()
        for mine, theirs in zip((*output, leaf.grad), expected, strict=True):
            coarse = 1e-2 if mine.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(mine, theirs, rtol=coarse, atol=1e-5)
    print(torch.ops.skyrl_mega_cpu.isa())
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_narrower_instruction_sets_give_the_same_numbers(isa, tmp_path, monkeypatch):
    reason = logits_ops.OPERATOR.unavailable("cpu", torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    if isa == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("this CPU has no AVX2")
    cases = []
    for dtype in DTYPES:
        logits, labels, _ = make_case(dtype=dtype)
        leaf = logits.clone().requires_grad_()
        output = logits_logprobs(leaf, labels, temperature=0.7, return_entropy=True, top_k=9, backend="reference")
        (output.logprobs + output.entropy + output.lse).sum().backward()
        cases.append((logits, labels, [tensor.detach() for tensor in (*output, leaf.grad)]))
    torch.save(cases, tmp_path / "cases.pt")
    monkeypatch.setenv("SKYRL_MEGA_CPU_ISA", isa)
    probe = [sys.executable, "-c", textwrap.dedent(ISA_PROBE), str(tmp_path / "cases.pt")]
    finished = subprocess.run(probe, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == isa
