// Softmax statistics, top-k and gradients from given logits, float32 and bfloat16: one read of the logits, threads over rows. The
// contract is in logits_logprobs/reference.py; the arithmetic in logits_logprobs_kernels.h.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#define SKYRL_MEGA_KERNELS "logits_logprobs_kernels.h"
#include "for_each_isa.h"

namespace skyrl_mega {
namespace {

constexpr int64_t kRowNotCounted = -2;  // as a row's column: nobody will use its results

struct Rows {
  int64_t num_rows, num_columns;
  const int64_t* columns;
  const float* floor;  // null: none

  float floor_of(int64_t row) const { return floor ? floor[row] : -INFINITY; }
};

Rows check_rows(const at::Tensor& logits, const at::Tensor& columns, const std::optional<at::Tensor>& floor) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.stride(1) == 1, "logits must be [N, U] with contiguous rows, got strides ", logits.strides());
  const int64_t num_rows = logits.size(0);
  TORCH_CHECK_VALUE(columns.scalar_type() == at::kLong && columns.is_contiguous() && columns.numel() == num_rows,
                    "columns must be contiguous int64 [", num_rows, "]");
  if (floor)
    TORCH_CHECK_VALUE(floor->scalar_type() == at::kFloat && floor->is_contiguous() && floor->numel() == num_rows,
                      "floor must be contiguous float32 [", num_rows, "]");
  return {num_rows, logits.size(1), columns.const_data_ptr<int64_t>(), floor ? floor->const_data_ptr<float>() : nullptr};
}

// Rows that make a task of about 20 microseconds.
int64_t rows_per_task(int64_t num_columns) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, num_columns)); }

// Calls task(pointer to the logits' bits) with the pointer's type: float, or uint16_t for bfloat16.
template <class Task>
void with_logits(const at::Tensor& logits, const Task& task) {
  if (logits.scalar_type() == at::kFloat) {
    task(static_cast<const float*>(logits.const_data_ptr()));
  } else {
    TORCH_CHECK_VALUE(logits.scalar_type() == at::kBFloat16, "logits must be float32 or bfloat16, got ", logits.scalar_type());
    task(static_cast<const uint16_t*>(logits.const_data_ptr()));
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> logits_statistics(const at::Tensor& logits, const at::Tensor& columns,
                                                                 const std::optional<at::Tensor>& floor, double temperature,
                                                                 bool with_entropy, int64_t top_k) {
  const Rows rows = check_rows(logits, columns, floor);
  TORCH_CHECK_VALUE(top_k >= 0, "top_k (", top_k, ") must not be negative");
  const auto float_options = logits.options().dtype(at::kFloat);
  at::Tensor packed = at::empty({4, rows.num_rows}, float_options);
  at::Tensor top_logits = at::empty({rows.num_rows, top_k}, float_options);
  at::Tensor top_columns = at::empty({rows.num_rows, top_k}, columns.options());
  float* const out = packed.mutable_data_ptr<float>();
  float* const values = top_logits.mutable_data_ptr<float>();
  int64_t* const places = top_columns.mutable_data_ptr<int64_t>();
  const int64_t stride = logits.stride(0);
  const float inverse_temperature = static_cast<float>(1.0 / temperature);

  with_logits(logits, [&](auto* data) {
    at::parallel_for(0, rows.num_rows, rows_per_task(rows.num_columns), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) {
        // A row that does not count is not read: as if it had no columns.
        const int64_t num_columns = rows.columns[row] == kRowNotCounted ? 0 : rows.num_columns;
        SKYRL_MEGA_DISPATCH(row_statistics,
                            (data + row * stride, num_columns, rows.columns[row], rows.floor_of(row), inverse_temperature, with_entropy,
                             top_k, values + row * top_k, places + row * top_k, out + row, rows.num_rows));
      }
    });
  });
  return {packed, top_logits, top_columns};
}

void logits_gradients(const at::Tensor& logits, const at::Tensor& columns, const std::optional<at::Tensor>& floor, const at::Tensor& lse,
                      const at::Tensor& coefficients, double temperature, at::Tensor out) {
  const Rows rows = check_rows(logits, columns, floor);
  TORCH_CHECK_VALUE(lse.scalar_type() == at::kFloat && lse.is_contiguous() && lse.numel() == rows.num_rows,
                    "lse must be contiguous float32 [", rows.num_rows, "]");
  TORCH_CHECK_VALUE(coefficients.scalar_type() == at::kFloat && coefficients.is_contiguous() && coefficients.numel() == 3 * rows.num_rows,
                    "coefficients must be contiguous float32 [3, ", rows.num_rows, "]");
  TORCH_CHECK_VALUE(out.sizes() == logits.sizes() && out.scalar_type() == logits.scalar_type() && out.stride(1) == 1,
                    "out must be as the logits are: ", logits.scalar_type(), " ", logits.sizes(), " with contiguous rows");
  const float* const lses = lse.const_data_ptr<float>();
  const float* const abc = coefficients.const_data_ptr<float>();
  void* const written = out.mutable_data_ptr();
  const int64_t stride = logits.stride(0), out_stride = out.stride(0);
  const float inverse_temperature = static_cast<float>(1.0 / temperature);

  with_logits(logits, [&](auto* data) {
    auto* const target = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(data)>>*>(written);
    at::parallel_for(0, rows.num_rows, rows_per_task(rows.num_columns), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) {
        if (rows.columns[row] == kRowNotCounted) continue;
        const float coefficients_of_row[3] = {abc[row], abc[rows.num_rows + row], abc[2 * rows.num_rows + row]};
        SKYRL_MEGA_DISPATCH(row_gradients, (data + row * stride, rows.num_columns, rows.columns[row], rows.floor_of(row), lses[row],
                                            coefficients_of_row, inverse_temperature, target + row * out_stride));
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(skyrl_mega_cpu, library) {
  library.def(
      "logits_statistics(Tensor logits, Tensor columns, Tensor? floor, float temperature, bool with_entropy, int top_k) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "logits_gradients(Tensor logits, Tensor columns, Tensor? floor, Tensor lse, Tensor coefficients, float temperature, "
      "Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(skyrl_mega_cpu, CPU, library) {
  library.impl("logits_statistics", &logits_statistics);
  library.impl("logits_gradients", &logits_gradients);
}

}  // namespace skyrl_mega
