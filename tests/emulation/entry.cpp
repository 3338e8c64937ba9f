#include "entry.h"

#include <stdexcept>

#include "count_kernel.cuh"
#include "device_args.cuh"
#include "emulator.h"
#include "scale_kernel.cuh"

namespace emulated {

using namespace dlb_fast;
using namespace dlb_fast::cuda;

LaunchPlan last_batch(const LastBatchArgs& args, void* workspace, const Device& device, uint64_t seed) {
  const LaunchPlan plan = plan_launch(args, device);
  const DeviceArgs on_device = device_args(args, plan, workspace);
  if (plan.count_blocks > 0) emulator::run({plan.count_blocks, 256, 1, seed}, [&] { count_kernel(on_device); });
#if defined(DLB_EMULATE_F32_ONLY)
  const Kernel kernel = args.dtype == DType::f32 ? kernel_f32(plan, args.kind) : nullptr;
#else
  const Kernel kernel = args.dtype == DType::f32    ? kernel_f32(plan, args.kind)
                        : args.dtype == DType::bf16 ? kernel_bf16(plan, args.kind)
                                                    : kernel_f16(plan, args.kind);
#endif
  if (kernel == nullptr) throw std::runtime_error("the plan names a kernel that was not built");
  emulator::run({plan.blocks, plan.threads, plan.cluster, seed}, [&] { kernel(on_device); });
  return plan;
}

void scale_grad(const Scale& s, int blocks, uint64_t seed) {
  const ScaleArgs a = {s.grad, s.elements, s.classes, s.upstream, s.grad_scale, s.upstream_stride};
  emulator::run({blocks, 256, 1, seed}, [&] {
    if (s.dtype == DType::f32) scale_kernel<float>(a);
    else if (s.dtype == DType::bf16) scale_kernel<Bf16>(a);
    else scale_kernel<F16>(a);
  });
}

uint64_t workspace_bytes() { return sizeof(Workspace); }

}  // namespace emulated
