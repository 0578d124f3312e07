// Finds the instruction set of this process; see isa.h.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace skyrl_mega {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::portable: return "portable";
  }
  return "unknown";
}

static Isa best_isa() {
#if SKYRL_MEGA_X86_VARIANTS
  __builtin_cpu_init();  // the answers below include whether the operating system saves the wide registers
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("bmi2"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return Isa::avx2;
#endif
  return Isa::portable;
}

static Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("SKYRL_MEGA_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    if (std::string(wanted) != isa_name(isa)) continue;
    if (isa > best)
      throw std::runtime_error(std::string("SKYRL_MEGA_CPU_ISA is ") + wanted + ", but this CPU runs at most " + isa_name(best) +
                               ": unset the variable.");
    return isa;
  }
  throw std::runtime_error(std::string("SKYRL_MEGA_CPU_ISA is \"") + wanted + "\"; it must be avx512, avx2 or portable.");
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace skyrl_mega
