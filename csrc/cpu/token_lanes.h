// What kernels over packed tokens share: masks, ratios of two policies, sums over a block. No include guard: a header of kernels includes
// it first, once per instruction set.

#define VECTOR_MEMBER inline __attribute__((always_inline))

constexpr int64_t kBlock = 4096;  // tokens whose sums are float32: 256 of them per lane with AVX-512
constexpr float kMaxAbsLogRatio = 20.0f;  // log_ratio.py's

VECTOR_INLINE Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }
VECTOR_INLINE Vec where(IntVec condition, Vec value) { return (Vec)(condition & (IntVec)value); }  // 0 elsewhere
VECTOR_INLINE Vec one_where(IntVec condition) { return where(condition, splat(1.0f)); }
// NaN stays NaN.
VECTOR_INLINE Vec at_least(Vec value, Vec low) { return select(value < low, low, value); }
VECTOR_INLINE Vec at_most(Vec value, Vec high) { return select(value > high, high, value); }
VECTOR_INLINE Vec abs(Vec value) { return (Vec)((IntVec)value & 0x7fffffff); }

// kLanes bools (bytes of 0 or 1) as conditions. GCC 12 takes __builtin_convertvector apart into 50 scalar instructions.
VECTOR_INLINE IntVec load_bools(const uint8_t* from) {
#if SKYRL_MEGA_VECTOR_BYTES == 64
  return -(IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif SKYRL_MEGA_VECTOR_BYTES == 32
  return -(IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return -(IntVec){from[0], from[1], from[2], from[3]};
#endif
}

// exp(x) and exp(x) - 1 - x for |x| <= 20, NaN included: vector.h's exp_in_range, taken apart.
// With x = n ln 2 + r and s = 2^n: exp(x) = s (1 + r + r^2 q) and exp(x) - 1 - x = s r^2 q + (s r + (s - 1) - x), where the
// bracket is exactly 0 at n = 0.
struct Exponential {
  Vec value;
  Vec beyond_linear;
};
VECTOR_INLINE Exponential exponential(Vec x) {
#if SKYRL_MEGA_VECTOR_BYTES == 64
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * 1.44269504089f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec scale = (Vec)_mm512_scalef_ps((__m512)splat(1.0f), (__m512)n);
#else
  const Vec shifter = splat(12582912.0f);
  const Vec shifted = x * 1.44269504089f + shifter;
  const Vec n = shifted - shifter;
  const Vec scale = (Vec)(((IntVec)shifted - (IntVec)shifter + 127) << 23);
#endif
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec q = splat(1.9875691500e-4f);
  q = q * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  const Vec tail = q * (r * r);
  return {scale * (tail + r + 1.0f), scale * tail + ((scale * r + (scale - 1.0f)) - x)};
}

// log(numerator / denominator) of tokens from their logprobs, which are 0 where masked: within +-20. `inside`: counts and is not clipped,
// so that it has a gradient.
struct LogRatio {
  Vec value;
  IntVec inside;
};
VECTOR_INLINE LogRatio clipped_log_ratio(Vec numerator, Vec denominator, IntVec counts) {
  const Vec difference = numerator - denominator, limit = splat(kMaxAbsLogRatio);
  return {at_most(at_least(difference, -limit), limit), counts & (difference >= -limit) & (difference <= limit)};
}

// A block's sums, float32 per lane; flushed into double.
template <int64_t kSums>
struct BlockSums {
  Vec lanes[kSums > 0 ? kSums : 1];
  VECTOR_MEMBER void clear() {
    for (int64_t k = 0; k < kSums; k++) lanes[k] = (Vec){};
  }
  VECTOR_MEMBER void add_to(double* sums) const {
    for (int64_t k = 0; k < kSums; k++) sums[k] += horizontal_sum(lanes[k]);
  }
};
