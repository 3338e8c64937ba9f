// The functions that csrc/last_batch.cpp calls for CUDA tensors. No torch and no CUDA header: streams are void*.
//
// Every function enqueues on `stream` of the current device and can be captured in a CUDA graph. They return nullptr,
// or a text saying what was refused (nothing has been written then). A text that begins with `cuda_error` is no refusal
// but an error of CUDA.
#pragma once
#include <cstdint>

#include "../last_batch.h"

namespace dlb_fast {

// What libdlb_fast_kernels.so shows to others.
#define DLB_API __attribute__((visibility("default")))

constexpr char cuda_error[] = "CUDA error: ";

// Loss, parts, gradient (when args.grad is given) and buffer update. float32, bfloat16 and float16 logits; float64 is
// refused. Compute dtype (A) is float. Labels outside [0, C) give a NaN row, not an error: the host cannot see them.
// The first call on a device, and then the first one of every 31st stream or capture (workspaces.h), allocates 2 MiB
// and waits until they are zeroed, also while capturing; no other call allocates or waits.
// `most_blocks`: a grid of no more, each block then takes several pairs; the prover asks for it.
DLB_API const char* last_batch_cuda(const LastBatchArgs& args, void* stream, int64_t most_blocks = 1 << 20);

// grad[i, :] *= upstream[i] / parts[part_grad_scale], rounded once; leaves grad untouched, after one load per block,
// when every factor is 1. The decision is taken on the device.
struct ScaleGradArgs {
  void* grad = nullptr;  // (B, C) contiguous in `dtype`
  DType dtype = DType::f32;
  int64_t batch = 0, classes = 0;
  const float* upstream = nullptr;  // 0-d, or (B,) for Reduction::none
  int64_t upstream_stride = 0;      // 0: one factor for all rows
  const float* parts = nullptr;     // (part_count,)
};
DLB_API const char* scale_grad_cuda(const ScaleGradArgs& args, void* stream);

// The compute capabilities that the kernels are compiled for and the version of CUDA's runtime: "80,90+ptx 13000".
extern "C" DLB_API const char* dlb_fast_cuda_build();

}  // namespace dlb_fast
