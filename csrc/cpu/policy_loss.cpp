// Policy losses over packed tokens with their gradient and statistics, float32: every token is read once, threads over blocks of tokens
// or over sequences. The contract is in policy_loss/api.py; the formulas in policy_loss_kernels.h.
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "sequences.h"
#include "tokens.h"

namespace skyrl_mega {

// All of one length, that of the pack. `denominators`: the other policy's logprobs.
struct PolicyLossTokens {
  const float *logprobs, *denominators, *advantages, *weights, *loss_weights;
  const uint8_t *loss_mask, *marked;
  float* gradient;
};

// `run` computes tokens [begin, end): of any range, or with `whole_sequences` of one sequence. It adds the sums of the weighted loss and
// statistics to 1 + num_stats doubles.
struct PolicyLossKernel {
  const char* name;
  int64_t num_options, num_stats;
  bool whole_sequences;
  void (*run)(const PolicyLossTokens& tokens, int64_t begin, int64_t end, const double* options, double* sums);
};

}  // namespace skyrl_mega

#define SKYRL_MEGA_KERNELS "policy_loss_kernels.h"
#include "for_each_isa.h"

namespace skyrl_mega {
namespace {

// (float64 [1 + K]: sums of the loss by loss_weights and of the K statistics by weights; float32 [T]: the loss's gradient.)
std::tuple<at::Tensor, at::Tensor> policy_loss(c10::string_view name, const at::Tensor& logprobs, const at::Tensor& denominators,
                                               const at::Tensor& advantages, const at::Tensor& loss_mask, const at::Tensor& weights,
                                               const at::Tensor& loss_weights, const std::optional<at::Tensor>& marked,
                                               const std::optional<at::Tensor>& cu_seqlens, at::ArrayRef<double> options) {
  const PolicyLossKernel* kernel = SKYRL_MEGA_DISPATCH(find_policy_loss, (std::string(name).c_str()));
  TORCH_CHECK_VALUE(kernel != nullptr, "there is no kernel of the policy loss ", name);
  TORCH_CHECK_VALUE(static_cast<int64_t>(options.size()) == kernel->num_options, name, " takes ", kernel->num_options, " options, got ",
                    options.size());
  const int64_t num_tokens = logprobs.numel(), num_sums = 1 + kernel->num_stats;
  at::Tensor gradient = at::empty_like(logprobs);
  const uint8_t* mask = bools(loss_mask, num_tokens, "loss_mask");
  const PolicyLossTokens tokens = {floats(logprobs, num_tokens, "logprobs"),
                                   floats(denominators, num_tokens, "denominators"),
                                   floats(advantages, num_tokens, "advantages"),
                                   floats(weights, num_tokens, "weights"),
                                   floats(loss_weights, num_tokens, "loss_weights"),
                                   mask,
                                   marked ? bools(*marked, num_tokens, "marked") : mask,
                                   gradient.mutable_data_ptr<float>()};

  // Every range or sequence has sums of its own, added up in their order.
  std::vector<double> parts;
  if (kernel->whole_sequences) {
    TORCH_CHECK_VALUE(cu_seqlens && cu_seqlens->scalar_type() == at::kLong && cu_seqlens->is_contiguous() && cu_seqlens->numel() >= 1, name,
                      " needs cu_seqlens, contiguous int64 [S + 1]");
    const int64_t* borders = cu_seqlens->const_data_ptr<int64_t>();
    const int64_t num_sequences = cu_seqlens->numel() - 1;
    TORCH_CHECK_VALUE(borders[0] == 0 && borders[num_sequences] == num_tokens && std::is_sorted(borders, borders + num_sequences + 1),
                      "cu_seqlens must ascend from 0 to the number of tokens (", num_tokens, ")");
    parts.resize(num_sequences * num_sums);
    for_each_sequence(*cu_seqlens, num_tokens, [&](int64_t s) {
      kernel->run(tokens, borders[s], borders[s + 1], options.data(), parts.data() + s * num_sums);
    });
  } else {
    const int64_t num_ranges = (num_tokens + kTokensPerRange - 1) / kTokensPerRange;
    parts.resize(num_ranges * num_sums);
    at::parallel_for(0, num_ranges, 1, [&](int64_t first, int64_t last) {
      for (int64_t range = first; range < last; range++)
        kernel->run(tokens, range * kTokensPerRange, std::min(num_tokens, (range + 1) * kTokensPerRange), options.data(),
                    parts.data() + range * num_sums);
    });
  }
  at::Tensor sums = at::zeros({num_sums}, logprobs.options().dtype(at::kDouble));
  double* const total = sums.mutable_data_ptr<double>();
  for (size_t i = 0; i < parts.size(); i++) total[i % num_sums] += parts[i];
  return {sums, gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(skyrl_mega_cpu, library) {
  library.def(
      "policy_loss(str name, Tensor logprobs, Tensor denominators, Tensor advantages, Tensor loss_mask, Tensor weights, "
      "Tensor loss_weights, Tensor? marked, Tensor? cu_seqlens, float[] options) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(skyrl_mega_cpu, CPU, library) { library.impl("policy_loss", &policy_loss); }

}  // namespace skyrl_mega
