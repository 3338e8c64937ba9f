// Host side: LastBatchArgs as the kernels take them, and the choice of the kernel's template arguments.
#pragma once
#include "plan.h"
#include "two_pass_kernel.cuh"

namespace dlb_fast {
namespace cuda {

inline DeviceArgs device_args(const LastBatchArgs& a, const LaunchPlan& plan, void* workspace) {
  DeviceArgs d;
  d.batch = static_cast<int>(a.batch), d.classes = static_cast<int>(a.classes);
  d.logits = a.logits, d.logits_stride = a.logits_stride, d.dtype = a.dtype;
  d.target = a.target, d.target_stride = a.target_stride;
  d.target_b = a.target_b, d.target_b_stride = a.target_b_stride;
  d.lam = static_cast<const float*>(a.lam), d.lam_stride = a.lam_stride;
  d.dense = static_cast<const float*>(a.dense), d.dense_stride = a.dense_stride;
  d.weight = static_cast<const float*>(a.weight);
  d.kind = a.kind, d.teacher_dtype = a.teacher_dtype;
  const bool buffer = a.rows != nullptr;
  d.capacity = static_cast<int>(a.capacity), d.slots = a.slots, d.ids = a.ids, d.num_old = a.num_old;
  d.again = a.again < 0 && a.ids == nullptr ? 0 : a.again;
  d.teacher = buffer ? a.rows : const_cast<void*>(a.teacher);
  d.generation_bytes = a.rows_stride * element_size(a.teacher_dtype);
  d.teacher_stride = buffer ? a.classes : a.teacher_stride;
  d.teacher_rows = a.kind == TeacherKind::none ? 0 : static_cast<int>(buffer ? a.capacity : a.teacher_rows);
  d.kd_mask = a.kd_mask, d.kd_mask_rows = a.kd_mask_rows;
  d.alpha_ptr = static_cast<const float*>(a.alpha_ptr),
  d.temperature_ptr = static_cast<const float*>(a.temperature_ptr);
#define DLB_NUMBER(name, initial) d.name = static_cast<float>(a.name);
#define DLB_INTEGER(name, type, initial) d.name = a.name;
  DLB_NUMBER_OPTIONS(DLB_NUMBER)
  DLB_INTEGER_OPTIONS(DLB_INTEGER)
#undef DLB_NUMBER
#undef DLB_INTEGER
  d.loss = static_cast<float*>(a.loss), d.parts = static_cast<float*>(a.parts), d.grad = a.grad;
  d.workspace = static_cast<Workspace*>(workspace);
  d.precounted = plan.count_blocks > 0;
  return d;
}

using Kernel = void (*)(DeviceArgs);

template <typename T, bool whole>
Kernel resident_kernel_of(Regime regime) {
  switch (regime) {
    case Regime::lanes: return &resident_kernel<T, 16, whole, LaneGroup<8>>;
    case Regime::warp: return &resident_kernel<T, resident_columns, whole, LaneGroup<32>>;
    case Regime::block: return &resident_kernel<T, resident_columns, whole, BlockGroup<512, 1>>;
    case Regime::cluster: return &resident_kernel<T, resident_columns, whole, ClusterGroup>;
    default: return nullptr;
  }
}

// The kernel of a plan for logits of type T.
template <typename T>
Kernel kernel_for(const LaunchPlan& plan) {
  if (plan.regime == Regime::two_pass_warp) return &two_pass_kernel<T, Teach::any, true, LaneGroup<32>>;
  if (plan.regime == Regime::two_pass_block) {
    return plan.general ? &two_pass_kernel<T, Teach::any, true, BlockGroup<256, 2>>
                        : &two_pass_kernel<T, Teach::logits, false, BlockGroup<256, 3>>;
  }
  return plan.whole ? resident_kernel_of<T, true>(plan.regime) : resident_kernel_of<T, false>(plan.regime);
}

// One per element type, each in its own file so that they compile side by side.
Kernel kernel_f32(const LaunchPlan& plan);
Kernel kernel_bf16(const LaunchPlan& plan);
Kernel kernel_f16(const LaunchPlan& plan);

}  // namespace cuda
}  // namespace dlb_fast
