#include "device_args.cuh"

namespace dlb_fast {
namespace cuda {
Kernel kernel_f16(const LaunchPlan& plan) { return kernel_for<F16>(plan); }
}  // namespace cuda
}  // namespace dlb_fast
