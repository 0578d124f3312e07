// Softmax statistics, top-k and gradients of one row of given logits. Included once per instruction set.
//
// A row is read once, in tiles that stay in the first-level cache: a tile is widened to float32 and tempered into `z`, its maximum
// found on the way, and then its exponentials summed. Sums within a tile are float32 in several lanes; a row's sums over tiles are
// double. Tiles begin at column 0 and have a fixed width, so a row's bits depend on the row alone.

constexpr int64_t kTile = 512;
constexpr int64_t kChains = 4;              // independent accumulators, to hide the latency of an addition
constexpr float kNoProbability = -104.5f;   // exp of this and of anything below is 0 in float32

VECTOR_INLINE Vec load_logits(const float* from) { return load(from); }
VECTOR_INLINE Vec load_logits(const uint16_t* from) { return load_bf16(from); }
VECTOR_INLINE void store_logits(float* to, Vec value) { store(to, value); }
VECTOR_INLINE void store_logits(uint16_t* to, Vec value) { store_bf16(to, bf16_bits(value)); }

struct RowStatistics {
  float max;
  double sum;      // of exp(z - max)
  double shifted;  // of (z - max) exp(z - max)
  float label;
};

// The K largest logits so far, descending, ties in order of their columns.
struct TopK {
  float* values;
  int64_t* columns;
  int64_t size;
  int64_t found;
};

VECTOR_INLINE float top_k_threshold(const TopK& top) {
  return top.found < top.size ? -__builtin_inff() : top.values[top.size - 1];
}

VECTOR_INLINE void top_k_offer(TopK& top, float z, int64_t column) {
  if (top.found == top.size && !(z > top.values[top.size - 1])) return;
  int64_t at = top.found < top.size ? top.found++ : top.size - 1;
  for (; at > 0 && top.values[at - 1] < z; at--) {
    top.values[at] = top.values[at - 1];
    top.columns[at] = top.columns[at - 1];
  }
  top.values[at] = z;
  top.columns[at] = column;
}

static void top_k_scan(TopK& top, const float* z, int64_t first_column, int64_t count) {
  constexpr int64_t kBlock = 4 * kLanes;
  for (int64_t i = 0; i < count; i += kBlock) {
    if (top.found == top.size) {  // beyond `count` the tile holds -inf
      const Vec highest = max(max(load(z + i), load(z + i + kLanes)), max(load(z + i + 2 * kLanes), load(z + i + 3 * kLanes)));
      if (!(horizontal_max(highest) > top_k_threshold(top))) continue;
    }
    const int64_t end = i + kBlock < count ? i + kBlock : count;
    for (int64_t j = i; j < end; j++) top_k_offer(top, z[j], first_column + j);
  }
}

// z[0 .. kTile) = logits / temperature, -inf from `count` on; returns the maximum.
template <class Logit>
VECTOR_INLINE float fill_tile(const Logit* logits, int64_t count, float inverse_temperature, float* z) {
  Vec highest[kChains];
  for (int64_t c = 0; c < kChains; c++) highest[c] = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes)
    for (int64_t c = 0; c < kChains; c++) {
      const Vec value = load_logits(logits + i + c * kLanes) * inverse_temperature;
      store(z + i + c * kLanes, value);
      highest[c] = max(highest[c], value);
    }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    Logit lanes[kLanes] = {};
    memcpy(lanes, logits + i, left * sizeof(Logit));
    store(z + i, load_logits(lanes) * inverse_temperature);
    for (int64_t j = left; j < kLanes; j++) z[i + j] = -__builtin_inff();
    highest[0] = max(highest[0], load(z + i));
  }
  for (; i < kTile; i += kLanes) store(z + i, splat(-__builtin_inff()));
  return horizontal_max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
}

// Sets what lies below `floor` to -inf, but for the label's column (-1: not in this tile); returns the maximum of what is left.
static float apply_floor(float* z, float floor, int64_t label) {
  const float kept = label >= 0 ? z[label] : 0.0f;
  Vec highest = splat(-__builtin_inff());
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const Vec value = load(z + i);
    store(z + i, value < splat(floor) ? splat(-__builtin_inff()) : value);
    highest = max(highest, load(z + i));
  }
  float tile_max = horizontal_max(highest);
  if (label >= 0) {
    z[label] = kept;
    if (kept > tile_max) tile_max = kept;
  }
  return tile_max;
}

// Adds a tile to the row's sums.
template <bool kEntropy>
VECTOR_INLINE void add_tile(RowStatistics& row, const float* z, int64_t count, float tile_max) {
  if (tile_max > row.max) {
    if (row.max > -__builtin_inff()) {
      const double moved = (double)row.max - tile_max, scale = ::exp(moved);
      row.shifted = (row.shifted + moved * row.sum) * scale;
      row.sum *= scale;
    }
    row.max = tile_max;
  }
  // Nothing included so far: -inf - 0 is still -inf, of probability 0, where -inf - -inf would be NaN.
  const Vec shift = splat(row.max == -__builtin_inff() ? 0.0f : row.max);
  Vec sum[kChains] = {}, shifted[kChains] = {};
  for (int64_t i = 0; i < count; i += kChains * kLanes)
    for (int64_t c = 0; c < kChains; c++) {
      const Vec below = load(z + i + c * kLanes) - shift;
      const Vec probability = exp(below);
      sum[c] += probability;
      if (kEntropy) shifted[c] += max(splat(kNoProbability), below) * probability;  // finite: 0 * -inf would be NaN
    }
  row.sum += horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (kEntropy) row.shifted += horizontal_sum((shifted[0] + shifted[1]) + (shifted[2] + shifted[3]));
}

// One row of `num_columns`. `floor` is -inf where there is none; `column` the label's, negative where it is not in this shard.
// Writes max, sum, shifted and label logit to packed[0], packed[stride], ..., and the top_k largest logits with their columns.
template <class Logit>
static void row_statistics(const Logit* logits, int64_t num_columns, int64_t column, float floor, float inverse_temperature,
                           bool with_entropy, int64_t top_k, float* top_values, int64_t* top_columns, float* packed, int64_t stride) {
  TopK top = {top_values, top_columns, top_k, 0};
  RowStatistics row = {-__builtin_inff(), 0.0, 0.0, 0.0f};
  alignas(64) float z[kTile];
  for (int64_t first = 0; first < num_columns; first += kTile) {
    const int64_t count = num_columns - first < kTile ? num_columns - first : kTile;
    float tile_max = fill_tile(logits + first, count, inverse_temperature, z);
    const int64_t label = column >= first && column < first + count ? column - first : -1;
    if (label >= 0) row.label = z[label];
    if (top.size > 0 && (top.found < top.size || tile_max > top_k_threshold(top))) top_k_scan(top, z, first, count);
    if (floor > -__builtin_inff()) tile_max = apply_floor(z, floor, label);
    if (with_entropy)
      add_tile<true>(row, z, count, tile_max);
    else
      add_tile<false>(row, z, count, tile_max);
  }
  for (int64_t i = top.found; i < top.size; i++) {
    top.values[i] = -__builtin_inff();
    top.columns[i] = -1;
  }
  packed[0] = row.max;
  packed[stride] = (float)row.sum;
  packed[2 * stride] = (float)row.shifted;
  packed[3 * stride] = row.label;
}

// p (a + b (z - lse)) / temperature of kLanes columns; 0 below the floor.
VECTOR_INLINE Vec gradient_lanes(Vec logits, float floor, float lse, const float* coefficients, float inverse_temperature) {
  const Vec z = logits * inverse_temperature;
  const Vec logprob = z - lse;
  const Vec slope = coefficients[0] + coefficients[1] * max(splat(kNoProbability), logprob);
  const Vec gradient = exp(logprob) * slope * inverse_temperature;
  return z < splat(floor) ? (Vec){} : gradient;
}

// One row's gradient with respect to the raw logits; `out` may be `logits`. coefficients: (a, b, c).
template <class Logit>
static void row_gradients(const Logit* logits, int64_t num_columns, int64_t column, float floor, float lse, const float* coefficients,
                          float inverse_temperature, Logit* out) {
  Logit label_logit[kLanes] = {};
  if (column >= 0) label_logit[0] = logits[column];
  int64_t i = 0;
  for (; i + kLanes <= num_columns; i += kLanes)
    store_logits(out + i, gradient_lanes(load_logits(logits + i), floor, lse, coefficients, inverse_temperature));
  if (i < num_columns) {
    Logit lanes[kLanes] = {};
    memcpy(lanes, logits + i, (num_columns - i) * sizeof(Logit));
    store_logits(lanes, gradient_lanes(load_logits(lanes), floor, lse, coefficients, inverse_temperature));
    memcpy(out + i, lanes, (num_columns - i) * sizeof(Logit));
  }
  if (column >= 0) {  // the label's column is never excluded, and has a term of its own
    const Vec at_label = gradient_lanes(load_logits(label_logit), -__builtin_inff(), lse, coefficients, inverse_temperature);
    store_logits(label_logit, at_label + coefficients[2] * inverse_temperature);
    out[column] = label_logit[0];
  }
}
