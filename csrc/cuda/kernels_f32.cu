#include "device_args.cuh"

namespace dlb_fast {
namespace cuda {
Kernel kernel_f32(const LaunchPlan& plan) { return kernel_for<float>(plan); }
}  // namespace cuda
}  // namespace dlb_fast
