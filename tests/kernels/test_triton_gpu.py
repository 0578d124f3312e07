"""The Triton kernels on a GPU, at real sizes: what the interpreter cannot show (matrix units' numerics, races, launches)."""

import pytest
import torch
from triton_cases import assert_as_good_as_eager, by_chunks, lse_of, make_case, statistics, whole

from skyrl_mega_kernels.linear_logprobs import triton as linear
from skyrl_mega_kernels.logits_logprobs import triton as logits_logprobs
from skyrl_mega_kernels.segmented_gae import triton as segmented_gae
from skyrl_mega_kernels.segmented_gae.reference import segmented_scan

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
GPU = torch.device("cuda")
if (_reason := linear.unavailable(GPU, torch.bfloat16)) is not None:
    pytest.skip(_reason, allow_module_level=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "num_columns"),
    [(1, 576, 49152), (37, 576, 3001), (777, 576, 49157), (1000, 1000, 20011), (512, 4096, 32000)],
    ids=["one row", "few", "ragged vocabulary", "ragged hidden", "wide"],
)
def test_statistics_and_gradients_are_as_good_as_eager(dtype, num_rows, hidden_size, num_columns):
    # Among tens of millions of logits some lie so near the floor that float32 and float64 decide differently.
    floor = num_rows * num_columns < 2**17
    settings = dict(bias=True, floor=floor, temperature=0.7, device="cuda")
    case = make_case(num_rows, hidden_size, num_columns, dtype, **settings)
    assert_as_good_as_eager(case, whole(case))
    assert_as_good_as_eager(case, by_chunks(case, 500))


@DTYPES
@pytest.mark.parametrize("offset", [-110.0, 110.0])
def test_logits_near_plus_and_minus_110_lose_nothing(dtype, offset):
    case = make_case(300, 576, 20000, dtype, offset=offset, device="cuda")
    assert_as_good_as_eager(case, whole(case), floor=2e-5)


@DTYPES
def test_a_rows_bits_do_not_depend_on_its_batch_nor_on_the_workspace_and_repeat(dtype):
    case = make_case(1500, 576, 49152, dtype, device="cuda")
    every = whole(case)
    again = whole(case, workspace_bytes=8 << 20)
    assert torch.equal(every.grad_hidden_NH, again.grad_hidden_NH)
    assert torch.equal(every.grad_weight_UH, again.grad_weight_UH)
    for rows in (torch.tensor([1499], device="cuda"), torch.arange(700, 1100, device="cuda")):
        some = whole(case.rows(rows))
        assert torch.equal(some.packed_4N, every.packed_4N[:, rows])
        assert torch.equal(some.grad_hidden_NH, every.grad_hidden_NH[rows])


@pytest.mark.parametrize("top_k", [1, 16, 100])
def test_top_k_is_that_of_a_stable_sort(top_k):
    generator = torch.Generator(device="cuda").manual_seed(0)
    logits = torch.randn(64, 50257, generator=generator, device="cuda").to(torch.bfloat16)  # bfloat16: many ties
    labels = torch.zeros(64, dtype=torch.int64, device="cuda")
    _, values, columns = logits_logprobs.statistics(logits, labels, None, temperature=1.0, with_entropy=False, top_k=top_k)
    true, at = torch.sort(logits.float(), dim=1, descending=True, stable=True)
    assert torch.equal(values, true[:, :top_k])
    assert torch.equal(columns, at[:, :top_k])


@pytest.mark.parametrize("num_columns", [151936, 50257])
def test_given_logits_have_the_log_sum_exp_and_gradient_of_float64(num_columns):
    case = make_case(32, 64, num_columns, torch.float32, device="cuda")
    logits = (case.hidden_NH @ case.weight_UH.t()).to(torch.bfloat16)
    packed = logits_logprobs.statistics(logits, case.columns_N, None, temperature=1.0, with_entropy=True, top_k=0)[0]
    lse = logits.double().logsumexp(1)
    torch.testing.assert_close(lse_of(packed).double(), lse, rtol=1e-6, atol=3e-6)
    a, b, c = case.coefficients_3N.double()[:, :, None]
    logprobs = logits.double() - lse[:, None]
    at_label = torch.arange(num_columns, device="cuda") == case.columns_N[:, None]
    true = logprobs.exp() * (a + b * logprobs) + torch.where(at_label, c, 0)
    settings = dict(temperature=1.0, out_NU=logits)
    logits_logprobs.gradients(logits, case.columns_N, None, lse.float(), case.coefficients_3N, **settings)
    torch.testing.assert_close(logits.double(), true, rtol=2**-7, atol=1e-6)


def test_segmented_scan_is_that_of_the_reference_in_float64():
    lengths = torch.randint(0, 5000, (64,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).cuda()
    decay = torch.rand(int(lengths.sum()), device="cuda") * 0.99
    values = torch.randn(int(lengths.sum()), device="cuda")
    true = segmented_scan(decay.double(), values.double(), cu_seqlens)
    torch.testing.assert_close(segmented_gae.segmented_scan(decay, values, cu_seqlens).double(), true, rtol=1e-5, atol=1e-5)


def test_peak_memory_is_the_outputs_and_the_workspace():
    case = make_case(8192, 576, 49152, torch.bfloat16, device="cuda")
    whole(case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    statistics(case)
    whole(case)
    outputs = 4 * (8192 * 576 + 49152 * 576 + 49152)
    partials = 4 * 4 * linear.MAX_VOCABULARY_SPLITS * 8192
    assert torch.cuda.max_memory_allocated() - before < 1.05 * (outputs + linear.WORKSPACE_BYTES + partials)
