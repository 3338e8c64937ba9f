// dlb_fast._build: how the compiled library was built. The only file that knows Python; nothing depends on it.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

#ifndef DLB_FAST_CUDA_ARCHS
#define DLB_FAST_CUDA_ARCHS ""
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define DLB_FAST_COMPILER "GCC " __VERSION__
#else
#define DLB_FAST_COMPILER __VERSION__  // "Clang 15.0.6"
#endif

PYBIND11_MODULE(_build, m) {
  m.doc() = "Build information of dlb_fast.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = DLB_FAST_COMPILER;
        info["cxx_standard"] = static_cast<long>(__cplusplus);
        info["torch"] = DLB_FAST_TORCH_VERSION;
        info["cuda_archs"] = DLB_FAST_CUDA_ARCHS;
        info["cpu_instruction_set"] = dlb_fast::instruction_set();
        return info;
      },
      "Compiler, C++ standard, torch version of the headers, CUDA targets and the CPU instruction set picked here.");
}
