#include "device_args.cuh"

namespace dlb_fast {
namespace cuda {
Kernel kernel_f32(const LaunchPlan& plan, TeacherKind kind) { return kernel_for<float>(plan, kind); }
}  // namespace cuda
}  // namespace dlb_fast
