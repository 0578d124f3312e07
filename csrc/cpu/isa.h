// Which instruction set the kernels of this module run with: found once per process, from the CPU and an override.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define SKYRL_MEGA_X86_VARIANTS 1
#else
#define SKYRL_MEGA_X86_VARIANTS 0  // elsewhere only the portable variant is compiled (vectors of the compiler's baseline)
#endif

namespace skyrl_mega {

// avx512 needs F, BW, DQ, VL and BF16 (Zen 4, Sapphire Rapids and later); avx2 needs FMA too (Haswell, Zen and later).
enum class Isa { portable, avx2, avx512 };

// The best variant this CPU runs, or the one SKYRL_MEGA_CPU_ISA=avx512|avx2|portable names. Raises where the name is unknown
// or the CPU lacks it. Read once, at the first call.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace skyrl_mega

// Calls FUNCTION of the active variant's namespace, e.g. SKYRL_MEGA_DISPATCH(row_statistics, (logits, columns)).
#if SKYRL_MEGA_X86_VARIANTS
#define SKYRL_MEGA_DISPATCH(FUNCTION, ARGUMENTS)                                              \
  (::skyrl_mega::active_isa() == ::skyrl_mega::Isa::avx512 ? ::skyrl_mega::avx512::FUNCTION ARGUMENTS \
   : ::skyrl_mega::active_isa() == ::skyrl_mega::Isa::avx2 ? ::skyrl_mega::avx2::FUNCTION ARGUMENTS   \
                                                           : ::skyrl_mega::portable::FUNCTION ARGUMENTS)
#else
#define SKYRL_MEGA_DISPATCH(FUNCTION, ARGUMENTS) (::skyrl_mega::portable::FUNCTION ARGUMENTS)
#endif
