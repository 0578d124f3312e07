// Segmented reverse scan and generalised advantage estimation: one thread block per sequence, kTile tokens at a time from the end.
//
// Both are scans of a composition. A token maps the state behind it to the state at it; the map of a span of tokens is composed from
// the maps of its halves, and composition is associative, so that a block scans a tile in a logarithmic number of steps and applies
// the result to the state that the tile before left. No atomics; a sequence's bits do not depend on the other sequences.
#include <cub/block/block_scan.cuh>

#include "launchers.h"

namespace {

constexpr int kThreads = 256;
constexpr int kTokensPerThread = 4;
constexpr int kTile = kThreads * kTokensPerThread;
constexpr int kBlocksPerMultiprocessor = 2;  // registers may be up to 128 each; without this bound ptxas spills for sm_90a
constexpr int64_t kMostBlocks = 65535;  // a block takes several sequences where there are more

// y -> value + decay * y.
struct Affine {
  float decay;
  float value;
};

struct ComposeAffine {
  // `behind` is applied first: cub passes the maps of tokens nearer to the sequence's end on the left.
  __device__ Affine operator()(const Affine& behind, const Affine& ahead) const {
    return {ahead.decay * behind.decay, ahead.value + ahead.decay * behind.value};
  }
};

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    scan_sequences(const float* __restrict__ decay, const float* __restrict__ values, const int64_t* __restrict__ borders,
                   int64_t num_sequences, float* __restrict__ out) {
  using BlockScan = cub::BlockScan<Affine, kThreads>;
  __shared__ typename BlockScan::TempStorage storage;
  __shared__ float tile_carry;
  for (int64_t sequence = blockIdx.x; sequence < num_sequences; sequence += gridDim.x) {
    const int64_t begin = borders[sequence], end = borders[sequence + 1];
    float carry = 0.0f;
    for (int64_t done = 0; done < end - begin; done += kTile) {
      const int64_t nearest = end - 1 - done - int64_t(threadIdx.x) * kTokensPerThread;  // this thread's token nearest to the end
      Affine map[kTokensPerThread];
#pragma unroll
      for (int i = 0; i < kTokensPerThread; i++) {
        const int64_t t = nearest - i;
        map[i] = t >= begin ? Affine{decay[t], values[t]} : Affine{1.0f, 0.0f};
      }
      BlockScan(storage).InclusiveScan(map, map, ComposeAffine());
      float y = carry;
#pragma unroll
      for (int i = 0; i < kTokensPerThread; i++) {
        y = map[i].value + map[i].decay * carry;
        if (nearest - i >= begin) out[nearest - i] = y;
      }
      if (threadIdx.x == kThreads - 1) tile_carry = y;
      __syncthreads();  // also before the next tile reuses `storage`
      carry = tile_carry;
      __syncthreads();
    }
  }
}

// What the recursion needs from behind a token: the advantage and value of the next counting token, and what masked tokens in between
// earned.
struct Behind {
  float advantage;
  float value;
  float pending;
  bool is_pending;  // a masked token in between has a reward that is not 0
};

// The map of a span of tokens. With c > 0 counting tokens, x = pending + gamma value + gamma lam advantage of what lies behind, and
// w = (gamma lam)^(c - 1):  advantage -> base + w x,  value -> value,  pending -> pending. With none: pending -> pending + its own.
struct Span {
  bool counts;
  bool is_pending;
  float weight;
  float base;
  float value;
  float pending;
};

struct ComposeSpans {
  float gamma;
  float decay;  // gamma lam

  __device__ Span operator()(const Span& behind, const Span& ahead) const {
    if (!ahead.counts) {
      Span both = behind;
      both.pending += ahead.pending;
      both.is_pending |= ahead.is_pending;
      return both;
    }
    Span both = ahead;
    if (!behind.counts) {
      both.base += ahead.weight * behind.pending;
    } else {
      both.base += ahead.weight * (behind.pending + gamma * behind.value + decay * behind.base);
      both.weight = ahead.weight * decay * behind.weight;
    }
    return both;
  }

  __device__ Behind apply(const Span& span, const Behind& behind) const {
    if (!span.counts) return {behind.advantage, behind.value, behind.pending + span.pending, behind.is_pending || span.is_pending};
    const float from_behind = behind.pending + gamma * behind.value + decay * behind.advantage;
    return {span.base + span.weight * from_behind, span.value, span.pending, span.is_pending};
  }
};

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gae_sequences(const float* __restrict__ rewards, const float* __restrict__ values, const int64_t* __restrict__ borders,
                  const uint8_t* __restrict__ mask, const float* __restrict__ bootstrap, float gamma, float decay,
                  int64_t num_sequences, float* __restrict__ advantages, float* __restrict__ returns, int64_t* lost_sequence) {
  using BlockScan = cub::BlockScan<Span, kThreads>;
  __shared__ typename BlockScan::TempStorage storage;
  __shared__ Behind tile_carry;
  const ComposeSpans compose{gamma, decay};
  for (int64_t sequence = blockIdx.x; sequence < num_sequences; sequence += gridDim.x) {
    const int64_t begin = borders[sequence], end = borders[sequence + 1];
    Behind carry{0.0f, bootstrap ? bootstrap[sequence] : 0.0f, 0.0f, false};
    for (int64_t done = 0; done < end - begin; done += kTile) {
      const int64_t nearest = end - 1 - done - int64_t(threadIdx.x) * kTokensPerThread;
      Span map[kTokensPerThread];
#pragma unroll
      for (int i = 0; i < kTokensPerThread; i++) {
        const int64_t t = nearest - i;
        map[i] = {false, false, 1.0f, 0.0f, 0.0f, 0.0f};
        if (t < begin) continue;
        const float reward = rewards[t];
        if (mask == nullptr || mask[t]) {
          map[i].counts = true;
          map[i].value = values ? values[t] : 0.0f;
          map[i].base = reward - map[i].value;
        } else {
          map[i].pending = reward;
          map[i].is_pending = reward != 0.0f;
        }
      }
      bool counts[kTokensPerThread];
      float value[kTokensPerThread];
#pragma unroll
      for (int i = 0; i < kTokensPerThread; i++) {
        counts[i] = map[i].counts;
        value[i] = map[i].value;
      }
      BlockScan(storage).InclusiveScan(map, map, compose);
      Behind at = carry;
#pragma unroll
      for (int i = 0; i < kTokensPerThread; i++) {
        at = compose.apply(map[i], carry);
        if (nearest - i >= begin) {
          advantages[nearest - i] = counts[i] ? at.advantage : 0.0f;
          if (returns) returns[nearest - i] = counts[i] ? at.advantage + value[i] : 0.0f;
        }
      }
      if (threadIdx.x == kThreads - 1) tile_carry = at;
      __syncthreads();
      carry = tile_carry;
      __syncthreads();
    }
    if (threadIdx.x == 0 && carry.is_pending) *lost_sequence = sequence;  // any of them will do
  }
}

unsigned blocks_for(int64_t num_sequences) { return static_cast<unsigned>(num_sequences < kMostBlocks ? num_sequences : kMostBlocks); }

}  // namespace

extern "C" int skyrl_mega_segmented_scan(const float* decay, const float* values, const int64_t* borders, int64_t num_sequences,
                                         float* out, void* stream) {
  if (num_sequences == 0) return cudaSuccess;
  scan_sequences<<<blocks_for(num_sequences), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(decay, values, borders, num_sequences,
                                                                                               out);
  return cudaGetLastError();
}

extern "C" int skyrl_mega_segmented_gae(const float* rewards, const float* values, const int64_t* borders, const uint8_t* mask,
                                        const float* bootstrap, float gamma, float lam, int64_t num_sequences, float* advantages,
                                        float* returns, int64_t* lost_sequence, void* stream) {
  if (num_sequences == 0) return cudaSuccess;
  gae_sequences<<<blocks_for(num_sequences), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      rewards, values, borders, mask, bootstrap, gamma, gamma * lam, num_sequences, advantages, returns, lost_sequence);
  return cudaGetLastError();
}
