// Softmax statistics and gradients from given logits: one block per row for the statistics, one read of the logits; the gradients
// elementwise, in place if wanted.
//
// A thread takes 16 bytes of logits at a time (4 float32 or 8 sixteen-bit), several of them in flight. Which thread takes which
// columns, and in which order it adds, is fixed by the number of columns; where rows are not 16-byte aligned only the loads change.
// So a row's bits depend on the row alone. The running maximum starts at -inf, and sums are rescaled when it moves.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launchers.h"

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kVectorsInFlight = 2;
constexpr int kGradientVectors = 4;       // of a thread, per block of the gradient kernel
constexpr int64_t kRowNotCounted = -2;    // as a row's column: nobody will use its results
constexpr float kNoProbability = -104.5f; // exp of this and of anything below is 0 in float32

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ void narrow(float value, float& out) { out = value; }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(float value, __half& out) { out = __float2half_rn(value); }

template <class Logit>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(Logit);
  Logit lane[kSize];
};

// Logits [column, column + kSize) of a row, `filler` beyond its end.
template <bool kAligned, class Logit>
__device__ __forceinline__ Vector<Logit> load_vector(const Logit* row, int64_t column, int64_t num_columns, Logit filler) {
  Vector<Logit> out;
  if (kAligned && column + Vector<Logit>::kSize <= num_columns) {
    out = *reinterpret_cast<const Vector<Logit>*>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<Logit>::kSize; i++) out.lane[i] = column + i < num_columns ? row[column + i] : filler;
  }
  return out;
}

struct Statistics {
  float max;
  float sum;
  float shifted;
};

// Statistics relative to their own maxima, brought to the common one. `kNoProbability` for -inf: 0 * -inf would be NaN.
__device__ __forceinline__ Statistics merge(const Statistics& a, const Statistics& b) {
  const float common = fmaxf(a.max, b.max);
  const float shift = common == negative_infinity() ? 0.0f : common;
  const float down_a = a.max - shift, down_b = b.max - shift;
  const float scale_a = expf(down_a), scale_b = expf(down_b);
  const float move_a = a.max == negative_infinity() ? 0.0f : down_a, move_b = b.max == negative_infinity() ? 0.0f : down_b;
  return {common, a.sum * scale_a + b.sum * scale_b,
          (a.shifted + move_a * a.sum) * scale_a + (b.shifted + move_b * b.sum) * scale_b};
}

// NaN is kept by neither fmaxf nor the comparisons here, but by the sums: exp(NaN - max) is NaN.
template <bool kAligned, bool kEntropy, class Logit>
__global__ void __launch_bounds__(kThreads)
    statistics_rows(const Logit* __restrict__ logits, int64_t num_columns, int64_t row_stride, const int64_t* __restrict__ columns,
                    const float* __restrict__ floors, float inverse_temperature, float* __restrict__ packed) {
  constexpr int kSize = Vector<Logit>::kSize;
  const int64_t row = blockIdx.x, num_rows = gridDim.x;
  const Logit* const row_logits = logits + row * row_stride;
  const int64_t label = columns[row];
  const float floor = floors ? floors[row] : negative_infinity();
  const int64_t counted_columns = label == kRowNotCounted ? 0 : num_columns;
  Logit filler;
  narrow(negative_infinity(), filler);

  Statistics mine{negative_infinity(), 0.0f, 0.0f};
  constexpr int64_t kStep = int64_t(kThreads) * kSize;
  for (int64_t first = int64_t(threadIdx.x) * kSize; first < counted_columns; first += kStep * kVectorsInFlight) {
    float z[kVectorsInFlight * kSize];
    float highest = negative_infinity();
#pragma unroll
    for (int v = 0; v < kVectorsInFlight; v++) {
      const Vector<Logit> vector = load_vector<kAligned>(row_logits, first + v * kStep, counted_columns, filler);
#pragma unroll
      for (int i = 0; i < kSize; i++) z[v * kSize + i] = widen(vector.lane[i]) * inverse_temperature;
    }
#pragma unroll
    for (int v = 0; v < kVectorsInFlight; v++) {
#pragma unroll
      for (int i = 0; i < kSize; i++) {
        float& value = z[v * kSize + i];
        if (value < floor && first + v * kStep + i != label) value = negative_infinity();
        highest = fmaxf(highest, value);
      }
    }
    if (highest > mine.max) {
      const float moved = mine.max == negative_infinity() ? 0.0f : mine.max - highest, scale = expf(moved);
      mine.shifted = (mine.shifted + moved * mine.sum) * scale;
      mine.sum *= scale;
      mine.max = highest;
    }
    const float shift = mine.max == negative_infinity() ? 0.0f : mine.max;
    float sum = 0.0f, shifted = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectorsInFlight * kSize; i++) {
      const float below = z[i] - shift, probability = expf(below);
      sum += probability;
      if (kEntropy) shifted += (below < kNoProbability ? kNoProbability : below) * probability;
    }
    mine.sum += sum;
    mine.shifted += shifted;
  }

  // The same tree of merges whatever the row: lanes, then warps.
  __shared__ Statistics warps[kWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    mine = merge(mine, {__shfl_xor_sync(0xffffffffu, mine.max, distance), __shfl_xor_sync(0xffffffffu, mine.sum, distance),
                        __shfl_xor_sync(0xffffffffu, mine.shifted, distance)});
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  mine = threadIdx.x < kWarps ? warps[threadIdx.x] : Statistics{negative_infinity(), 0.0f, 0.0f};
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    mine = merge(mine, {__shfl_xor_sync(0xffffffffu, mine.max, distance), __shfl_xor_sync(0xffffffffu, mine.sum, distance),
                        __shfl_xor_sync(0xffffffffu, mine.shifted, distance)});
  if (threadIdx.x == 0) {
    packed[row] = mine.max;
    packed[num_rows + row] = mine.sum;
    packed[2 * num_rows + row] = kEntropy ? mine.shifted : 0.0f;
    packed[3 * num_rows + row] = label >= 0 ? widen(row_logits[label]) * inverse_temperature : 0.0f;
  }
}

// `logits` and `out` may be the same memory, so neither is __restrict__: a thread reads its vectors before it writes them.
template <bool kAligned, class Logit>
__global__ void __launch_bounds__(kThreads)
    gradient_rows(const Logit* logits, int64_t num_columns, int64_t row_stride, const int64_t* __restrict__ columns,
                  const float* __restrict__ floors, const float* __restrict__ lses, const float* __restrict__ coefficients,
                  float inverse_temperature, Logit* out, int64_t out_stride) {
  constexpr int kSize = Vector<Logit>::kSize;
  const int64_t row = blockIdx.x, num_rows = gridDim.x;
  const int64_t label = columns[row];
  if (label == kRowNotCounted) return;
  const float floor = floors ? floors[row] : negative_infinity();
  const float lse = lses[row], a = coefficients[row], b = coefficients[num_rows + row], c = coefficients[2 * num_rows + row];
  const Logit* const row_logits = logits + row * row_stride;
  Logit* const row_out = out + row * out_stride;

  constexpr int64_t kStep = int64_t(kThreads) * kSize;
  const int64_t mine = blockIdx.y * kStep * kGradientVectors + int64_t(threadIdx.x) * kSize;
  Logit zero;
  narrow(0.0f, zero);
  Vector<Logit> vectors[kGradientVectors];
#pragma unroll
  for (int v = 0; v < kGradientVectors; v++) vectors[v] = load_vector<kAligned>(row_logits, mine + v * kStep, num_columns, zero);
#pragma unroll
  for (int v = 0; v < kGradientVectors; v++) {
    const int64_t column = mine + v * kStep;
#pragma unroll
    for (int i = 0; i < kSize; i++) {
      const float z = widen(vectors[v].lane[i]) * inverse_temperature, logprob = z - lse;
      float gradient = expf(logprob) * (a + b * (logprob < kNoProbability ? kNoProbability : logprob));
      if (column + i == label)
        gradient += c;
      else if (z < floor)
        gradient = 0.0f;
      narrow(gradient * inverse_temperature, vectors[v].lane[i]);
    }
    if (kAligned && column + kSize <= num_columns) {
      *reinterpret_cast<Vector<Logit>*>(row_out + column) = vectors[v];
    } else {
#pragma unroll
      for (int i = 0; i < kSize; i++)
        if (column + i < num_columns) row_out[column + i] = vectors[v].lane[i];
    }
  }
}

template <class Logit>
bool rows_are_aligned(const void* data, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * sizeof(Logit) % 16 == 0;
}

template <class Logit>
int launch_statistics(const void* logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, const int64_t* columns,
                      const float* floor, float inverse_temperature, bool with_entropy, float* packed, cudaStream_t stream) {
  const bool aligned = rows_are_aligned<Logit>(logits, row_stride);
  const auto kernel = aligned ? (with_entropy ? statistics_rows<true, true, Logit> : statistics_rows<true, false, Logit>)
                              : (with_entropy ? statistics_rows<false, true, Logit> : statistics_rows<false, false, Logit>);
  kernel<<<static_cast<unsigned>(num_rows), kThreads, 0, stream>>>(static_cast<const Logit*>(logits), num_columns, row_stride, columns,
                                                                  floor, inverse_temperature, packed);
  return cudaGetLastError();
}

template <class Logit>
int launch_gradients(const void* logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, const int64_t* columns,
                     const float* floor, const float* lse, const float* coefficients, float inverse_temperature, void* out,
                     int64_t out_stride, cudaStream_t stream) {
  const bool aligned = rows_are_aligned<Logit>(logits, row_stride) && rows_are_aligned<Logit>(out, out_stride);
  constexpr int64_t kColumnsPerBlock = int64_t(kThreads) * Vector<Logit>::kSize * kGradientVectors;
  const dim3 grid(static_cast<unsigned>(num_rows), static_cast<unsigned>((num_columns + kColumnsPerBlock - 1) / kColumnsPerBlock));
  const auto kernel = aligned ? gradient_rows<true, Logit> : gradient_rows<false, Logit>;
  kernel<<<grid, kThreads, 0, stream>>>(static_cast<const Logit*>(logits), num_columns, row_stride, columns, floor, lse, coefficients,
                                       inverse_temperature, static_cast<Logit*>(out), out_stride);
  return cudaGetLastError();
}

}  // namespace

extern "C" int skyrl_mega_logits_statistics(const void* logits, SkyrlMegaDtype dtype, int64_t num_rows, int64_t num_columns,
                                            int64_t row_stride, const int64_t* columns, const float* floor,
                                            float inverse_temperature, bool with_entropy, float* packed, void* stream) {
  if (num_rows == 0) return cudaSuccess;
  const auto launch = dtype == SKYRL_MEGA_FLOAT32    ? launch_statistics<float>
                      : dtype == SKYRL_MEGA_BFLOAT16 ? launch_statistics<__nv_bfloat16>
                                                     : launch_statistics<__half>;
  return launch(logits, num_rows, num_columns, row_stride, columns, floor, inverse_temperature, with_entropy, packed,
                static_cast<cudaStream_t>(stream));
}

extern "C" int skyrl_mega_logits_gradients(const void* logits, SkyrlMegaDtype dtype, int64_t num_rows, int64_t num_columns,
                                           int64_t row_stride, const int64_t* columns, const float* floor, const float* lse,
                                           const float* coefficients, float inverse_temperature, void* out, int64_t out_stride,
                                           void* stream) {
  if (num_rows == 0 || num_columns == 0) return cudaSuccess;
  const auto launch = dtype == SKYRL_MEGA_FLOAT32    ? launch_gradients<float>
                      : dtype == SKYRL_MEGA_BFLOAT16 ? launch_gradients<__nv_bfloat16>
                                                     : launch_gradients<__half>;
  return launch(logits, num_rows, num_columns, row_stride, columns, floor, lse, coefficients, inverse_temperature, out, out_stride,
                static_cast<cudaStream_t>(stream));
}
