// The terms of an objective beside its policy loss over packed tokens, with their gradients, float32: every token is read once, threads over
// blocks of tokens. The contract is in loss_terms/api.py; the formulas in loss_terms_kernels.h.
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tokens.h"

namespace skyrl_mega {

// All of one length, that of the pack. With a KL: logprobs (the policy's), references and logprobs_gradient; with an entropy: entropy, and
// entropy_gradient unless null.
struct LossTermTokens {
  const float *trainer, *engine, *weights, *logprobs, *references, *entropy;
  const uint8_t* loss_mask;
  float *logprobs_gradient, *entropy_gradient;
  float kl_coef, entropy_coef;
};

// Estimator of the KL, "" without; computes tokens [begin, end), without and with an entropy.
struct LossTermsKernel {
  const char* estimator;
  void (*run[2])(const LossTermTokens& tokens, int64_t begin, int64_t end, double* sums, float* largest);
};

}  // namespace skyrl_mega

#define SKYRL_MEGA_KERNELS "loss_terms_kernels.h"
#include "for_each_isa.h"

namespace skyrl_mega {
namespace {

constexpr int64_t kNumSums = portable::kNumTermSums;

// (float64 [7]: six sums by weights and the largest distance; the gradients by logprobs and entropy, empty where there is none.)
std::tuple<at::Tensor, at::Tensor, at::Tensor> loss_terms(const at::Tensor& trainer, const at::Tensor& engine, const at::Tensor& loss_mask,
                                                          const at::Tensor& weights, c10::string_view estimator,
                                                          const std::optional<at::Tensor>& logprobs,
                                                          const std::optional<at::Tensor>& references,
                                                          const std::optional<at::Tensor>& entropy, double kl_coef, double entropy_coef) {
  const LossTermsKernel* kernel = SKYRL_MEGA_DISPATCH(find_loss_terms, (std::string(estimator).c_str()));
  TORCH_CHECK_VALUE(kernel != nullptr, "there is no kernel of the KL estimator ", estimator);
  const int64_t num_tokens = trainer.numel();
  LossTermTokens tokens = {};
  tokens.trainer = floats(trainer, num_tokens, "trainer_logprobs");
  tokens.engine = floats(engine, num_tokens, "rollout_logprobs");
  tokens.weights = floats(weights, num_tokens, "weights");
  tokens.loss_mask = bools(loss_mask, num_tokens, "loss_mask");
  tokens.kl_coef = static_cast<float>(kl_coef);
  tokens.entropy_coef = static_cast<float>(entropy_coef);
  at::Tensor logprobs_gradient = at::empty({0}, trainer.options()), entropy_gradient = at::empty({0}, trainer.options());
  if (!estimator.empty()) {
    TORCH_CHECK_VALUE(logprobs && references, "a KL needs logprobs and ref_logprobs");
    tokens.logprobs = floats(*logprobs, num_tokens, "logprobs");
    tokens.references = floats(*references, num_tokens, "ref_logprobs");
    logprobs_gradient = at::empty_like(trainer);
    tokens.logprobs_gradient = logprobs_gradient.mutable_data_ptr<float>();
  }
  if (entropy) {
    tokens.entropy = floats(*entropy, num_tokens, "entropy");
    if (entropy_coef != 0.0) {
      entropy_gradient = at::empty_like(trainer);
      tokens.entropy_gradient = entropy_gradient.mutable_data_ptr<float>();
    }
  }

  // Every range has sums of its own, added up in their order.
  const int64_t num_ranges = (num_tokens + kTokensPerRange - 1) / kTokensPerRange;
  std::vector<double> parts(num_ranges * kNumSums);
  std::vector<float> largest(num_ranges);
  at::parallel_for(0, num_ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t range = first; range < last; range++)
      kernel->run[entropy ? 1 : 0](tokens, range * kTokensPerRange, std::min(num_tokens, (range + 1) * kTokensPerRange),
                                   parts.data() + range * kNumSums, largest.data() + range);
  });
  at::Tensor sums = at::zeros({kNumSums + 1}, trainer.options().dtype(at::kDouble));
  double* const total = sums.mutable_data_ptr<double>();
  for (size_t i = 0; i < parts.size(); i++) total[i % kNumSums] += parts[i];
  for (const float one : largest)
    if (one > total[kNumSums] || one != one) total[kNumSums] = one;
  return {sums, logprobs_gradient, entropy_gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(skyrl_mega_cpu, library) {
  library.def(
      "loss_terms(Tensor trainer_logprobs, Tensor rollout_logprobs, Tensor loss_mask, Tensor weights, str estimator, Tensor? logprobs, "
      "Tensor? ref_logprobs, Tensor? entropy, float kl_coef, float entropy_coef) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(skyrl_mega_cpu, CPU, library) { library.impl("loss_terms", &loss_terms); }

}  // namespace skyrl_mega
