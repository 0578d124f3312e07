// The C interface between the kernels (.cu, compiled by nvcc without torch) and their binding (binding.cpp, without CUDA headers).
// Pointers are device pointers; every launcher returns a cudaError_t as int, 0 for success, and does not wait for the kernel.
#pragma once
#include <cstdint>

extern "C" {

// y[t] = values[t] + decay[t] * y[t + 1] inside each sequence. borders int64 [num_sequences + 1].
int skyrl_mega_segmented_scan(const float* decay, const float* values, const int64_t* borders, int64_t num_sequences, float* out,
                              void* stream);

// Generalised advantage estimation; values, mask (bytes 0 or 1), bootstrap and returns may be null. *lost_sequence, int64, must be
// -1 before; it becomes a sequence in which a reward on a masked token has no counting token before it.
int skyrl_mega_segmented_gae(const float* rewards, const float* values, const int64_t* borders, const uint8_t* mask,
                             const float* bootstrap, float gamma, float lam, int64_t num_sequences, float* advantages,
                             float* returns, int64_t* lost_sequence, void* stream);

enum SkyrlMegaDtype { SKYRL_MEGA_FLOAT32 = 0, SKYRL_MEGA_BFLOAT16 = 1, SKYRL_MEGA_FLOAT16 = 2 };

// packed float32 [4, num_rows]: max, sum exp(z - max), sum (z - max) exp(z - max), z[label]. Strides in elements; floor may be null.
int skyrl_mega_logits_statistics(const void* logits, SkyrlMegaDtype dtype, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                                 const int64_t* columns, const float* floor, float inverse_temperature, bool with_entropy,
                                 float* packed, void* stream);

// Gradient of the raw logits for coefficients float32 [3, num_rows]; out may be logits.
int skyrl_mega_logits_gradients(const void* logits, SkyrlMegaDtype dtype, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                                const int64_t* columns, const float* floor, const float* lse, const float* coefficients,
                                float inverse_temperature, void* out, int64_t out_stride, void* stream);
}
