// Numbers of packed tokens as kernels take them, and the ranges that threads share them in.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

namespace skyrl_mega {

constexpr int64_t kTokensPerRange = 16384;  // sums of a range do not depend on the threads

inline const float* floats(const at::Tensor& tensor, int64_t num_tokens, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && tensor.numel() == num_tokens, name,
                    " must be contiguous float32 [", num_tokens, "], got ", tensor.scalar_type(), " ", tensor.sizes());
  return tensor.const_data_ptr<float>();
}

inline const uint8_t* bools(const at::Tensor& tensor, int64_t num_tokens, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kBool && tensor.is_contiguous() && tensor.numel() == num_tokens, name,
                    " must be contiguous bool [", num_tokens, "], got ", tensor.scalar_type(), " ", tensor.sizes());
  return reinterpret_cast<const uint8_t*>(tensor.const_data_ptr<bool>());
}

}  // namespace skyrl_mega
