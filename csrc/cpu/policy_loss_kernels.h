// Policy losses, their gradients and their statistics, kLanes tokens at a time. Included once per instruction set.
//
// A loss is a small struct: made from its options, it says for kLanes tokens what the loss is, its slope (the derivative by the token's
// logprob) and its statistics. Formulas, names and the order of options and statistics are those of the torch functions in
// skyrl_mega/algorithms/policy_losses; table.py of the operator repeats the order.
//
// Rounding: statistics and loss are summed in float32 per lane over a block, and in double from block to block.
#include "token_lanes.h"

constexpr int64_t kMaxStats = 5;

VECTOR_INLINE bool any(IntVec condition) {
#if SKYRL_MEGA_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#else
  int32_t joined = 0;
  for (int64_t lane = 0; lane < kLanes; lane++) joined |= condition[lane];
  return joined != 0;
#endif
}

// log(x) of a positive, normal x, within 2 ulp; NaN stays NaN. Cephes' logf: x = 2^e m with sqrt(1/2) <= m < sqrt(2), then a polynomial
// in m - 1.
VECTOR_INLINE Vec log_positive(Vec x) {
  const IntVec bits = (IntVec)x;
  const IntVec shifted = bits - 0x3f3504f3;  // the bits of sqrt(1/2)
  const IntVec exponent = shifted >> 23;
  const Vec m = (Vec)((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  const Vec square = m * m;
  const Vec log = (p * m * square + e * -2.12194440e-4f - 0.5f * square) + m + e * 0.693359375f;
  return select(x != x, x, log);
}

// What a loss may look at of kLanes tokens. Of a masked token logprobs, advantages and log_ratio are 0, marked is false.
struct Lanes {
  IntVec counts;      // loss_mask
  IntVec inside;      // counts, and the log ratio is not clipped at +-20: the ratio has a gradient
  IntVec marked;
  Vec logprobs, denominators, advantages, log_ratio, ratio;
  Vec approx_kl;      // ratio - 1 - log_ratio
};

VECTOR_INLINE Lanes load_lanes(const PolicyLossTokens& tokens, int64_t at) {
  Lanes lanes;
  lanes.counts = load_bools(tokens.loss_mask + at);
  lanes.marked = lanes.counts & load_bools(tokens.marked + at);
  lanes.logprobs = where(lanes.counts, load(tokens.logprobs + at));
  lanes.denominators = where(lanes.counts, load(tokens.denominators + at));
  lanes.advantages = where(lanes.counts, load(tokens.advantages + at));
  const LogRatio ratio = clipped_log_ratio(lanes.logprobs, lanes.denominators, lanes.counts);
  lanes.inside = ratio.inside;
  lanes.log_ratio = ratio.value;
  const Exponential exponential_of = exponential(lanes.log_ratio);
  lanes.ratio = exponential_of.value;
  lanes.approx_kl = exponential_of.beyond_linear;
  return lanes;
}

struct TokenResult {
  Vec loss;
  Vec slope;  // d loss / d logprob
  Vec stats[kMaxStats];
};

// ---- losses whose every token looks at itself only

struct PpoClip {
  static constexpr int64_t kOptions = 2, kStats = 4;
  Vec low, high;
  VECTOR_MEMBER PpoClip(const double* options) : low(splat(1.0 - options[0])), high(splat(1.0 + options[1])) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    const IntVec is_low = (t.advantages < 0) & (t.ratio < low), is_high = (t.advantages > 0) & (t.ratio > high);
    const IntVec is_clipped = is_low | is_high;
    const Vec bounded = select(is_low, low, select(is_high, high, t.ratio));
    const Vec loss = -bounded * t.advantages;
    return {loss, where(t.inside & ~is_clipped, loss), {t.ratio, t.approx_kl, one_where(is_low), one_where(is_high)}};
  }
};

struct DualClip {
  static constexpr int64_t kOptions = 3, kStats = 5;
  PpoClip clip;
  Vec cap;
  VECTOR_MEMBER DualClip(const double* options) : clip(options), cap(splat(options[2])) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    TokenResult out = clip(t);
    const Vec bound = -cap * t.advantages;
    const IntVec is_capped = (t.advantages < 0) & (out.loss > bound);
    out.loss = select(is_capped, bound, out.loss);
    out.slope = where(~is_capped, out.slope);
    out.stats[4] = one_where(is_capped);
    return out;
  }
};

struct Cispo {
  static constexpr int64_t kOptions = 2, kStats = 4;
  Vec low, high;
  VECTOR_MEMBER Cispo(const double* options) : low(splat(1.0 - options[0])), high(splat(1.0 + options[1])) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    const Vec slope = -at_most(at_least(t.ratio, low), high) * t.advantages;
    return {slope * t.logprobs, slope, {t.ratio, t.approx_kl, one_where(t.ratio < low), one_where(t.ratio > high)}};
  }
};

struct Sapo {
  static constexpr int64_t kOptions = 2, kStats = 3;
  Vec tau_positive, tau_negative;
  VECTOR_MEMBER Sapo(const double* options) : tau_positive(splat(options[0])), tau_negative(splat(options[1])) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    const Vec tau = select(t.advantages > 0, tau_positive, tau_negative);
    const Vec decay = exp(at_most(tau * (1.0f - t.ratio), splat(87.0f)));
    const Vec open = 1.0f / (1.0f + decay);
    const Vec weight = 4.0f * open * (decay * open);  // 1 - open, without cancellation
    return {-t.advantages * open * (4.0f / tau), where(t.inside, -t.advantages * t.ratio * weight), {t.ratio, t.approx_kl, weight}};
  }
};

// What the two dppo losses share; is_low and is_high: the token lies outside the region on that side.
VECTOR_INLINE TokenResult masked_surrogate(const Lanes& t, IntVec is_low, IntVec is_high, Vec cap) {
  is_low &= t.advantages < 0;
  is_high &= t.advantages > 0;
  const Vec slope = where(~(is_low | is_high), -at_most(t.ratio, cap) * t.advantages);
  // The surrogate's value, straight through: its gradient is the slope, whatever the ratio. x - x is 0, or NaN.
  const Vec loss = slope * (1.0f + (t.logprobs - t.logprobs));
  return {loss, slope, {t.ratio, t.approx_kl, one_where(is_low), one_where(is_high), one_where(t.ratio > cap)}};
}
VECTOR_INLINE Vec probability(Vec logprobs) { return exp(at_most(logprobs, splat(0.0f))); }

struct DppoTv {
  static constexpr int64_t kOptions = 3, kStats = 5;
  Vec low, high, cap;
  VECTOR_MEMBER DppoTv(const double* options) : low(splat(-options[0])), high(splat(options[1])), cap(splat(options[2])) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    const Vec moved = probability(t.logprobs) - probability(t.denominators);
    return masked_surrogate(t, moved < low, moved > high, cap);
  }
};

struct DppoKl {
  static constexpr int64_t kOptions = 3, kStats = 5;
  Vec low, high, cap, safe;
  VECTOR_MEMBER DppoKl(const double* options)
      : low(splat(options[0])), high(splat(options[1])), cap(splat(options[2])),
        safe(splat(1.98 * (options[0] < options[1] ? options[0] : options[1]))) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    const Vec p = probability(t.logprobs), q = probability(t.denominators), moved = p - q;
    // KL is the integral of (x - q) / (x (1 - x)) from q to p, so at most (p - q)^2 / 2 over the lesser x (1 - x) of both ends: most tokens
    // move so little that no logarithm is needed.
    const Vec p_spread = p * (1.0f - p), q_spread = q * (1.0f - q);
    if (!any(t.counts & (moved * moved > safe * at_most(p_spread, q_spread)))) return masked_surrogate(t, IntVec{}, IntVec{}, cap);
    const Vec others = (1.0f - q) * log_positive((1.0f - q + 1e-8f) / (1.0f - p + 1e-8f));
    const Vec kl = others - q * t.log_ratio;
    return masked_surrogate(t, (kl > low) & (p < q), (kl > high) & (p > q), cap);
  }
};

struct ClipCov {
  static constexpr int64_t kOptions = 2, kStats = 5;
  PpoClip clip;
  VECTOR_MEMBER ClipCov(const double* options) : clip(options) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    TokenResult out = clip(t);
    out.loss = where(~t.marked, out.loss);
    out.slope = where(~t.marked, out.slope);
    out.stats[4] = one_where(t.marked);
    return out;
  }
};

struct KlCov {
  static constexpr int64_t kOptions = 1, kStats = 4;
  Vec coef;
  VECTOR_MEMBER KlCov(const double* options) : coef(splat(options[0])) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    const Vec penalty = where(t.marked, abs(t.log_ratio)), surrogate = -t.ratio * t.advantages;
    const Vec sign = one_where(t.log_ratio > 0) - one_where(t.log_ratio < 0);
    const Vec slope = where(t.inside, surrogate + where(t.marked, coef * sign));
    return {coef * penalty + surrogate, slope, {t.ratio, t.approx_kl, one_where(t.marked), penalty}};
  }
};

struct Reinforce {
  static constexpr int64_t kOptions = 0, kStats = 2;
  VECTOR_MEMBER Reinforce(const double*) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    return {-t.advantages * t.logprobs, -t.advantages, {t.ratio, t.approx_kl}};
  }
};

struct ImportanceSampling {
  static constexpr int64_t kOptions = 0, kStats = 2;
  VECTOR_MEMBER ImportanceSampling(const double*) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const {
    const Vec loss = -t.ratio * t.advantages;
    return {loss, where(t.inside, loss), {t.ratio, t.approx_kl}};
  }
};

struct CrossEntropy {
  static constexpr int64_t kOptions = 0, kStats = 0;
  VECTOR_MEMBER CrossEntropy(const double*) {}
  VECTOR_MEMBER TokenResult operator()(const Lanes& t) const { return {-t.logprobs, -one_where(t.counts), {}}; }
};

// ---- losses with one number for a whole sequence, exp of the mean over its tokens of a part of each
//
// Three walks over a sequence, which the caches keep: the parts are summed (`part`, and whether it follows the token's logprob);
// then every token has its loss for that number (`operator()`, whose slope is by the number's logarithm); then that slope goes back
// to the tokens, through the mean (kThroughMean) or straight to each token's own logprob. Statistics of the first walk come first.

struct Part {
  Vec value;
  IntVec follows;
  Vec stats[kMaxStats];
};
// What the second walk sees: `scale` is exp of the sequence's mean.
struct ScaledLanes {
  IntVec counts;
  Vec advantages, scale;
};

template <bool kThrough>
struct Gspo {
  static constexpr int64_t kOptions = 2, kFirstStats = 1, kStats = 4;
  static constexpr bool kThroughMean = kThrough;
  Vec low, high;
  VECTOR_MEMBER Gspo(const double* options) : low(splat(1.0 - options[0])), high(splat(1.0 + options[1])) {}
  VECTOR_MEMBER Part part(const Lanes& t) const { return {t.log_ratio, t.inside, {t.approx_kl}}; }
  VECTOR_MEMBER TokenResult operator()(const ScaledLanes& t) const {
    const IntVec is_low = (t.advantages < 0) & (t.scale < low), is_high = (t.advantages > 0) & (t.scale > high);
    const Vec loss = -select(is_low, low, select(is_high, high, t.scale)) * t.advantages;
    return {loss, where(~(is_low | is_high), loss), {t.scale, one_where(is_low), one_where(is_high)}};
  }
};

struct Gmpo {
  static constexpr int64_t kOptions = 2, kFirstStats = 4, kStats = 5;
  static constexpr bool kThroughMean = true;
  Vec low, high;
  VECTOR_MEMBER Gmpo(const double* options) : low(splat(-options[0])), high(splat(options[1])) {}
  VECTOR_MEMBER Part part(const Lanes& t) const {
    const IntVec is_positive = t.advantages > 0, is_negative = t.advantages < 0;
    const IntVec is_low = is_negative & (t.log_ratio < low), is_high = is_positive & (t.log_ratio > high);
    const Vec bounded = select(is_low, low, select(is_high, high, t.log_ratio));
    const IntVec takes_part = is_positive | is_negative;
    return {where(takes_part, bounded), t.inside & takes_part & ~(is_low | is_high),
            {t.ratio, t.approx_kl, one_where(is_low), one_where(is_high)}};
  }
  VECTOR_MEMBER TokenResult operator()(const ScaledLanes& t) const {
    const Vec loss = -t.scale * t.advantages;
    return {loss, loss, {t.scale}};
  }
};

// ---- the loops

// The ragged end of a range as kLanes tokens, those beyond it masked.
struct Tail {
  float logprobs[kLanes] = {}, denominators[kLanes] = {}, advantages[kLanes] = {}, weights[kLanes] = {}, loss_weights[kLanes] = {};
  uint8_t loss_mask[kLanes] = {}, marked[kLanes] = {};
  float gradient[kLanes] = {};
  PolicyLossTokens tokens;
};
VECTOR_INLINE void fill_tail(Tail& tail, const PolicyLossTokens& tokens, int64_t at, int64_t count) {
  memcpy(tail.logprobs, tokens.logprobs + at, count * sizeof(float));
  memcpy(tail.denominators, tokens.denominators + at, count * sizeof(float));
  memcpy(tail.advantages, tokens.advantages + at, count * sizeof(float));
  memcpy(tail.weights, tokens.weights + at, count * sizeof(float));
  memcpy(tail.loss_weights, tokens.loss_weights + at, count * sizeof(float));
  memcpy(tail.loss_mask, tokens.loss_mask + at, count);
  memcpy(tail.marked, tokens.marked + at, count);
  tail.tokens = {tail.logprobs, tail.denominators, tail.advantages, tail.weights, tail.loss_weights, tail.loss_mask, tail.marked, tail.gradient};
}

template <class Loss>
VECTOR_INLINE void add_lanes(const Loss& loss, const PolicyLossTokens& tokens, int64_t at, BlockSums<1 + Loss::kStats>& sums) {
  const Lanes lanes = load_lanes(tokens, at);
  const TokenResult result = loss(lanes);
  const Vec weights = where(lanes.counts, load(tokens.weights + at)), loss_weights = where(lanes.counts, load(tokens.loss_weights + at));
  store(tokens.gradient + at, result.slope * loss_weights);
  sums.lanes[0] += result.loss * loss_weights;
  for (int64_t k = 0; k < Loss::kStats; k++) sums.lanes[1 + k] += result.stats[k] * weights;
}

// Tokens [begin, end): adds (loss, statistics) to `sums` and writes the gradient.
template <class Loss>
static void token_loss(const PolicyLossTokens& given, int64_t begin, int64_t end, const double* options, double* sums) {
  const PolicyLossTokens tokens = given;  // pointers that no store can change: they stay in registers
  const Loss loss(options);
  while (begin < end) {
    const int64_t stop = end - begin < kBlock ? end : begin + kBlock;
    BlockSums<1 + Loss::kStats> block;
    block.clear();
    int64_t t = begin;
    for (; t + kLanes <= stop; t += kLanes) add_lanes(loss, tokens, t, block);
    if (t < stop) {
      Tail tail;
      fill_tail(tail, tokens, t, stop - t);
      add_lanes(loss, tail.tokens, 0, block);
      memcpy(tokens.gradient + t, tail.gradient, (stop - t) * sizeof(float));
    }
    block.add_to(sums);
    begin = stop;
  }
}

// Sums of the first walk: the parts, how many tokens count, statistics. The gradient's place holds who follows, 1 or 0.
template <class Loss>
VECTOR_INLINE void add_parts(const Loss& loss, const PolicyLossTokens& tokens, int64_t at, BlockSums<2 + Loss::kFirstStats>& sums) {
  const Lanes lanes = load_lanes(tokens, at);
  const Part part = loss.part(lanes);
  const Vec weights = where(lanes.counts, load(tokens.weights + at));
  store(tokens.gradient + at, one_where(part.follows));
  sums.lanes[0] += part.value;
  sums.lanes[1] += one_where(lanes.counts);
  for (int64_t k = 0; k < Loss::kFirstStats; k++) sums.lanes[2 + k] += part.stats[k] * weights;
}

// Sums of the second walk: the loss, its slope by the logarithm of the sequence's number, statistics.
template <class Loss>
VECTOR_INLINE void add_scaled(const Loss& loss, const PolicyLossTokens& tokens, int64_t at, Vec scale,
                              BlockSums<2 + Loss::kStats - Loss::kFirstStats>& sums) {
  const IntVec counts = load_bools(tokens.loss_mask + at);
  const TokenResult result = loss(ScaledLanes{counts, where(counts, load(tokens.advantages + at)), scale});
  const Vec weights = where(counts, load(tokens.weights + at)), loss_weights = where(counts, load(tokens.loss_weights + at));
  const Vec slope = result.slope * loss_weights;
  if (!Loss::kThroughMean) store(tokens.gradient + at, slope * load(tokens.gradient + at));
  sums.lanes[0] += result.loss * loss_weights;
  sums.lanes[1] += slope;
  for (int64_t k = 0; k < Loss::kStats - Loss::kFirstStats; k++) sums.lanes[2 + k] += result.stats[k] * weights;
}

// One sequence, tokens [begin, end). As token_loss.
template <class Loss>
static void sequence_loss(const PolicyLossTokens& given, int64_t begin, int64_t end, const double* options, double* sums) {
  constexpr int64_t kSecondStats = Loss::kStats - Loss::kFirstStats;
  const PolicyLossTokens tokens = given;
  const Loss loss(options);
  const int64_t whole = begin + (end - begin) / kLanes * kLanes;
  Tail tail;
  if (whole < end) fill_tail(tail, tokens, whole, end - whole);

  double first[2 + Loss::kFirstStats] = {};
  for (int64_t from = begin; from < whole;) {
    const int64_t stop = whole - from < kBlock ? whole : from + kBlock;
    BlockSums<2 + Loss::kFirstStats> block;
    block.clear();
    for (; from < stop; from += kLanes) add_parts(loss, tokens, from, block);
    block.add_to(first);
  }
  if (whole < end) {
    BlockSums<2 + Loss::kFirstStats> block;
    block.clear();
    add_parts(loss, tail.tokens, 0, block);
    block.add_to(first);
  }
  const double count = first[1] > 1.0 ? first[1] : 1.0;
  const Vec scale = exp(splat((float)(first[0] / count)));

  double second[2 + kSecondStats] = {};
  for (int64_t from = begin; from < whole;) {
    const int64_t stop = whole - from < kBlock ? whole : from + kBlock;
    BlockSums<2 + kSecondStats> block;
    block.clear();
    for (; from < stop; from += kLanes) add_scaled(loss, tokens, from, scale, block);
    block.add_to(second);
  }
  if (whole < end) {
    BlockSums<2 + kSecondStats> block;
    block.clear();
    add_scaled(loss, tail.tokens, 0, scale, block);
    block.add_to(second);
  }
  if (whole < end) memcpy(tokens.gradient + whole, tail.gradient, (end - whole) * sizeof(float));
  if (Loss::kThroughMean) {
    const float to_each = (float)(second[1] / count);
    for (int64_t t = begin; t < end; t++) tokens.gradient[t] = tokens.gradient[t] != 0.0f ? to_each : 0.0f;
  }

  sums[0] += second[0];
  for (int64_t k = 0; k < Loss::kFirstStats; k++) sums[1 + k] += first[2 + k];
  for (int64_t k = 0; k < kSecondStats; k++) sums[1 + Loss::kFirstStats + k] += second[2 + k];
}

// ---- by name

#define TOKEN_LOSS(name, Loss) {name, Loss::kOptions, Loss::kStats, false, &token_loss<Loss>}
#define SEQUENCE_LOSS(name, Loss) {name, Loss::kOptions, Loss::kStats, true, &sequence_loss<Loss>}
static const PolicyLossKernel kPolicyLosses[] = {
    TOKEN_LOSS("ppo_clip", PpoClip),
    TOKEN_LOSS("dual_clip", DualClip),
    TOKEN_LOSS("cispo", Cispo),
    TOKEN_LOSS("sapo", Sapo),
    TOKEN_LOSS("dppo_tv", DppoTv),
    TOKEN_LOSS("dppo_kl", DppoKl),
    TOKEN_LOSS("clip_cov", ClipCov),
    TOKEN_LOSS("kl_cov", KlCov),
    TOKEN_LOSS("reinforce", Reinforce),
    TOKEN_LOSS("gpg", Reinforce),
    TOKEN_LOSS("importance_sampling", ImportanceSampling),
    TOKEN_LOSS("cross_entropy", CrossEntropy),
    SEQUENCE_LOSS("gspo", Gspo<true>),
    SEQUENCE_LOSS("gspo_token", Gspo<false>),
    SEQUENCE_LOSS("gmpo", Gmpo),
};
#undef TOKEN_LOSS
#undef SEQUENCE_LOSS

// The kernel of that name; null where there is none.
static const PolicyLossKernel* find_policy_loss(const char* name) {
  for (const PolicyLossKernel& kernel : kPolicyLosses)
    if (strcmp(kernel.name, name) == 0) return &kernel;
  return nullptr;
}
