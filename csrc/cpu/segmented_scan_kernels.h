// The reverse scan y_t = v_t + a_t y_{t+1} over one sequence, kLanes tokens at a time. Included once per instruction set.
//
// A vector of deltas becomes the scan of its own lanes in log2(kLanes) shift-and-add steps; what lies behind it enters through one
// multiply-add with the carry, so that the serial chain is one multiply-add and one broadcast per vector, not per token.

#if SKYRL_MEGA_VECTOR_BYTES == 64
#define LANES_FROM(d) d, d + 1, d + 2, d + 3, d + 4, d + 5, d + 6, d + 7, d + 8, d + 9, d + 10, d + 11, d + 12, d + 13, d + 14, d + 15
#elif SKYRL_MEGA_VECTOR_BYTES == 32
#define LANES_FROM(d) d, d + 1, d + 2, d + 3, d + 4, d + 5, d + 6, d + 7
#else
#define LANES_FROM(d) d, d + 1, d + 2, d + 3
#endif
// Lane i of the result is lane i + d of `value`, or of `filler` beyond the last lane.
#define SHIFT(value, filler, d) __builtin_shufflevector(value, filler, LANES_FROM(d))

// One step of doubling: lanes i .. i + d - 1 are combined, then i .. i + 2d - 1.
#define DOUBLE_SPAN(scan, decay, d)                  \
  scan += decay * SHIFT(scan, (Vec){}, d);           \
  decay *= SHIFT(decay, splat(1.0f), d);

// y of each lane with 0 behind the vector; `decay` becomes the product from its lane to the vector's end.
VECTOR_INLINE Vec scan_lanes(Vec values, Vec& decay) {
  Vec scan = values;
  DOUBLE_SPAN(scan, decay, 1)
  DOUBLE_SPAN(scan, decay, 2)
#if SKYRL_MEGA_VECTOR_BYTES >= 32
  DOUBLE_SPAN(scan, decay, 4)
#endif
#if SKYRL_MEGA_VECTOR_BYTES >= 64
  DOUBLE_SPAN(scan, decay, 8)
#endif
  return scan;
}

// The same with one decay for all tokens: `power` holds decay, decay^2, decay^4, decay^8.
VECTOR_INLINE Vec scan_lanes_evenly(Vec scan, const float* power) {
  scan += power[0] * SHIFT(scan, (Vec){}, 1);
  scan += power[1] * SHIFT(scan, (Vec){}, 2);
#if SKYRL_MEGA_VECTOR_BYTES >= 32
  scan += power[2] * SHIFT(scan, (Vec){}, 4);
#endif
#if SKYRL_MEGA_VECTOR_BYTES >= 64
  scan += power[3] * SHIFT(scan, (Vec){}, 8);
#endif
  return scan;
}
#undef DOUBLE_SPAN
#undef SHIFT
#undef LANES_FROM

// One sequence of the general scan: out[0 .. length).
static void scan_sequence(const float* decay, const float* values, int64_t length, float* out) {
  float carry = 0.0f;
  int64_t end = length;
  for (; end >= kLanes; end -= kLanes) {
    Vec product = load(decay + end - kLanes);
    const Vec y = scan_lanes(load(values + end - kLanes), product) + product * carry;
    store(out + end - kLanes, y);
    carry = y[0];
  }
  for (int64_t t = end - 1; t >= 0; t--) out[t] = carry = values[t] + decay[t] * carry;
}

// What the recursion brings from the tokens behind: the advantage and the value of the next token that counts.
struct Carry {
  float advantage;
  float value;
};

// Advantages and returns of the counting tokens [begin, end), which have no masked token between them, begin < end. `extra_reward`
// is what masked tokens behind the last one earned. `values` may be null (all 0), and then `returns` too.
static Carry gae_run(const float* rewards, const float* values, int64_t begin, int64_t end, float extra_reward, Carry next, float gamma,
                     float decay, float* advantages, float* returns) {
  // The last token alone: its successor is not its neighbour in memory.
  const int64_t last = end - 1;
  const float last_value = values ? values[last] : 0.0f;
  float carry = (rewards[last] + extra_reward) + gamma * next.value - last_value + decay * next.advantage;
  advantages[last] = carry;
  if (returns) returns[last] = carry + last_value;

  const float power[4] = {decay, decay * decay, (decay * decay) * (decay * decay),
                          ((decay * decay) * (decay * decay)) * ((decay * decay) * (decay * decay))};
  float to_end[kLanes];  // decay from each lane to the vector's end
  to_end[kLanes - 1] = decay;
  for (int64_t i = kLanes - 2; i >= 0; i--) to_end[i] = to_end[i + 1] * decay;
  const Vec decay_to_end = load(to_end);

  int64_t stop = last;
  for (; stop - begin >= kLanes; stop -= kLanes) {
    const int64_t at = stop - kLanes;
    Vec delta = load(rewards + at);
    const Vec value = values ? load(values + at) : (Vec){};
    if (values) delta += gamma * load(values + at + 1) - value;
    const Vec y = scan_lanes_evenly(delta, power) + decay_to_end * carry;
    store(advantages + at, y);
    if (returns) store(returns + at, y + value);
    carry = y[0];
  }
  for (int64_t t = stop - 1; t >= begin; t--) {
    const float value = values ? values[t] : 0.0f;
    carry = (rewards[t] + (values ? gamma * values[t + 1] : 0.0f) - value) + decay * carry;
    advantages[t] = carry;
    if (returns) returns[t] = carry + value;
  }
  return {carry, values ? values[begin] : 0.0f};
}

// Where the run of equal mask bytes that ends at `end` begins, at `begin` or later. `mask` bytes are 0 or 1.
VECTOR_INLINE int64_t run_start(const uint8_t* mask, int64_t begin, int64_t end) {
  const uint8_t byte = mask[end - 1];
  const uint64_t eight = byte ? 0x0101010101010101u : 0u;
  while (end - begin >= 8) {
    uint64_t word;
    memcpy(&word, mask + end - 8, 8);
    if (word != eight) break;
    end -= 8;
  }
  while (end > begin && mask[end - 1] == byte) end--;
  return end;
}

// One sequence, tokens [begin, end) of the packed arrays. `mask` may be null (all count). False where a reward would be lost:
// it lies on a masked token with no counting token before it.
static bool gae_sequence(const float* rewards, const float* values, const uint8_t* mask, int64_t begin, int64_t end, float bootstrap,
                         float gamma, float decay, float* advantages, float* returns) {
  Carry carry = {0.0f, bootstrap};
  if (!mask) {
    if (begin < end) gae_run(rewards, values, begin, end, 0.0f, carry, gamma, decay, advantages, returns);
    return true;
  }
  float masked_reward = 0.0f;
  bool pending = false;
  while (end > begin) {
    const int64_t start = run_start(mask, begin, end);
    if (mask[end - 1]) {
      carry = gae_run(rewards, values, start, end, masked_reward, carry, gamma, decay, advantages, returns);
      masked_reward = 0.0f;
      pending = false;
    } else {
      for (int64_t t = end - 1; t >= start; t--) {
        masked_reward += rewards[t];
        pending = pending || rewards[t] != 0.0f;
      }
      memset(advantages + start, 0, (end - start) * sizeof(float));
      if (returns) memset(returns + start, 0, (end - start) * sizeof(float));
    }
    end = start;
  }
  return !pending;
}
