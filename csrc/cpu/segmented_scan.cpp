// Segmented reverse scan and generalised advantage estimation over packed sequences, float32: one pass over the tokens, threads
// over sequences. The contract is in segmented_gae/api.py; the mathematics of the scan in segmented_scan_kernels.h.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <atomic>

#include "sequences.h"

#define SKYRL_MEGA_KERNELS "segmented_scan_kernels.h"
#include "for_each_isa.h"

namespace skyrl_mega {
namespace {

void check_tokens(const at::Tensor& tensor, int64_t num_tokens) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && tensor.numel() == num_tokens,
                    "expected contiguous float32 [", num_tokens, "], got ", tensor.scalar_type(), " ", tensor.sizes());
}

void check_borders(const at::Tensor& cu_seqlens) {
  TORCH_CHECK_VALUE(cu_seqlens.scalar_type() == at::kLong && cu_seqlens.is_contiguous() && cu_seqlens.numel() >= 1,
                    "cu_seqlens must be contiguous int64 [S + 1]");
}

at::Tensor segmented_scan(const at::Tensor& decay, const at::Tensor& values, const at::Tensor& cu_seqlens) {
  check_tokens(values, values.numel());
  check_tokens(decay, values.numel());
  check_borders(cu_seqlens);
  at::Tensor out = at::empty_like(values);
  const float* a = decay.const_data_ptr<float>();
  const float* v = values.const_data_ptr<float>();
  const int64_t* borders = cu_seqlens.const_data_ptr<int64_t>();
  float* y = out.mutable_data_ptr<float>();
  for_each_sequence(cu_seqlens, values.numel(), [&](int64_t s) {
    const int64_t begin = borders[s];
    SKYRL_MEGA_DISPATCH(scan_sequence, (a + begin, v + begin, borders[s + 1] - begin, y + begin));
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> segmented_gae(const at::Tensor& rewards, const std::optional<at::Tensor>& values,
                                                 const at::Tensor& cu_seqlens, const std::optional<at::Tensor>& loss_mask,
                                                 const std::optional<at::Tensor>& bootstrap_values, double gamma, double lam) {
  const int64_t num_tokens = rewards.numel();
  check_tokens(rewards, num_tokens);
  if (values) check_tokens(*values, num_tokens);
  check_borders(cu_seqlens);
  if (bootstrap_values) check_tokens(*bootstrap_values, cu_seqlens.numel() - 1);
  if (loss_mask)
    TORCH_CHECK_VALUE(loss_mask->scalar_type() == at::kBool && loss_mask->is_contiguous() && loss_mask->numel() == num_tokens,
                      "loss_mask must be contiguous bool [", num_tokens, "]");

  at::Tensor advantages = at::empty_like(rewards);
  at::Tensor returns = values ? at::empty_like(rewards) : advantages;  // without values they are the same numbers
  const float* r = rewards.const_data_ptr<float>();
  const float* v = values ? values->const_data_ptr<float>() : nullptr;
  const float* after = bootstrap_values ? bootstrap_values->const_data_ptr<float>() : nullptr;
  const uint8_t* mask = loss_mask ? reinterpret_cast<const uint8_t*>(loss_mask->const_data_ptr<bool>()) : nullptr;
  const int64_t* borders = cu_seqlens.const_data_ptr<int64_t>();
  float* adv = advantages.mutable_data_ptr<float>();
  float* ret = values ? returns.mutable_data_ptr<float>() : nullptr;
  std::atomic<int64_t> lost{-1};
  for_each_sequence(cu_seqlens, num_tokens, [&](int64_t s) {
    const bool complete = SKYRL_MEGA_DISPATCH(
        gae_sequence, (r, v, mask, borders[s], borders[s + 1], after ? after[s] : 0.0f, static_cast<float>(gamma),
                       static_cast<float>(gamma * lam), adv, ret));
    if (!complete) lost = s;
  });
  TORCH_CHECK_VALUE(lost < 0, "a reward on a masked token goes to the last counting token before it in its sequence; a token of sequence ",
                    lost.load(), " has none: move the reward to a token of the policy, or set it to 0.");
  return {advantages, returns};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(skyrl_mega_cpu, library) {
  library.def("segmented_scan(Tensor decay, Tensor values, Tensor cu_seqlens) -> Tensor");
  library.def(
      "segmented_gae(Tensor rewards, Tensor? values, Tensor cu_seqlens, Tensor? loss_mask, Tensor? bootstrap_values, float gamma, "
      "float lam) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(skyrl_mega_cpu, CPU, library) {
  library.impl("segmented_scan", &segmented_scan);
  library.impl("segmented_gae", &segmented_gae);
}

}  // namespace skyrl_mega
