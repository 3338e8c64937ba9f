// The launcher's two functions over the emulated kernels, for csrc/cuda/prove.cpp. DLB_EMULATE_FAULT plants a fault in
// what the kernels leave behind: "gradient" or "rows" (one bit), "nan", "count", "outside", or "crash", "hang".
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../cpu/batch_plan.h"
#include "count_kernel.cuh"
#include "device_args.cuh"
#include "emulator.h"
#include "last_batch_cuda.h"
#include "scale_kernel.cuh"

namespace dlb_fast {
namespace {

size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

void plant(const LastBatchArgs& a) {
  const char* const wished = std::getenv("DLB_EMULATE_FAULT");
  const std::string fault = wished ? wished : "";
  char* const rows = static_cast<char*>(a.rows);
  char* const grad = static_cast<char*>(a.grad);
  const size_t size = size_of(a.dtype), row = a.classes * size;
  if (fault == "gradient" && grad) grad[a.batch * row - 1] ^= 1;
  if (fault == "rows" && rows && a.batch > a.capacity) rows[a.classes * size_of(a.teacher_dtype) - 1] ^= 1;
  if (fault == "nan" && grad) std::memset(grad + a.batch / 2 * row, 0xff, size);
  if (fault == "count" && a.slots) a.slots[slots_base(a.slots[slots_latest] & 1, a.capacity)] += 1;
  if (fault == "outside" && grad) grad[a.batch * row + 5] = 0;
  if (fault == "crash") std::abort();
  if (fault == "hang") sleep(600);
}

}  // namespace

const char* last_batch_cuda(const LastBatchArgs& a, void*, int64_t most_blocks) {
  if (const char* reason = cuda::refusal(a)) return reason;
  static std::vector<char> workspace(sizeof(cuda::Workspace), 0);
  cuda::LaunchPlan plan = cuda::plan_launch(a, {4, true, 8});
  cuda::fit_grid(plan, std::min<int64_t>(most_blocks, 4 * (512 / plan.threads)));
  const cuda::DeviceArgs d = cuda::device_args(a, plan, workspace.data());
  const cuda::Kernel kernel = a.dtype == DType::f32    ? cuda::kernel_f32(plan)
                              : a.dtype == DType::bf16 ? cuda::kernel_bf16(plan)
                                                       : cuda::kernel_f16(plan);
  const auto known = [](const void* p, size_t bytes, bool writable, const char* name) {
    if (p) emulator::add_memory(p, bytes, writable, name);
  };
  emulator::clear_memory();
  known(workspace.data(), workspace.size(), true, "workspace");
  known(a.logits, ((a.batch - 1) * a.logits_stride + a.classes) * size_of(a.dtype), false, "logits");
  known(a.target, 8 * a.batch, false, "target"), known(a.target_b, 8 * a.batch, false, "target_b");
  known(a.lam, 4 * a.batch, false, "lam"), known(a.dense, 4 * a.batch * a.classes, false, "dense");
  known(a.kd_mask, a.kd_mask_rows, false, "kd_mask"), known(a.alpha_ptr, 4, false, "alpha");
  known(a.temperature_ptr, 4, false, "temperature");
  known(a.weight, 4 * a.classes, false, "weight"), known(a.ids, 8 * a.batch, false, "ids");
  known(a.teacher, a.teacher_rows * a.classes * size_of(a.teacher_dtype), false, "teacher");
  known(a.loss, 4 * (a.reduction == Reduction::none ? a.batch : 1), true, "loss");
  known(a.parts, 4 * part_count, true, "parts");
  known(a.grad, a.batch * a.classes * size_of(a.dtype), true, "grad");
  if (a.rows) {
    const int64_t taught = plan_batch(a).teaching;
    const int64_t bytes = a.rows_stride * static_cast<int64_t>(size_of(a.teacher_dtype));
    known(a.slots, 8 * slots_header, true, "header");
    for (int64_t g = 0; g < 2; ++g) {
      known(static_cast<char*>(a.rows) + g * bytes, bytes, g != taught, "rows of a generation");
      known(a.slots + slots_base(g, a.capacity), 8 * (1 + 2 * a.capacity), g != taught, "slots of a generation");
    }
  }
  static std::string said;
  try {
    if (plan.count_blocks > 0) emulator::run({plan.count_blocks, 256, 1, 1}, [&] { cuda::count_kernel(d); });
    emulator::run({plan.blocks, plan.threads, plan.cluster, 1}, [&] { kernel(d); });
  } catch (const std::exception& fault) {
    return said = fault.what(), said.c_str();
  }
  plant(a);
  return nullptr;
}

const char* scale_grad_cuda(const ScaleGradArgs& a, void*) {
  emulator::clear_memory();
  emulator::add_memory(a.grad, a.batch * a.classes * size_of(a.dtype), true, "grad");
  emulator::add_memory(a.upstream, 4 * (a.upstream_stride ? a.batch : 1), false, "upstream");
  emulator::add_memory(a.parts, 4 * part_count, false, "parts");
  const cuda::ScaleArgs s = {a.grad, a.batch * a.classes, a.classes, a.upstream, a.parts + part_grad_scale,
                             a.upstream_stride};
  emulator::run({3, 256, 1, 1}, [&] {
    if (a.dtype == DType::f32) cuda::scale_kernel<float>(s);
    else if (a.dtype == DType::bf16) cuda::scale_kernel<cuda::Bf16>(s);
    else cuda::scale_kernel<cuda::F16>(s);
  });
  return nullptr;
}

}  // namespace dlb_fast
