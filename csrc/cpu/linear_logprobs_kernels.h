// The inner loops of the LM head for one instruction set: included by linear_logprobs.cpp through for_each_isa.h.
//
// Everything works on tiles of logits [rows of the vocabulary][kBlock tokens], tokens across lanes. A matrix is read in 32-bit
// words along the contracted dimension: one float32, or two neighbouring bfloat16.

// ---- GEMM: c[rows][kBlock] (+)= a[rows][words] . b[words][kBlock] ----
//
// float32 sums over pieces of at most kGemmWords words, ascending, which are then added up: one running sum over a whole vocabulary would
// lose ten times as much to rounding.

// acc += a . b for one word of a row (the same in all lanes) and one word of each token.
template <bool kBf16>
VECTOR_INLINE Vec dot(Vec acc, uint32_t a, Vec b) {
  if constexpr (!kBf16) {
    float value;
    memcpy(&value, &a, sizeof value);
    return splat(value) * b + acc;
  } else {
#if SKYRL_MEGA_VECTOR_BYTES == 64
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    const uint32_t low_bits = a << 16, high_bits = a & 0xffff0000u;
    float low, high;
    memcpy(&low, &low_bits, sizeof low);
    memcpy(&high, &high_bits, sizeof high);
    acc = splat(high) * (Vec)((UintVec)b & 0xffff0000u) + acc;
    return splat(low) * (Vec)((UintVec)b << 16) + acc;
#endif
  }
}

#if SKYRL_MEGA_VECTOR_BYTES == 64
constexpr int kGemmRows = 6, kGemmVectors = 4;  // 24 sums, 4 vectors of b and one of a: 29 of the 32 registers
#elif SKYRL_MEGA_VECTOR_BYTES == 32
constexpr int kGemmRows = 6, kGemmVectors = 2;
#else
constexpr int kGemmRows = 4, kGemmVectors = 2;
#endif

template <bool kBf16, int kRows>
VECTOR_INLINE void gemm_rows(const char* a, int64_t a_stride, const float* b, float* c, int64_t words, bool accumulate,
                             float scale) {
  Vec sums[kRows][kGemmVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < kGemmVectors; v++) sums[i][v] = Vec{};
  for (int64_t k = 0; k < words; k++) {
    Vec columns[kGemmVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kGemmVectors; v++) columns[v] = load(b + k * kBlock + v * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; i++) {
      uint32_t word;
      memcpy(&word, a + i * a_stride + k * 4, sizeof word);
#pragma GCC unroll 4
      for (int v = 0; v < kGemmVectors; v++) sums[i][v] = dot<kBf16>(sums[i][v], word, columns[v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < kGemmVectors; v++) {
      float* place = c + i * kBlock + v * kLanes;
      store(place, (accumulate ? load(place) + sums[i][v] : sums[i][v]) * scale);
    }
}

// One column strip of the tile: kGemmRows rows at a time, then the rest at once.
template <bool kBf16>
static void gemm_strip(const char* a, int64_t a_stride, const float* b, float* c, int64_t rows, int64_t words, bool accumulate,
                       float scale) {
  int64_t row = 0;
  for (; row + kGemmRows <= rows; row += kGemmRows)
    gemm_rows<kBf16, kGemmRows>(a + row * a_stride, a_stride, b, c + row * kBlock, words, accumulate, scale);
  a += row * a_stride;
  c += row * kBlock;
  switch (rows - row) {
    case 5: gemm_rows<kBf16, 5>(a, a_stride, b, c, words, accumulate, scale); break;
    case 4: gemm_rows<kBf16, 4>(a, a_stride, b, c, words, accumulate, scale); break;
    case 3: gemm_rows<kBf16, 3>(a, a_stride, b, c, words, accumulate, scale); break;
    case 2: gemm_rows<kBf16, 2>(a, a_stride, b, c, words, accumulate, scale); break;
    case 1: gemm_rows<kBf16, 1>(a, a_stride, b, c, words, accumulate, scale); break;
    default: break;
  }
}

// a_stride in bytes. The result, with what it was added to, is multiplied by `scale`.
static void gemm_tile(bool bf16, const void* a, int64_t a_stride, const void* b, float* c, int64_t rows, int64_t words,
                      bool accumulate, float scale) {
  const int64_t pieces = (words + kGemmWords - 1) / kGemmWords, longest = (words + pieces - 1) / pieces;
  for (int64_t k = 0; k < words; k += longest) {
    const int64_t piece = words - k < longest ? words - k : longest;
    const float piece_scale = k + piece == words ? scale : 1.0f;
    for (int64_t strip = 0; strip < kBlock; strip += kGemmVectors * kLanes) {
      const char* a_k = static_cast<const char*>(a) + k * 4;
      const float* b_k = static_cast<const float*>(b) + k * kBlock + strip;
      if (bf16)
        gemm_strip<true>(a_k, a_stride, b_k, c + strip, rows, piece, accumulate || k > 0, piece_scale);
      else
        gemm_strip<false>(a_k, a_stride, b_k, c + strip, rows, piece, accumulate || k > 0, piece_scale);
    }
  }
}

// ---- Soft cap: a logit z becomes cap tanh(z / cap) ----

// tanh within 3 ulp, +-1 at +-inf; NaN stays NaN. Below 0.625 an odd polynomial (fitted for the least relative error), since
// (1 - e) / (1 + e) with e = exp(-2 |x|) loses the digits of a small result.
VECTOR_INLINE Vec tanh(Vec x) {
  const UintVec sign = (UintVec)x & 0x80000000u;
  const Vec size = (Vec)((UintVec)x ^ sign), square = x * x;
  Vec p = splat(-5.7049827e-3f);
  p = p * square + 2.0639082e-2f;
  p = p * square - 5.3739715e-2f;
  p = p * square + 1.3331442e-1f;
  p = p * square - 3.3333281e-1f;
  const Vec small = p * square * x + x;
  const Vec e = exp(size * -2.0f);
  const Vec large = (Vec)((UintVec)((1.0f - e) / (1.0f + e)) | sign);
  return size < 0.625f ? small : large;
}

static void cap_tile(float* tile, int64_t rows, float cap) {
  for (int64_t i = 0; i < rows * kBlock; i += kLanes) store(tile + i, tanh(load(tile + i) * (1.0f / cap)) * cap);
}

// ---- Statistics of a tile ----

// -1 in the lanes whose column takes part: at or above the floor, or the label's own.
VECTOR_INLINE IntVec included(Vec z, Vec floor, IntVec label_row, int32_t row) { return (z >= floor) | (label_row == row); }

// Two vectors of tokens at once: their chains of sums hide each other's latency.
template <bool kEntropy, bool kFloor>
VECTOR_INLINE void reduce_lanes(const float* tile, int64_t rows, const float* floor,
                                const int32_t* label_rows, float* max_lanes, float* sum_lanes, float* shifted_lanes) {
  constexpr int kVectors = 2;
  Vec floors[kVectors];
  IntVec labels[kVectors];
  Vec old_max[kVectors], new_max[kVectors], shift[kVectors], sum[kVectors], shifted[kVectors];
  for (int v = 0; v < kVectors; v++) {
    old_max[v] = new_max[v] = load(max_lanes + v * kLanes);
    sum[v] = shifted[v] = Vec{};
    if constexpr (kFloor) {
      floors[v] = load(floor + v * kLanes);
      memcpy(&labels[v], label_rows + v * kLanes, sizeof(IntVec));
    }
  }
  for (int64_t row = 0; row < rows; row++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      Vec z = load(tile + row * kBlock + v * kLanes);
      if constexpr (kFloor) z = included(z, floors[v], labels[v], (int32_t)row) ? z : splat(-__builtin_inff());
      new_max[v] = max(z, new_max[v]);
    }
  for (int v = 0; v < kVectors; v++)  // no column so far: any finite number keeps -inf - shift from being NaN
    shift[v] = new_max[v] == -__builtin_inff() ? Vec{} : new_max[v];
  for (int64_t row = 0; row < rows; row++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      Vec z = load(tile + row * kBlock + v * kLanes);
      if constexpr (kFloor) z = included(z, floors[v], labels[v], (int32_t)row) ? z : splat(-__builtin_inff());
      const Vec distance = max(splat(kExpLowest), z - shift[v]);  // finite: 0 * -inf would be NaN
      const Vec e = exp_in_range(distance);
      sum[v] += e;
      if constexpr (kEntropy) shifted[v] += distance * e;
    }
  for (int v = 0; v < kVectors; v++) {
    const Vec moved = old_max[v] == -__builtin_inff() ? Vec{} : old_max[v] - shift[v];
    const Vec scale = exp(old_max[v] - shift[v]);
    const Vec old_sum = load(sum_lanes + v * kLanes);
    if constexpr (kEntropy)
      store(shifted_lanes + v * kLanes, (load(shifted_lanes + v * kLanes) + moved * old_sum) * scale + shifted[v]);
    store(sum_lanes + v * kLanes, old_sum * scale + sum[v]);
    store(max_lanes + v * kLanes, new_max[v]);
  }
}

template <bool kEntropy, bool kFloor>
static void reduce_block(const float* tile, int64_t rows, const float* floor,
                         const int32_t* label_rows, float* statistics) {
  for (int64_t token = 0; token < kBlock; token += 2 * kLanes)
    reduce_lanes<kEntropy, kFloor>(tile + token, rows, kFloor ? floor + token : nullptr,
                                   label_rows + token, statistics + token, statistics + kBlock + token, statistics + 2 * kBlock + token);
}

// Merges a tile into statistics[4][kBlock] = (m, s, x, label logit). label_rows[kBlock]: the label's row in this tile, -1 if none.
// floor is null or [kBlock].
static void reduce_tile(const float* tile, int64_t rows, bool with_entropy, const float* floor,
                        const int32_t* label_rows, float* statistics) {
  if (floor == nullptr && with_entropy)
    reduce_block<true, false>(tile, rows, floor, label_rows, statistics);
  else if (floor == nullptr)
    reduce_block<false, false>(tile, rows, floor, label_rows, statistics);
  else if (with_entropy)
    reduce_block<true, true>(tile, rows, floor, label_rows, statistics);
  else
    reduce_block<false, true>(tile, rows, floor, label_rows, statistics);
  for (int64_t token = 0; token < kBlock; token++)
    if (label_rows[token] >= 0)
      statistics[3 * kBlock + token] = tile[label_rows[token] * kBlock + token];
}

// Keeps each token's top_k largest logits, descending, in values and columns [kBlock][top_k]. Columns come in ascending order and
// only a strictly larger logit displaces another, so that the lower column wins a tie.
static void update_topk(const float* tile, int64_t rows, int64_t first_column, int64_t top_k,
                        float* values, int64_t* columns) {
  float thresholds[kBlock];
  for (int64_t token = 0; token < kBlock; token++) thresholds[token] = values[token * top_k + top_k - 1];
  for (int64_t row = 0; row < rows; row++) {
    const float* logits = tile + row * kBlock;
    IntVec any = {};
    for (int64_t token = 0; token < kBlock; token += kLanes)
      any |= load(logits + token) > load(thresholds + token);
    uint64_t halves[sizeof any / 8], some = 0;
    memcpy(halves, &any, sizeof any);
    for (uint64_t half : halves) some |= half;
    if (some == 0) continue;
    for (int64_t token = 0; token < kBlock; token++) {
      const float z = logits[token];
      if (!(z > thresholds[token])) continue;
      float* best = values + token * top_k;
      int64_t* where = columns + token * top_k;
      int64_t slot = top_k - 1;
      for (; slot > 0 && best[slot - 1] < z; slot--) {
        best[slot] = best[slot - 1];
        where[slot] = where[slot - 1];
      }
      best[slot] = z;
      where[slot] = first_column + row;
      thresholds[token] = best[top_k - 1];
    }
  }
}

// ---- Gradient of a tile ----

// at_label counts in the lanes whose label is this row. kCap: z is capped, and the result is with respect to the logit before, by
// the cap's slope 1 - tanh^2 = 1 - (z / cap)^2.
template <bool kSlope, bool kFloor, bool kCap>
VECTOR_INLINE Vec gradient(Vec z, Vec lse, Vec a, Vec b, Vec at_label, Vec floor, IntVec label_row, int32_t row,
                           float inverse_cap) {
  const Vec logprob = max(splat(kExpLowest), z - lse);  // finite: 0 * -inf would be NaN
  const Vec p = exp_in_range(logprob);
  Vec slope = a;
  if constexpr (kSlope) slope = b * logprob + a;
  Vec out = slope * p;
  if constexpr (kFloor) out = included(z, floor, label_row, row) ? out : Vec{};
  out += label_row == row ? at_label : Vec{};
  if constexpr (kCap) out *= 1.0f - (z * inverse_cap) * (z * inverse_cap);
  return out;
}

template <bool kBf16, bool kSlope, bool kFloor, bool kCap>
static void gradient_block(float* tile, int64_t rows, const BlockCoefficients& coefficients, const float* floor,
                           const int32_t* label_rows, float inverse_cap, uint32_t* operand, char* kept, int64_t kept_stride) {
  for (int64_t token = 0; token < kBlock; token += kLanes) {
    const Vec lse = load(coefficients.lse + token), a = load(coefficients.a + token), b = load(coefficients.b + token);
    Vec floors = {};
    IntVec labels;
    memcpy(&labels, label_rows + token, sizeof labels);
    if constexpr (kFloor) floors = load(floor + token);
    const Vec at_label = load(coefficients.c + token);
    int64_t row = 0;
    if constexpr (!kBf16) {
      for (; row < rows; row++) {
        float* place = tile + row * kBlock + token;
        const Vec d = gradient<kSlope, kFloor, kCap>(load(place), lse, a, b, at_label, floors, labels, (int32_t)row, inverse_cap);
        store(place, d);
        if (kept) store((float*)(kept + row * kept_stride) + token, d);
      }
    } else {
      for (; row < rows; row += 2) {
        const float* place = tile + row * kBlock + token;
        Vec d = gradient<kSlope, kFloor, kCap>(load(place), lse, a, b, at_label, floors, labels, (int32_t)row, inverse_cap);
        const UintVec first = bf16_bits(d);
        UintVec second = {};
        if (kept) store_bf16((uint16_t*)(kept + row * kept_stride) + token, first);
        if (row + 1 < rows) {
          d = gradient<kSlope, kFloor, kCap>(load(place + kBlock), lse, a, b, at_label, floors, labels, (int32_t)row + 1, inverse_cap);
          second = bf16_bits(d);
          if (kept) store_bf16((uint16_t*)(kept + (row + 1) * kept_stride) + token, second);
        }
        store((float*)operand + row / 2 * kBlock + token, (Vec)(first | (second << 16)));
      }
    }
  }
}

template <bool kBf16>
VECTOR_INLINE void gradient_tile_of(float* tile, int64_t rows, const BlockCoefficients& coefficients, bool with_slope,
                                    const float* floor, const int32_t* label_rows, float inverse_cap, uint32_t* operand,
                                    char* kept, int64_t kept_stride) {
  if (floor == nullptr && inverse_cap != 0)
    gradient_block<kBf16, true, false, true>(tile, rows, coefficients, floor, label_rows, inverse_cap, operand, kept, kept_stride);
  else if (inverse_cap != 0)
    gradient_block<kBf16, true, true, true>(tile, rows, coefficients, floor, label_rows, inverse_cap, operand, kept, kept_stride);
  else if (floor == nullptr && with_slope)
    gradient_block<kBf16, true, false, false>(tile, rows, coefficients, floor, label_rows, inverse_cap, operand, kept, kept_stride);
  else if (floor == nullptr)
    gradient_block<kBf16, false, false, false>(tile, rows, coefficients, floor, label_rows, inverse_cap, operand, kept, kept_stride);
  else
    gradient_block<kBf16, true, true, false>(tile, rows, coefficients, floor, label_rows, inverse_cap, operand, kept, kept_stride);
}

// From logits to their gradient, twice: as the operand of the GEMM that contracts over the vocabulary (float32: in the tile
// itself; bfloat16: pairs of rows in operand[(rows + 1) / 2][kBlock]), and, unless `kept` is null, row by row for the one that
// contracts over tokens (kept_stride in bytes). inverse_cap: 1 / cap where the logits are capped, else 0.
static void gradient_tile(bool bf16, float* tile, int64_t rows, const BlockCoefficients& coefficients,
                          bool with_slope, const float* floor, const int32_t* label_rows, float inverse_cap, uint32_t* operand,
                          char* kept, int64_t kept_stride) {
  if (bf16)
    gradient_tile_of<true>(tile, rows, coefficients, with_slope, floor, label_rows, inverse_cap, operand, kept, kept_stride);
  else
    gradient_tile_of<false>(tile, rows, coefficients, with_slope, floor, label_rows, inverse_cap, operand, kept, kept_stride);
}

// ---- Small ones ----

// bias[rows] comes divided by the temperature, as the logits are.
static void add_bias(float* tile, int64_t rows, const float* bias) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t token = 0; token < kBlock; token += kLanes)
      store(tile + row * kBlock + token, load(tile + row * kBlock + token) + bias[row]);
}

// Sum of `count` (a multiple of kBlock) kept gradients of one row.
static float sum_row(bool bf16, const void* row, int64_t count) {
  Vec sum = {};
  for (int64_t i = 0; i < count; i += kLanes)
    sum += bf16 ? load_bf16((const uint16_t*)row + i) : load((const float*)row + i);
  return horizontal_sum(sum);
}

// Rows of a [rows][kBlock] result, their first `columns` values, into a matrix with `stride` elements a row.
static void write_rows(Write how, const float* result, int64_t rows, int64_t columns, void* out, int64_t stride) {
  for (int64_t row = 0; row < rows; row++) {
    const float* from = result + row * kBlock;
    int64_t column = 0;
    for (; column + kLanes <= columns; column += kLanes) {
      const int64_t to = row * stride + column;
      if (how == Write::float32) store((float*)out + to, load(from + column));
      if (how == Write::add_float32) store((float*)out + to, load((float*)out + to) + load(from + column));
      if (how == Write::bfloat16) store_bf16((uint16_t*)out + to, bf16_bits(load(from + column)));
    }
    if (column == columns) continue;
    const UintVec bits = bf16_bits(load(from + column));
    for (int64_t lane = 0; column < columns; column++, lane++) {
      const int64_t to = row * stride + column;
      if (how == Write::float32) ((float*)out)[to] = from[column];
      if (how == Write::add_float32) ((float*)out)[to] += from[column];
      if (how == Write::bfloat16) ((uint16_t*)out)[to] = (uint16_t)bits[lane];
    }
  }
}
