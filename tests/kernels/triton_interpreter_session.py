"""Claims about the Triton kernels, run in its interpreter: `test_triton_interpreter.py` starts this file in its own process."""

import dataclasses

import pytest
import torch
import triton_interpreter_patches as patches
from triton_cases import (
    assert_as_good_as_eager,
    by_chunks,
    definition,
    logits_of,
    lse_of,
    make_case,
    outputs,
    statistics,
    whole,
)

from helpers.loss_terms_cases import KINDS, assert_terms_as_good_as_torch, run_terms, terms_case
from helpers.policy_loss_cases import assert_as_good_as_torch, random_case, run
from skyrl_mega_kernels import triton_targets
from skyrl_mega_kernels.linear_logprobs import triton as linear
from skyrl_mega_kernels.logits_logprobs import triton as logits_logprobs
from skyrl_mega_kernels.policy_loss import LOSSES
from skyrl_mega_kernels.policy_loss import triton as policy_loss
from skyrl_mega_kernels.segmented_gae import triton as segmented_gae
from skyrl_mega_kernels.triton_targets import CHIPS

# numpy warns of the -inf - -inf that the kernels compute and throw away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
patches.apply()
# What is allocated empty holds NaN: reading a place before it is written shows.
torch.use_deterministic_algorithms(True)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("hidden_size", [64, 70], ids=["aligned", "ragged"])
@pytest.mark.parametrize("num_rows", [1, 37])
def test_statistics_and_gradients_are_as_good_as_eager_with_bias_floor_and_temperature(dtype, hidden_size, num_rows):
    case = make_case(num_rows, hidden_size, 300, dtype, bias=True, floor=True, temperature=0.7)
    assert_as_good_as_eager(case, whole(case))


@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [(torch.float32, 0.5), (torch.bfloat16, 2.0), (torch.float32, 1e4)],
    ids=["saturated", "bf16", "far off"],
)
def test_capped_logits_are_as_good_as_eager_recomputed_and_kept(dtype, softcap):
    case = dataclasses.replace(make_case(17, 70, 200, dtype, bias=True, floor=True, temperature=0.7), softcap=softcap)
    assert_as_good_as_eager(case, whole(case))
    assert_as_good_as_eager(case, by_chunks(case, 16))


@DTYPES
@pytest.mark.parametrize("hidden_size", [64, 70], ids=["aligned", "ragged"])
@pytest.mark.parametrize("chip_name", [name for name in CHIPS if name != "sm_90"])  # sm_90's are those of the other tests
def test_the_tiles_of_every_chip_give_the_same_results(monkeypatch, chip_name, hidden_size, dtype):
    monkeypatch.setattr(triton_targets, "_chip_name", lambda device: chip_name)
    case = make_case(20, hidden_size, 300, dtype, bias=True, floor=True)
    assert_as_good_as_eager(case, whole(case))
    assert_as_good_as_eager(case, by_chunks(case, 64))


@DTYPES
def test_neither_bias_nor_floor_and_exactly_full_tiles(dtype):
    case = make_case(128, 128, 256, dtype)
    assert_as_good_as_eager(case, whole(case))


@DTYPES
@pytest.mark.parametrize("offset", [-110.0, 110.0])
def test_logits_near_plus_and_minus_110_lose_nothing(dtype, offset):
    case = make_case(9, 64, 300, dtype, offset=offset)
    assert_as_good_as_eager(case, whole(case), floor=2e-5)


@DTYPES
@pytest.mark.parametrize("chunk_tokens", [16, 64])
def test_chunks_from_kept_logits_give_what_recomputation_gives(dtype, chunk_tokens):
    case = make_case(37, 70, 300, dtype, bias=True, floor=True, temperature=1.3)
    chunked = by_chunks(case, chunk_tokens)
    assert_as_good_as_eager(case, chunked)
    torch.testing.assert_close(chunked.packed_4N, whole(case).packed_4N, rtol=1e-5, atol=1e-5)


@DTYPES
def test_slices_of_any_width_leave_the_same_bits_in_the_gradients(dtype):
    case = make_case(37, 64, 700, dtype)
    wide, narrow = whole(case), whole(case, workspace_bytes=1)
    for name in ("grad_hidden_NH", "grad_weight_UH", "grad_bias_U"):
        assert torch.equal(getattr(wide, name), getattr(narrow, name)), name


@DTYPES
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(dtype):
    case = make_case(150, 64, 300, dtype, bias=True, floor=True)
    every = whole(case)
    for rows in (torch.tensor([149]), torch.tensor([140, 3, 77]), torch.arange(20, 100)):
        some = whole(case.rows(rows))
        assert torch.equal(some.packed_4N, every.packed_4N[:, rows])
        assert torch.equal(some.grad_hidden_NH, every.grad_hidden_NH[rows])


def test_many_rows_are_summed_in_blocks_and_a_bfloat16_gradient_is_rounded_once(monkeypatch):
    case = make_case(300, 64, 130, torch.bfloat16)
    once = whole(case, weight_dtype=torch.bfloat16)
    monkeypatch.setattr(linear, "ROWS_AT_A_TIME", 128)
    blocks = whole(case, weight_dtype=torch.bfloat16)
    assert torch.equal(blocks.grad_weight_UH, once.grad_weight_UH)
    assert torch.equal(blocks.grad_hidden_NH, once.grad_hidden_NH)
    assert torch.equal(whole(case).grad_weight_UH.to(torch.bfloat16), once.grad_weight_UH)


def test_gradients_accumulate_in_float32_only_and_unwanted_ones_are_not_computed():
    case = make_case(9, 64, 130, torch.bfloat16)
    lse = lse_of(statistics(case)[0])
    inputs = (case.hidden_NH, case.weight_UH, None, case.columns_N, None, lse, case.coefficients_3N)
    settings = dict(temperature=1.0, chunk_tokens=8)
    fresh = whole(case)
    _, grad_weight, grad_bias = outputs(case, fill=2.0)
    linear.gradients(*inputs, grad_hidden_NH=None, grad_weight_UH=grad_weight, grad_bias_U=grad_bias, accumulate=True, **settings)
    torch.testing.assert_close(grad_weight - 2, fresh.grad_weight_UH, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad_bias - 2, fresh.grad_bias_U, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"grad_weight \(torch.bfloat16\) must be torch.float32 to accumulate"):
        linear.gradients(
            *inputs,
            **dict(grad_hidden_NH=None, grad_weight_UH=grad_weight.bfloat16(), grad_bias_U=None, accumulate=True),
            **settings,
        )


def test_rows_without_any_column_give_minus_infinity_and_zeros_never_nan():
    case = make_case(5, 64, 130, torch.float32, floor=True)
    case.floor_N.fill_(1e9)
    case.columns_N.fill_(-1)
    packed = statistics(case)[0]
    assert packed[0].isneginf().all()
    assert (packed[1:] == 0).all()
    assert (whole(case).grad_hidden_NH == 0).all()


def test_columns_biased_to_minus_infinity_have_no_share():
    case = make_case(5, 64, 130, torch.float32, bias=True)
    case.bias_U[40:] = -torch.inf
    case.columns_N.remainder_(40)
    ours = whole(case)
    assert not ours.packed_4N.isnan().any()
    assert (ours.grad_weight_UH[40:] == 0).all()
    assert (ours.packed_4N[1] <= 40).all()


def test_entropys_sum_is_zero_unless_it_is_asked_for():
    case = make_case(5, 64, 130, torch.float32)
    packed, logits, columns = statistics(case, with_entropy=False)
    assert (packed[2] == 0).all()
    assert logits is None
    assert columns is None
    torch.testing.assert_close(packed[:2].double(), definition(case).packed_4N[:2], rtol=1e-5, atol=1e-5)


@DTYPES
def test_top_k_of_the_linear_head_is_that_of_its_logits_and_pads_a_small_vocabulary(dtype):
    case = make_case(3, 64, 130, dtype, bias=True, floor=True, temperature=0.7)
    packed, values, columns = statistics(case, top_k=5, chunk_tokens=2)
    true, at = logits_of(case, torch.float64).topk(5)
    torch.testing.assert_close(values.double(), true, rtol=1e-5, atol=1e-5)
    assert torch.equal(columns, at)
    capped = dataclasses.replace(case, softcap=2.0)
    values = statistics(capped, top_k=5, chunk_tokens=3)[1]
    torch.testing.assert_close(values.double(), logits_of(capped, torch.float64).topk(5).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed, statistics(case)[0], rtol=1e-5, atol=1e-5)
    _, values, columns = statistics(make_case(1, 64, 3, dtype), top_k=5)
    assert columns[0, 3:].tolist() == [-1, -1]
    assert values[0, 3:].isneginf().all()
    assert sorted(columns[0, :3].tolist()) == [0, 1, 2]


def test_top_k_ties_go_to_the_lower_column_over_blocks_and_signs_of_zero():
    logits = torch.full((2, 2100), -torch.inf)
    logits[0, [1, 5, 1030, 2099]] = torch.tensor([0.0, -0.0, 0.0, -1.0])
    logits[1] = -3.0
    logits[1, [2000, 7]] = 4.0
    _, values, columns = logits_logprobs.statistics(
        logits, torch.tensor([1, 7]), None, temperature=1.0, with_entropy=False, top_k=4
    )
    assert columns.tolist() == [[1, 5, 1030, 2099], [7, 2000, 0, 1]]
    assert values.tolist() == [[0.0, 0.0, 0.0, -1.0], [4.0, 4.0, -3.0, -3.0]]
    beyond_registers = logits_logprobs.statistics(
        logits, torch.tensor([1, 7]), None, temperature=1.0, with_entropy=False, top_k=129
    )
    assert beyond_registers[2][1, :4].tolist() == [7, 2000, 0, 1]
    assert beyond_registers[1].shape == (2, 129)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("num_columns", [5008, 301], ids=["aligned", "ragged"])
def test_given_logits_give_the_definitions_statistics_and_gradients_also_strided_and_in_place(dtype, num_columns):
    case = make_case(5, 16, num_columns, torch.float32, floor=True, temperature=0.8)
    logits = logits_of(case, torch.float32).mul(3).to(dtype)
    # Given logits are a head with weight 1: the definitions apply with hidden = logits.
    wide = torch.full((5, num_columns + 16), 9.0, dtype=dtype)
    rows = wide[:, :num_columns]
    rows.copy_(logits)
    z = logits.double() / case.temperature
    at_label = torch.arange(num_columns) == case.columns_N[:, None]
    included = (z >= case.floor_N[:, None]) | at_label
    kept = z.masked_fill(~included, -torch.inf)
    packed, _, _ = logits_logprobs.statistics(
        rows, case.columns_N, case.floor_N, temperature=case.temperature, with_entropy=True, top_k=0
    )
    torch.testing.assert_close(packed[0].double(), kept.amax(1), rtol=1e-6, atol=1e-6)
    lse = kept.logsumexp(1)
    torch.testing.assert_close(lse_of(packed).double(), lse, rtol=1e-6, atol=2e-6)
    probs = (kept - lse[:, None]).exp()
    entropy = -torch.where(included, probs * (z - lse[:, None]), 0).sum(1)
    torch.testing.assert_close((packed[1].log() - packed[2] / packed[1]).double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[3].double(), torch.where(at_label, z, 0).sum(1), rtol=1e-6, atol=1e-6)

    a, b, c = case.coefficients_3N.double()[:, :, None]
    true = torch.where(included, probs * (a + b * (z - lse[:, None])), 0) + torch.where(at_label, c, 0)
    logits_logprobs.gradients(
        *(rows, case.columns_N, case.floor_N, lse.float(), case.coefficients_3N),
        temperature=case.temperature,
        out_NU=rows,
    )
    rounding = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(rows.double(), true / case.temperature, rtol=rounding, atol=rounding)
    assert (wide[:, num_columns:] == 9).all()


def test_rows_that_do_not_count_are_neither_read_nor_written_to():
    logits = torch.full((3, 50), torch.nan)
    logits[1] = 1.0
    columns = torch.tensor([-2, 4, -2])
    packed, _, _ = logits_logprobs.statistics(logits, columns, None, temperature=1.0, with_entropy=True, top_k=0)
    assert packed[:, 1].tolist() == [1.0, 50.0, 0.0, 1.0]
    out = torch.full((3, 50), 7.0)
    settings = dict(temperature=1.0, out_NU=out)
    logits_logprobs.gradients(logits, columns, None, lse_of(packed), torch.tensor([[0.0], [0.0], [2.0]]).repeat(1, 3), **settings)
    assert (out[[0, 2]] == 7).all()
    assert out[1].nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("lengths", [[5], [1, 0, 3, 1024, 2500, 0]], ids=["one", "ragged with empty ones"])
def test_segmented_scan_follows_the_recurrence(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    decay = torch.rand(sum(lengths), generator=generator) * 1.1
    values = torch.randn(sum(lengths), generator=generator)
    expected = torch.zeros(sum(lengths), dtype=torch.float64)
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False):
        carry = 0.0
        for t in range(end - 1, start - 1, -1):
            carry = values[t].item() + decay[t].item() * carry
            expected[t] = carry
    torch.testing.assert_close(segmented_gae.segmented_scan(decay, values, cu_seqlens).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses_have_the_sums_and_gradients_of_their_definitions(name):
    for lengths in ([5], [1, 0, 3, 1024, 1100, 0]):
        assert_as_good_as_torch(name, random_case(lengths), "triton")
    assert_as_good_as_torch(name, random_case([7, 90], spread=1e-4), "triton", options={})
    result = run(name, random_case([]), "triton")
    assert [float(value) for value in (result.loss, *result.stats.values())] == [0.0] * (1 + len(result.stats))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_loss_terms_have_the_sums_and_gradients_of_their_definitions(kind):
    for lengths in ([5], [1, 0, 3, 1024, 1100, 0]):
        assert_terms_as_good_as_torch(kind, terms_case(lengths), "triton")
    assert_terms_as_good_as_torch(kind, terms_case([7, 90], spread=1e-4), "triton")
    assert float(run_terms(kind, terms_case([]), "triton").loss) == 0.0
    case = terms_case([1030])
    case.inputs.loss_mask[1025], case.inputs.rollout_logprobs[1025] = True, torch.nan
    assert run_terms(kind, case, "triton").sums["mismatch/abs_logprob_diff_max"].isnan()


def test_backends_say_that_they_can_run_here_and_what_they_cannot():
    cpu = torch.device("cpu")
    for module in (linear, logits_logprobs, segmented_gae, policy_loss):
        assert module.unavailable(cpu, torch.float32) is None
        assert "not torch.float64" in module.unavailable(cpu, torch.float64)
        assert "not on meta" in module.unavailable(torch.device("meta"), torch.float32)
