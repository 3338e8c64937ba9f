// Which instruction set the CPU kernels run with on this machine.
#include "isa.h"

#include <cstdlib>
#include <string>

namespace dlb_fast {

// DLB_FAST_CPU_ISA=portable|avx2 takes a smaller one than the machine has: to test it, or to compare machines.
Isa detected_isa() {
#if defined(DLB_FAST_X86)
  static const Isa isa = [] {
    __builtin_cpu_init();
    const char* given = std::getenv("DLB_FAST_CPU_ISA");
    const std::string wished = given ? given : "";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (wished == "portable" || !avx2) return Isa::portable;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 && wished != "avx2" ? Isa::avx512 : Isa::avx2;
  }();
  return isa;
#else
  return Isa::portable;
#endif
}

const char* instruction_set() {
  switch (detected_isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace dlb_fast
