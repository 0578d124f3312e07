// Registers the CUDA kernels as torch.ops.skyrl_mega_cuda.*, on torch's stable ABI: no header of CUDA or ATen, so that it also
// compiles beside a torch without CUDA. Importing the module _C_cuda registers; the module has no attributes.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "launchers.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace accelerator = torch::stable::accelerator;

// Makes the tensor's device the current one for the scope, and knows the stream to launch on.
struct Launch {
  accelerator::DeviceGuard guard;
  void* stream;

  explicit Launch(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle()) {}
};

void check_launched(int error, const char* kernel) {
  STD_TORCH_CHECK(error == 0, kernel, ": CUDA error ", error, " at the launch");
}

void check_vector(const Tensor& tensor, ScalarType dtype, int64_t length, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == length, name,
                  " must be a contiguous CUDA tensor of ", length, " elements and the dtype that the operator documents");
}

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

Tensor segmented_scan(Tensor decay, Tensor values, Tensor cu_seqlens) {
  const int64_t num_tokens = values.numel(), num_sequences = cu_seqlens.numel() - 1;
  check_vector(values, ScalarType::Float, num_tokens, "values");
  check_vector(decay, ScalarType::Float, num_tokens, "decay");
  check_vector(cu_seqlens, ScalarType::Long, num_sequences + 1, "cu_seqlens");
  Tensor out = torch::stable::empty_like(values);
  const Launch launch(values);
  check_launched(skyrl_mega_segmented_scan(pointer<float>(decay), pointer<float>(values), pointer<int64_t>(cu_seqlens), num_sequences,
                                           static_cast<float*>(out.mutable_data_ptr()), launch.stream),
                 "segmented_scan");
  return out;
}

std::tuple<Tensor, Tensor, Tensor> segmented_gae(Tensor rewards, std::optional<Tensor> values, Tensor cu_seqlens,
                                                 std::optional<Tensor> loss_mask, std::optional<Tensor> bootstrap_values, double gamma,
                                                 double lam) {
  const int64_t num_tokens = rewards.numel(), num_sequences = cu_seqlens.numel() - 1;
  check_vector(rewards, ScalarType::Float, num_tokens, "rewards");
  if (values) check_vector(*values, ScalarType::Float, num_tokens, "values");
  check_vector(cu_seqlens, ScalarType::Long, num_sequences + 1, "cu_seqlens");
  if (loss_mask) check_vector(*loss_mask, ScalarType::Bool, num_tokens, "loss_mask");
  if (bootstrap_values) check_vector(*bootstrap_values, ScalarType::Float, num_sequences, "bootstrap_values");
  Tensor advantages = torch::stable::empty_like(rewards), returns = torch::stable::empty_like(rewards);
  const Launch launch(rewards);
  Tensor lost_sequence = torch::stable::new_empty(rewards, {1}, ScalarType::Long);
  torch::stable::fill_(lost_sequence, -1);
  check_launched(
      skyrl_mega_segmented_gae(pointer<float>(rewards), pointer<float>(values), pointer<int64_t>(cu_seqlens),
                               pointer<uint8_t>(loss_mask), pointer<float>(bootstrap_values), static_cast<float>(gamma),
                               static_cast<float>(lam), num_sequences, static_cast<float*>(advantages.mutable_data_ptr()),
                               static_cast<float*>(returns.mutable_data_ptr()),
                               static_cast<int64_t*>(lost_sequence.mutable_data_ptr()), launch.stream),
      "segmented_gae");
  return {advantages, returns, lost_sequence};
}

SkyrlMegaDtype dtype_of(const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "logits must be float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? SKYRL_MEGA_FLOAT32 : dtype == ScalarType::BFloat16 ? SKYRL_MEGA_BFLOAT16 : SKYRL_MEGA_FLOAT16;
}

void check_rows(const Tensor& logits, const Tensor& columns, const std::optional<Tensor>& floor) {
  STD_TORCH_CHECK(logits.is_cuda() && logits.dim() == 2 && logits.stride(1) == 1, "logits must be CUDA [N, U] with contiguous rows");
  check_vector(columns, ScalarType::Long, logits.size(0), "columns");
  if (floor) check_vector(*floor, ScalarType::Float, logits.size(0), "floor");
}

Tensor logits_statistics(Tensor logits, Tensor columns, std::optional<Tensor> floor, double temperature, bool with_entropy) {
  check_rows(logits, columns, floor);
  const SkyrlMegaDtype dtype = dtype_of(logits);
  const Launch launch(logits);
  Tensor packed = torch::stable::new_empty(logits, {4, logits.size(0)}, ScalarType::Float);
  check_launched(skyrl_mega_logits_statistics(logits.const_data_ptr(), dtype, logits.size(0), logits.size(1), logits.stride(0),
                                              pointer<int64_t>(columns), pointer<float>(floor), static_cast<float>(1.0 / temperature),
                                              with_entropy, static_cast<float*>(packed.mutable_data_ptr()), launch.stream),
                 "logits_statistics");
  return packed;
}

void logits_gradients(Tensor logits, Tensor columns, std::optional<Tensor> floor, Tensor lse, Tensor coefficients, double temperature,
                      Tensor out) {
  check_rows(logits, columns, floor);
  check_vector(lse, ScalarType::Float, logits.size(0), "lse");
  check_vector(coefficients, ScalarType::Float, 3 * logits.size(0), "coefficients");
  STD_TORCH_CHECK(out.is_cuda() && out.dim() == 2 && out.size(0) == logits.size(0) && out.size(1) == logits.size(1) &&
                      out.stride(1) == 1 && out.scalar_type() == logits.scalar_type(),
                  "out must have the shape and dtype of the logits, and contiguous rows");
  const SkyrlMegaDtype dtype = dtype_of(logits);
  const Launch launch(logits);
  check_launched(
      skyrl_mega_logits_gradients(logits.const_data_ptr(), dtype, logits.size(0), logits.size(1), logits.stride(0),
                                  pointer<int64_t>(columns), pointer<float>(floor), pointer<float>(lse), pointer<float>(coefficients),
                                  static_cast<float>(1.0 / temperature), out.mutable_data_ptr(), out.stride(0), launch.stream),
      "logits_gradients");
}

}  // namespace

STABLE_TORCH_LIBRARY(skyrl_mega_cuda, library) {
  library.def("segmented_scan(Tensor decay, Tensor values, Tensor cu_seqlens) -> Tensor");
  library.def(
      "segmented_gae(Tensor rewards, Tensor? values, Tensor cu_seqlens, Tensor? loss_mask, Tensor? bootstrap_values, float gamma, "
      "float lam) -> (Tensor, Tensor, Tensor)");
  library.def("logits_statistics(Tensor logits, Tensor columns, Tensor? floor, float temperature, bool with_entropy) -> Tensor");
  library.def(
      "logits_gradients(Tensor logits, Tensor columns, Tensor? floor, Tensor lse, Tensor coefficients, float temperature, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(skyrl_mega_cuda, CUDA, library) {
  library.impl("segmented_scan", TORCH_BOX(&segmented_scan));
  library.impl("segmented_gae", TORCH_BOX(&segmented_gae));
  library.impl("logits_statistics", TORCH_BOX(&logits_statistics));
  library.impl("logits_gradients", TORCH_BOX(&logits_gradients));
}

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
