// What module.cpp asks of the emulated kernels; apart from them, so that a changed kernel does not recompile pybind11.
#pragma once
#include <cstdint>

#include "plan.h"

namespace emulated {

dlb_fast::cuda::LaunchPlan last_batch(const dlb_fast::LastBatchArgs& args, void* workspace, const dlb_fast::cuda::Device& device,
                                      uint64_t seed);
struct Scale {
  void* grad;
  dlb_fast::DType dtype;
  int64_t elements, classes;
  const float *upstream, *grad_scale;
  int64_t upstream_stride;
};
void scale_grad(const Scale& args, int blocks, uint64_t seed);
uint64_t workspace_bytes();

}  // namespace emulated
