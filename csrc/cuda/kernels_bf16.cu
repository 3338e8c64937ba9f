#include "device_args.cuh"

namespace dlb_fast {
namespace cuda {
Kernel kernel_bf16(const LaunchPlan& plan) { return kernel_for<Bf16>(plan); }
}  // namespace cuda
}  // namespace dlb_fast
