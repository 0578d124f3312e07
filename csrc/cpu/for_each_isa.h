// Compiles one header of kernels once per instruction set, in namespaces skyrl_mega::{avx512, avx2, portable}, in one source:
//
//     #include <torch/library.h>                       // everything from outside first, compiled for the baseline
//     #define SKYRL_MEGA_KERNELS "segmented_scan_kernels.h"
//     #include "for_each_isa.h"
//     ... SKYRL_MEGA_DISPATCH(scan_segment, (...)) ...
//
// The header of kernels has no include guard, includes nothing but token_lanes.h, opens no namespace, and uses the types of vector.h
// (both without a guard too). Its functions are `static`; none may use inline functions or templates of the standard library or ATen (the linker
// could keep the copy compiled for AVX-512 and give it to everybody), nor lambdas (GCC compiles those for the baseline).
#include <cstdint>
#include <cstring>

#include "isa.h"

#ifndef SKYRL_MEGA_KERNELS
#error "define SKYRL_MEGA_KERNELS as the header to compile for each instruction set"
#endif

#if SKYRL_MEGA_X86_VARIANTS
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi2")
namespace skyrl_mega::avx512 {
#define SKYRL_MEGA_VECTOR_BYTES 64
#include "vector.h"
#include SKYRL_MEGA_KERNELS
#undef SKYRL_MEGA_VECTOR_BYTES
}  // namespace skyrl_mega::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
namespace skyrl_mega::avx2 {
#define SKYRL_MEGA_VECTOR_BYTES 32
#include "vector.h"
#include SKYRL_MEGA_KERNELS
#undef SKYRL_MEGA_VECTOR_BYTES
}  // namespace skyrl_mega::avx2
#pragma GCC pop_options
#endif

namespace skyrl_mega::portable {
#define SKYRL_MEGA_VECTOR_BYTES 16
#include "vector.h"
#include SKYRL_MEGA_KERNELS
#undef SKYRL_MEGA_VECTOR_BYTES
}  // namespace skyrl_mega::portable

#undef SKYRL_MEGA_KERNELS
