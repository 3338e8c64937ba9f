// Which instruction set the CPU kernels run with on this machine.
#include "isa.h"

namespace dlb_fast {

Isa detected_isa() {
#if defined(DLB_FAST_X86)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return Isa::avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::portable;
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
