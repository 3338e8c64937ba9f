// CUDA dispatch of the ops: current stream and device guard. Compiled where nvcc is installed, and linked with the
// kernels of cuda/. It loads beside a CPU build of torch too: the one CUDA symbol it needs from libtorch is weak, and
// only a call with CUDA tensors reaches it.
#include <torch/csrc/stable/accelerator.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/last_batch_cuda.h"
#include "last_batch_options.h"
#include "unpack.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace dlb_fast {
namespace {

void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "last_batch: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "last_batch: torch gave no CUDA stream");
  return stream;
}

// An error of CUDA keeps its own name: "last_batch: ..." is a refusal, after which another implementation may be called.
void check(const char* op, const char* said) {
  if (said == nullptr) return;
  const bool refusal = std::strncmp(said, cuda_error, sizeof cuda_error - 1) != 0;
  throw std::runtime_error(refusal ? op + std::string(said) : said);
}

void launch(const Tensor& logits, const LastBatchArgs& args) {
  check("last_batch: ", last_batch_cuda(args, current_stream(logits.get_device())));
}

Outputs run_with_teacher(const Tensor& logits, const MaybeTensor& teacher, int64_t teacher_kind, const Options& options,
                         bool need_grad) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  LastBatchArgs args;
  Outputs outputs = unpack(logits, options, need_grad, args);
  unpack_teacher(logits, teacher, teacher_kind, args);
  launch(logits, args);
  return outputs;
}

Outputs run_with_buffer(const Tensor& logits, const Tensor& rows, const Tensor& slots, const MaybeTensor& ids,
                        int64_t num_old, int64_t again, const Options& options, bool need_grad) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  LastBatchArgs args;
  Outputs outputs = unpack(logits, options, need_grad, args);
  unpack_buffer(logits, rows, slots, ids, num_old, again, args);
  launch(logits, args);
  return outputs;
}

void scale_grad_cuda_op(Tensor grad, Tensor upstream, Tensor parts) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device());
  STD_TORCH_CHECK(grad.is_contiguous() && grad.dim() == 2, "scale_grad_: grad must be contiguous (B, C)");
  STD_TORCH_CHECK(upstream.scalar_type() == ST::Float && parts.scalar_type() == ST::Float,
                  "scale_grad_: upstream and parts must be float32");
  STD_TORCH_CHECK(upstream.dim() == 0 || (upstream.dim() == 1 && upstream.size(0) == grad.size(0)),
                  "scale_grad_: upstream must be 0-d or have one entry per row");
  STD_TORCH_CHECK(upstream.device() == grad.device() && parts.device() == grad.device(),
                  "scale_grad_: upstream and parts must be on the device of grad");
  ScaleGradArgs args;
  args.grad = grad.mutable_data_ptr();
  args.dtype = dtype_of(grad, "grad");
  args.batch = grad.size(0);
  args.classes = grad.size(1);
  args.upstream = static_cast<const float*>(upstream.const_data_ptr());
  args.upstream_stride = upstream.dim() == 0 ? 0 : upstream.stride(0);
  args.parts = static_cast<const float*>(parts.const_data_ptr());
  check("scale_grad_: ", scale_grad_cuda(args, current_stream(grad.get_device())));
}

STABLE_TORCH_LIBRARY_IMPL(dlb_fast, CUDA, m) {
  m.impl("last_batch", TORCH_BOX(&last_batch<run_with_teacher>));
  m.impl("last_batch_update", TORCH_BOX(&last_batch_update<run_with_buffer>));
  m.impl("scale_grad_", TORCH_BOX(&scale_grad_cuda_op));
}

}  // namespace
}  // namespace dlb_fast
