"""The C++ functions of the LM head, called directly, against float64; and what they promise about bits.

Shapes are chosen around the loops' fixed sizes: 64 tokens a block, 192 columns a tile, 1152 a superblock, 12288 a split.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from skyrl_mega_kernels import extension
from skyrl_mega_kernels.linear_logprobs import cpu

if (_reason := extension.why_absent("_C")) is not None:
    pytest.skip(_reason, allow_module_level=True)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize(
    ("num_rows", "num_columns", "width"), [(1, 1, 1), (37, 101, 24), (1, 193, 7), (130, 1300, 65), (64, 192, 64), (70, 12500, 33)]
)
TEMPERATURE = 0.7


@dataclass
class Case:
    """Arguments of one call. Where `columns` is -1 another shard holds the label."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    columns: torch.Tensor
    floor: torch.Tensor | None
    lse: torch.Tensor
    coefficients: torch.Tensor
    softcap: float = 0.0

    def inputs(self):
        return self.hidden, self.weight, self.bias, self.columns, self.floor


def make_case(num_rows, num_columns, width, dtype, *, bias=False, floor=False, offset=0.0, softcap=0.0, seed=0):
    """Logits of about +-4 around `offset`; the log-sum-exp is the float64 one."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype)
    weight = (torch.randn(num_columns, width, generator=generator) * 2 * width**-0.5).to(dtype)
    if offset:
        hidden[:, 0], weight[:, 0] = offset * TEMPERATURE, 1.0
    case = Case(
        hidden,
        weight,
        torch.randn(num_columns, generator=generator).to(dtype) if bias else None,
        torch.randint(-1, num_columns, (num_rows,), generator=generator),
        torch.randn(num_rows, generator=generator) + offset if floor else None,
        torch.zeros(num_rows),
        torch.randn(3, num_rows, generator=generator),
        softcap,
    )
    exact = formula_statistics(case, torch.float64)
    case.lse = torch.where(exact[0].isneginf(), 0.0, exact[0] + exact[1].log()).float()
    return case


def formula_logits(case, dtype):
    """(tempered logits, which of them take part, where the label is), the matmul in `dtype`, the rest at least in float32."""
    logits_NU = (case.hidden.to(dtype) @ case.weight.to(dtype).t()).to(torch.promote_types(dtype, torch.float32))
    if case.bias is not None:
        logits_NU = logits_NU + case.bias
    if case.softcap:
        logits_NU = case.softcap * torch.tanh(logits_NU / case.softcap)
    logits_NU = logits_NU / TEMPERATURE
    own_NU = torch.arange(case.weight.shape[0]) == case.columns[:, None]
    taking_part_NU = torch.ones_like(own_NU) if case.floor is None else (logits_NU >= case.floor[:, None]) | own_NU
    return logits_NU, taking_part_NU, own_NU


def formula_statistics(case, dtype):
    """packed [4, N], from the materialised logits."""
    logits_NU, taking_part_NU, own_NU = formula_logits(case, dtype)
    kept_NU = logits_NU.masked_fill(~taking_part_NU, -torch.inf)
    max_N = kept_NU.amax(1)
    distance_NU = logits_NU - torch.where(max_N.isneginf(), 0.0, max_N)[:, None]
    exp_NU = distance_NU.exp() * taking_part_NU
    return torch.stack([max_N, exp_NU.sum(1), (distance_NU * exp_NU).sum(1), (logits_NU * own_NU).sum(1)])


def formula_gradients(case, dtype):
    """(d hidden, d weight, d bias) with the GEMMs in `dtype`."""
    logits_NU, taking_part_NU, own_NU = formula_logits(case, dtype)
    a_N1, b_N1, c_N1 = case.coefficients.to(logits_NU.dtype)[:, :, None]
    logprobs_NU = logits_NU - case.lse[:, None]
    grad_NU = (logprobs_NU.exp() * (a_N1 + b_N1 * logprobs_NU)).masked_fill(~taking_part_NU, 0.0)
    grad_NU = (grad_NU + c_N1 * own_NU) / TEMPERATURE
    if case.softcap:
        grad_NU = grad_NU * (1 - (logits_NU * TEMPERATURE / case.softcap) ** 2)
    grad_NU = grad_NU.to(dtype)
    return grad_NU @ case.weight.to(dtype), grad_NU.t() @ case.hidden.to(dtype), grad_NU.sum(0)


def run_statistics(case, *, with_entropy=True, top_k=0):
    settings = dict(with_entropy=with_entropy, top_k=top_k, chunk_tokens=64, softcap=case.softcap)
    return cpu.statistics(*case.inputs(), temperature=TEMPERATURE, **settings)


def run_gradients(case, *, weight_dtype=torch.float32, initial=None):
    """(d hidden, d weight, d bias); added to `initial` where given."""
    grad_hidden = torch.full(case.hidden.shape, torch.nan)
    fill, accumulate = (torch.nan, False) if initial is None else (initial, True)
    grad_weight = torch.full(case.weight.shape, fill, dtype=weight_dtype)
    grad_bias = torch.full(case.weight.shape[:1], fill)
    cpu.gradients(
        *case.inputs(),
        *(case.lse, case.coefficients),
        temperature=TEMPERATURE,
        grad_hidden_NH=grad_hidden,
        grad_weight_UH=grad_weight,
        grad_bias_U=grad_bias,
        accumulate=accumulate,
        chunk_tokens=64,
        softcap=case.softcap,
    )
    return grad_hidden, grad_weight, grad_bias


def assert_close_as_eager(ours, same_dtype, exact, *, floor):
    """At most 3 times the error of the materialised formula in the same dtype, plus `floor` of the largest value."""
    error, eager_error = (ours - exact).abs().max(), (same_dtype.double() - exact).abs().max()
    allowed = 3 * eager_error + floor * max(1.0, exact.abs().max())
    assert error <= allowed, f"error {error:.2e}, the formula's {eager_error:.2e}, allowed {allowed:.2e}"


def assert_statistics_match(case):
    packed, _, _ = run_statistics(case)
    exact, same_dtype = formula_statistics(case, torch.float64), formula_statistics(case, case.hidden.dtype)
    nothing_N = exact[0].isneginf()
    assert torch.equal(packed[0].isneginf(), nothing_N)
    assert (packed[1:3, nothing_N] == 0).all()
    assert torch.equal(packed[3] == 0, exact[3] == 0)
    for ours, eager, true in zip(packed, same_dtype, exact, strict=True):
        assert_close_as_eager(ours[~nothing_N], eager[~nothing_N], true[~nothing_N], floor=1e-6)


def assert_gradients_match(case):
    exact, same_dtype = formula_gradients(case, torch.float64), formula_gradients(case, case.hidden.dtype)
    # The floor of bfloat16 is half a unit in its last place: dz is rounded to it once.
    floor = 2e-6 if case.hidden.dtype == torch.float32 else 2**-9
    for ours, eager, true in zip(run_gradients(case), same_dtype, exact, strict=True):
        assert_close_as_eager(ours, eager, true, floor=floor)


@DTYPES
@SHAPES
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("floor", [False, True], ids=["", "floor"])
def test_statistics_and_gradients_match_float64(num_rows, num_columns, width, dtype, bias, floor):
    case = make_case(num_rows, num_columns, width, dtype, bias=bias, floor=floor)
    assert_statistics_match(case)
    assert_gradients_match(case)


@DTYPES
@pytest.mark.parametrize("softcap", [0.5, 3.0, 1e4], ids=["saturated", "curved", "far off"])
@pytest.mark.parametrize("floor", [False, True], ids=["", "floor"])
def test_capped_logits_and_their_gradients_match_float64(softcap, dtype, floor):
    case = make_case(70, 1300, 33, dtype, bias=True, floor=floor, softcap=softcap)
    assert run_statistics(case)[0][0].max() <= softcap / TEMPERATURE
    assert_statistics_match(case)
    assert_gradients_match(case)


def test_capped_logits_keep_the_digits_of_small_ones():
    case = make_case(64, 1300, 8, torch.float32, softcap=30.0)
    case.weight.mul_(torch.logspace(-6, 1, 1300)[:, None])
    ours, exact = run_statistics(case, top_k=1300)[1], formula_logits(case, torch.float64)[0]
    # Relative to the logit itself: a few units in the last place beside the dot product's own error.
    allowed = 4e-7 * exact.abs() + 3e-7 * (case.hidden.abs() @ case.weight.abs().t()) / TEMPERATURE
    columns = exact.sort(1, descending=True).indices
    assert ((ours - exact.gather(1, columns)).abs() <= allowed.gather(1, columns)).all()


def test_a_column_biased_to_minus_infinity_has_the_logit_minus_cap():
    case = make_case(20, 300, 24, torch.float32, bias=True, softcap=2.0)
    case.bias[17] = -torch.inf
    assert_statistics_match(case)
    assert (run_gradients(case)[1][17] == 0).all()  # saturated: its slope is 0


@DTYPES
@pytest.mark.parametrize("offset", [-110.0, 110.0])
@pytest.mark.parametrize("floor", [False, True], ids=["", "floor"])
def test_logits_near_plus_and_minus_110_lose_nothing(dtype, offset, floor):
    case = make_case(37, 401, 24, dtype, offset=offset, floor=floor)
    assert run_statistics(case)[0][0].sign().eq(offset / abs(offset)).all()
    assert_statistics_match(case)
    assert_gradients_match(case)


def test_logits_spread_over_hundreds_give_no_nan_and_exact_zeros_far_below_the_maximum():
    case = make_case(20, 300, 8, torch.float32)
    case.weight.mul_(200.0)
    assert_statistics_match(case)
    case.lse = (lambda packed: packed[0] + packed[1].log())(run_statistics(case)[0])
    assert all(tensor.isfinite().all() for tensor in run_gradients(case))


@DTYPES
def test_without_entropy_the_shifted_sum_is_zero_and_the_rest_has_the_same_bits(dtype):
    case = make_case(70, 500, 24, dtype)
    with_entropy, without = run_statistics(case)[0], run_statistics(case, with_entropy=False)[0]
    assert (without[2] == 0).all()
    assert torch.equal(without[[0, 1, 3]], with_entropy[[0, 1, 3]])


@DTYPES
def test_gradients_without_an_entropy_term_match_float64(dtype):
    case = make_case(70, 500, 24, dtype)
    case.coefficients[1] = 0.0
    assert_gradients_match(case)


@DTYPES
@pytest.mark.parametrize(("num_columns", "top_k"), [(101, 1), (1300, 5), (25000, 40), (7, 10)])
def test_top_k_is_that_of_the_logits_in_descending_order(dtype, num_columns, top_k):
    case = make_case(70, num_columns, 16, dtype, floor=True)  # the floor does not matter to it
    _, logits, columns = run_statistics(case, top_k=top_k)
    exact = formula_logits(case, torch.float64)[0]
    found = min(top_k, num_columns)
    torch.testing.assert_close(logits[:, :found].double(), exact.topk(found).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, :found].double(), exact.gather(1, columns[:, :found]), rtol=1e-5, atol=1e-5)
    assert (logits[:, found:] == -torch.inf).all()
    assert (columns[:, found:] == -1).all()


def test_top_k_gives_the_lower_column_first_where_logits_tie():
    # 26,000 columns of five values in turn: ties within a tile, across tiles and across splits.
    hidden, weight = torch.ones(3, 1), (torch.arange(26000) % 5).float()[:, None]
    _, logits, columns = cpu.statistics(
        *(hidden, weight, None, torch.zeros(3, dtype=torch.int64), None),
        **dict(temperature=1.0, with_entropy=False, top_k=3000, chunk_tokens=64),
    )
    assert (logits == 4.0).all()
    assert torch.equal(columns, torch.arange(4, 15004, 5).expand(3, -1))


@DTYPES
def test_accumulating_adds_to_what_is_there(dtype):
    case = make_case(70, 500, 24, dtype)
    fresh, added = run_gradients(case), run_gradients(case, initial=2.0)
    assert torch.equal(added[0], fresh[0])
    assert torch.equal(added[1], fresh[1] + 2.0)
    assert torch.equal(added[2], fresh[2] + 2.0)


def test_a_bfloat16_weight_gradient_is_the_float32_one_rounded_once():
    case = make_case(200, 500, 71, torch.bfloat16)
    assert torch.equal(run_gradients(case, weight_dtype=torch.bfloat16)[1], run_gradients(case)[1].bfloat16())


@DTYPES
def test_gradients_that_are_not_wanted_change_nothing_about_the_others(dtype):
    case = make_case(70, 500, 24, dtype)
    every = run_gradients(case)
    for wanted in range(3):
        alone = [None, None, None]
        alone[wanted] = torch.full_like(every[wanted], torch.nan)
        outputs = dict(zip(("grad_hidden_NH", "grad_weight_UH", "grad_bias_U"), alone, strict=True))
        settings = dict(temperature=TEMPERATURE, accumulate=False, chunk_tokens=64)
        cpu.gradients(*case.inputs(), case.lse, case.coefficients, **outputs, **settings)
        assert torch.equal(alone[wanted], every[wanted])


@DTYPES
def test_a_rows_bits_depend_neither_on_the_other_rows_nor_on_its_place(dtype):
    case = make_case(150, 12500, 33, dtype, bias=True)
    packed, grad_hidden = run_statistics(case)[0], run_gradients(case)[0]
    for rows in (torch.tensor([77]), torch.randperm(150, generator=torch.Generator().manual_seed(1))[:100]):
        part = Case(
            case.hidden[rows], case.weight, case.bias, case.columns[rows], None, case.lse[rows], case.coefficients[:, rows]
        )
        assert torch.equal(run_statistics(part)[0], packed[:, rows])
        assert torch.equal(run_gradients(part)[0], grad_hidden[rows])


@DTYPES
def test_any_number_of_threads_gives_the_same_bits(dtype):
    case = make_case(200, 13000, 33, dtype, bias=True)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append([*run_statistics(case, top_k=4), *run_gradients(case)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@DTYPES
@SHAPES
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("floor", [False, True], ids=["", "floor"])
def test_chunk_functions_equal_the_ones_that_recompute(num_rows, num_columns, width, dtype, bias, floor):
    assert_chunks_equal_recomputation(make_case(num_rows, num_columns, width, dtype, bias=bias, floor=floor))


@DTYPES
def test_chunk_functions_equal_the_ones_that_recompute_capped_logits(dtype):
    assert_chunks_equal_recomputation(make_case(130, 1300, 65, dtype, bias=True, floor=True, softcap=3.0))


def assert_chunks_equal_recomputation(case):
    num_rows, num_columns, dtype = case.hidden.shape[0], case.weight.shape[0], case.hidden.dtype
    workspace = torch.full((cpu.workspace_size(num_rows, num_columns, dtype),), torch.nan)
    settings = dict(temperature=TEMPERATURE, softcap=case.softcap)
    packed = cpu.chunk_statistics(*case.inputs(), workspace, with_entropy=True, **settings)
    assert torch.equal(packed, run_statistics(case)[0])
    grad_hidden = torch.full(case.hidden.shape, torch.nan)
    grad_weight, grad_bias = torch.full(case.weight.shape, 2.0), torch.full((num_columns,), 2.0)
    cpu.chunk_gradients(
        *(case.hidden, case.weight, case.columns, case.floor, case.lse, case.coefficients, workspace),
        **settings,
        grad_hidden_CH=grad_hidden,
        grad_weight_UH=grad_weight,
        grad_bias_U=grad_bias,
    )
    recomputed = run_gradients(case, initial=2.0)
    assert all(torch.equal(a, b) for a, b in zip((grad_hidden, grad_weight, grad_bias), recomputed, strict=True))


def test_no_logprob_is_positive_even_where_logits_are_in_the_thousands():
    # The label's logit and those in the sums must be the same rounded numbers, or the difference shows here.
    case = make_case(200, 700, 8, torch.float32)
    case.weight.mul_(200.0)
    case.columns = formula_logits(case, torch.float32)[0].argmax(1)
    packed = run_statistics(case)[0]
    logprobs = (packed[3] - packed[0]) - packed[1].log()
    assert logprobs.max() <= 0.0


def test_nan_in_a_row_stays_in_that_row_and_is_not_hidden():
    case = make_case(70, 500, 24, torch.float32)
    case.hidden[5, 3] = torch.nan
    packed = run_statistics(case)[0]
    assert packed[1, 5].isnan()
    others = torch.arange(70) != 5
    assert packed[:, others].isfinite().all()


def test_a_column_whose_bias_is_minus_infinity_has_probability_zero():
    case = make_case(20, 300, 24, torch.float32, bias=True)
    case.bias[17] = -torch.inf
    case.columns.fill_(3)
    packed = run_statistics(case)[0]
    case.lse = packed[0] + packed[1].log()
    assert packed.isfinite().all()
    grad_hidden, grad_weight, _ = run_gradients(case)
    assert (grad_weight[17] == 0).all()
    assert grad_hidden.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": torch.zeros(36, dtype=torch.int64)}, r"columns must be contiguous Long \[37\]"),
        ({"floor": torch.zeros(37, dtype=torch.float64)}, "floor must be contiguous Float"),
        ({"weight": torch.zeros(101, 24, dtype=torch.float64)}, "must both be float32 or bfloat16"),
        ({"hidden": torch.zeros(24, 37).t()}, "must be contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    case = make_case(37, 101, 24, torch.float32)
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(RuntimeError, match=message):
        run_statistics(case)


def test_a_workspace_that_is_too_small_is_refused():
    case = make_case(37, 101, 24, torch.float32)
    workspace = torch.empty(cpu.workspace_size(37, 101, torch.float32) - 1)
    with pytest.raises(RuntimeError, match="at least 12288 elements"):
        cpu.chunk_statistics(*case.inputs(), workspace, temperature=1.0, with_entropy=False)


def test_other_devices_and_dtypes_are_declined_with_a_reason():
    assert cpu.unavailable(torch.device("cpu"), torch.bfloat16) is None
    assert "float64" in cpu.unavailable(torch.device("cpu"), torch.float64)
    assert "CPU" in cpu.unavailable(torch.device("meta"), torch.float32)


def run_with_isa(name, *command):
    environment = {**os.environ, "SKYRL_MEGA_CPU_ISA": name, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.skipif("SKYRL_MEGA_CPU_ISA" in os.environ, reason="this is already the run with another instruction set")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_the_same_holds_for_cpus_without_avx512(isa):
    probe = run_with_isa(isa, "-c", "from skyrl_mega_kernels.linear_logprobs import cpu; print(cpu.isa())")
    if "this CPU runs at most" in probe.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert probe.stdout.split() == [isa], probe.stderr
    tests = run_with_isa(isa, "-m", "pytest", "-q", "-x", "--durations=0", "-p", "no:cacheprovider", str(Path(__file__)))
    assert tests.returncode == 0, tests.stdout[-3000:]


def test_an_unknown_instruction_set_is_an_error_that_names_the_choices():
    run = run_with_isa("sse9", "-c", "from skyrl_mega_kernels.linear_logprobs import cpu; print(cpu.isa())")
    assert run.returncode != 0
    assert 'is "sse9"; it must be avx512, avx2 or portable' in run.stderr
