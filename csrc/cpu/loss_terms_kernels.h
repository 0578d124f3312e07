// What an objective has beside its policy loss, kLanes tokens at a time: KL to a reference, entropy, and how far the engine that sampled
// is from the trainer. Formulas are those of skyrl_mega/algorithms/kl.py and terms.py. Included once per instruction set.
#include "token_lanes.h"

// Estimators of KL(policy || reference), of x = log(reference / policy) within +-20: the value, and its slope by the policy's logprob.
struct NoKl {
  static constexpr bool kIsThere = false;
};
struct K1 {
  static constexpr bool kIsThere = true;
  static VECTOR_MEMBER Vec value(Vec x, const Exponential&) { return -x; }
  static VECTOR_MEMBER Vec slope(Vec, const Exponential&) { return splat(1.0f); }
};
struct K2 {
  static constexpr bool kIsThere = true;
  static VECTOR_MEMBER Vec value(Vec x, const Exponential&) { return 0.5f * x * x; }
  static VECTOR_MEMBER Vec slope(Vec x, const Exponential&) { return -x; }
};
struct K3 {
  static constexpr bool kIsThere = true;
  static VECTOR_MEMBER Vec value(Vec, const Exponential& ratio) { return ratio.beyond_linear; }
  static VECTOR_MEMBER Vec slope(Vec x, const Exponential& ratio) { return -(ratio.beyond_linear + x); }  // 1 - ratio, to the last digit
};
struct Absolute {
  static constexpr bool kIsThere = true;
  static VECTOR_MEMBER Vec value(Vec x, const Exponential&) { return abs(x); }
  static VECTOR_MEMBER Vec slope(Vec x, const Exponential&) { return one_where(x < 0) - one_where(x > 0); }
};
// The values of one, the gradient of k2.
template <class Kl>
struct Straight : Kl {
  static VECTOR_MEMBER Vec slope(Vec x, const Exponential& ratio) { return K2::slope(x, ratio); }
};

// Sums by weights; the order is that of loss_terms/table.py. The last is the plain sum of the weights.
enum { kKlSum, kEntropySum, kDistanceSum, kMismatchK3Sum, kMismatchK1Sum, kWeightSum, kNumTermSums };

template <class Kl, bool kHasEntropy>
VECTOR_INLINE void add_terms(const LossTermTokens& tokens, int64_t at, BlockSums<kNumTermSums>& sums, Vec& largest) {
  const IntVec counts = load_bools(tokens.loss_mask + at);
  const Vec every_weight = load(tokens.weights + at), weights = where(counts, every_weight);
  const Vec trainer = where(counts, load(tokens.trainer + at)), engine = where(counts, load(tokens.engine + at));
  const Vec distance = abs(trainer - engine);
  largest = select((distance > largest) | (distance != distance), distance, largest);  // a NaN stays: nothing is greater
  const Vec mismatch = clipped_log_ratio(trainer, engine, counts).value;
  sums.lanes[kDistanceSum] += distance * weights;
  sums.lanes[kMismatchK3Sum] += exponential(mismatch).beyond_linear * weights;
  sums.lanes[kMismatchK1Sum] -= mismatch * weights;
  sums.lanes[kWeightSum] += every_weight;
  if constexpr (Kl::kIsThere) {
    const Vec references = where(counts, load(tokens.references + at)), logprobs = where(counts, load(tokens.logprobs + at));
    const LogRatio x = clipped_log_ratio(references, logprobs, counts);
    const Exponential ratio = exponential(x.value);
    sums.lanes[kKlSum] += Kl::value(x.value, ratio) * weights;
    store(tokens.logprobs_gradient + at, where(x.inside, Kl::slope(x.value, ratio)) * (weights * tokens.kl_coef));
  }
  if constexpr (kHasEntropy) {
    sums.lanes[kEntropySum] += where(counts, load(tokens.entropy + at)) * weights;
    if (tokens.entropy_gradient != nullptr) store(tokens.entropy_gradient + at, weights * -tokens.entropy_coef);
  }
}

// The ragged end of a range as kLanes tokens, those beyond it masked and of weight 0.
struct TermsTail {
  float logprobs[kLanes] = {}, references[kLanes] = {}, entropy[kLanes] = {}, trainer[kLanes] = {}, engine[kLanes] = {}, weights[kLanes] = {};
  float logprobs_gradient[kLanes] = {}, entropy_gradient[kLanes] = {};
  uint8_t loss_mask[kLanes] = {};
};

// Tokens [begin, end): adds to `sums`, raises `largest` (a NaN stays) and writes the gradients.
template <class Kl, bool kHasEntropy>
static void loss_terms_range(const LossTermTokens& given, int64_t begin, int64_t end, double* sums, float* largest) {
  const LossTermTokens tokens = given;  // pointers that no store can change: they stay in registers
  Vec largest_lanes = {};
  while (begin < end) {
    const int64_t stop = end - begin < kBlock ? end : begin + kBlock;
    BlockSums<kNumTermSums> block;
    block.clear();
    int64_t t = begin;
    for (; t + kLanes <= stop; t += kLanes) add_terms<Kl, kHasEntropy>(tokens, t, block, largest_lanes);
    if (t < stop) {
      TermsTail tail;
      LossTermTokens of_tail = tokens;
      const int64_t count = stop - t;
      memcpy(tail.trainer, tokens.trainer + t, count * sizeof(float));
      memcpy(tail.engine, tokens.engine + t, count * sizeof(float));
      memcpy(tail.weights, tokens.weights + t, count * sizeof(float));
      memcpy(tail.loss_mask, tokens.loss_mask + t, count);
      of_tail.trainer = tail.trainer, of_tail.engine = tail.engine, of_tail.weights = tail.weights, of_tail.loss_mask = tail.loss_mask;
      if (Kl::kIsThere) {
        memcpy(tail.logprobs, tokens.logprobs + t, count * sizeof(float));
        memcpy(tail.references, tokens.references + t, count * sizeof(float));
        of_tail.logprobs = tail.logprobs, of_tail.references = tail.references, of_tail.logprobs_gradient = tail.logprobs_gradient;
      }
      if (kHasEntropy) {
        memcpy(tail.entropy, tokens.entropy + t, count * sizeof(float));
        of_tail.entropy = tail.entropy;
        if (tokens.entropy_gradient != nullptr) of_tail.entropy_gradient = tail.entropy_gradient;
      }
      add_terms<Kl, kHasEntropy>(of_tail, 0, block, largest_lanes);
      if (Kl::kIsThere) memcpy(tokens.logprobs_gradient + t, tail.logprobs_gradient, count * sizeof(float));
      if (tokens.entropy_gradient != nullptr) memcpy(tokens.entropy_gradient + t, tail.entropy_gradient, count * sizeof(float));
    }
    block.add_to(sums);
    begin = stop;
  }
  float lanes[kLanes];
  store(lanes, largest_lanes);
  for (int64_t lane = 0; lane < kLanes; lane++)
    if (lanes[lane] > *largest || lanes[lane] != lanes[lane]) *largest = lanes[lane];
}

// ---- by name

#define LOSS_TERMS(name, Kl) {name, {&loss_terms_range<Kl, false>, &loss_terms_range<Kl, true>}}
static const LossTermsKernel kLossTerms[] = {
    LOSS_TERMS("", NoKl),   LOSS_TERMS("k1", K1),           LOSS_TERMS("k2", K2),           LOSS_TERMS("k3", K3),
    LOSS_TERMS("abs", Absolute), LOSS_TERMS("k1+", Straight<K1>), LOSS_TERMS("k3+", Straight<K3>),
};
#undef LOSS_TERMS

// The kernel with that estimator, "" without any; null where there is none.
static const LossTermsKernel* find_loss_terms(const char* estimator) {
  for (const LossTermsKernel& kernel : kLossTerms)
    if (strcmp(kernel.estimator, estimator) == 0) return &kernel;
  return nullptr;
}
