// float32 vectors for one instruction set, on the compiler's vector extension. No include guard: for_each_isa.h includes it once
// per variant, inside the variant's namespace. Lanes: 16 (avx512), 8 (avx2), 4 (portable).

#define VECTOR_INLINE static inline __attribute__((always_inline))

constexpr int64_t kLanes = SKYRL_MEGA_VECTOR_BYTES / 4;
typedef float Vec __attribute__((vector_size(SKYRL_MEGA_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(SKYRL_MEGA_VECTOR_BYTES)));  // also what comparing two Vec gives: 0 or -1
typedef uint32_t UintVec __attribute__((vector_size(SKYRL_MEGA_VECTOR_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(SKYRL_MEGA_VECTOR_BYTES / 2)));

VECTOR_INLINE Vec splat(float value) { return value - (Vec){}; }
VECTOR_INLINE Vec load(const float* from) {
  Vec out;
  memcpy(&out, from, sizeof out);
  return out;
}
VECTOR_INLINE void store(float* to, Vec value) { memcpy(to, &value, sizeof value); }

// b where either is NaN, as the x86 instructions have it.
#if SKYRL_MEGA_VECTOR_BYTES == 64
VECTOR_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif SKYRL_MEGA_VECTOR_BYTES == 32
VECTOR_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
VECTOR_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif

// The first `count` (1 .. kLanes) lanes from memory, `filler` in the others: for the ragged end of a row.
VECTOR_INLINE Vec load_partial(const float* from, int64_t count, float filler) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; i++) lanes[i] = i < count ? from[i] : filler;
  return load(lanes);
}

// bfloat16 (as its 16 bits) to float32, exact.
VECTOR_INLINE Vec load_bf16(const uint16_t* from) {
  HalfVec bits;
  memcpy(&bits, from, sizeof bits);
  return (Vec)(__builtin_convertvector(bits, UintVec) << 16);
}
// float32 to the bits of bfloat16, to nearest even, in the low half of each lane. NaN stays NaN (quiet).
VECTOR_INLINE UintVec bf16_bits(Vec value) {
#if SKYRL_MEGA_VECTOR_BYTES == 64
  return (UintVec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
  const UintVec bits = (UintVec)value;
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (value != value) ? ((bits >> 16) | 0x40u) : rounded;
#endif
}
VECTOR_INLINE void store_bf16(uint16_t* to, UintVec bits) {
  const HalfVec narrow = __builtin_convertvector(bits, HalfVec);
  memcpy(to, &narrow, sizeof narrow);
}

VECTOR_INLINE float horizontal_max(Vec value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}
VECTOR_INLINE float horizontal_sum(Vec value) {  // pairwise, in a fixed order
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// exp(x) for -104.5 <= x <= 88, within 2 ulp; results below 2^-126 lose bits as float32 does, to 0 below -104; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2)/2 (ln 2 in two parts, Cody and Waite), then a polynomial in r times 2^n. The polynomial is the
// minimax one of Cephes (expf): 1 + r + r^2 q(r).
constexpr float kExpLowest = -104.5f;
VECTOR_INLINE Vec exp_in_range(Vec x) {
#if SKYRL_MEGA_VECTOR_BYTES == 64
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * 1.44269504089f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const Vec shifted = x * 1.44269504089f + shifter;
  const Vec n = shifted - shifter;
#endif
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec q = splat(1.9875691500e-4f);
  q = q * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  const Vec p = q * (r * r) + r + 1.0f;
#if SKYRL_MEGA_VECTOR_BYTES == 64
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // 2^n in two factors: n may be as low as -151, below what one float's exponent holds.
  const IntVec integer = (IntVec)shifted - (IntVec)shifter;
  const IntVec half = integer >> 1;
  return (p * (Vec)((half + 127) << 23)) * (Vec)((integer - half + 127) << 23);
#endif
}

// exp(x) for every x <= 88, -inf included.
VECTOR_INLINE Vec exp(Vec x) { return exp_in_range(max(splat(kExpLowest), x)); }
