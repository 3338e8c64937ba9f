// The ops `dlb_fast::last_batch*`: schema and CPU dispatch, through libtorch's stable ABI (one file serves torch 2.10
// and newer, and any Python). The mathematics is in cpu/ and cuda/.
#include <algorithm>
#include <vector>

#include "cpu/batch_plan.h"
#include "data_schemas.h"
#include "last_batch_options.h"
#include "unpack.h"

namespace dlb_fast {
namespace {

// Rows below this many elements are not worth a second thread.
constexpr int64_t elements_per_thread = 16384;

int64_t grain(int64_t classes) { return elements_per_thread / classes < 1 ? 1 : elements_per_thread / classes; }

void run_pairs(const LastBatchArgs& args, const BatchPlan& plan, RowLosses& losses) {
  const PairJob job = pair_job(args, plan, losses);
  const PairKernel kernel = pair_kernel(args);
  const int64_t second = args.batch - plan.split, pairs = plan.split > second ? plan.split : second;
  torch::stable::parallel_for(0, pairs, grain(2 * args.classes),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

void run_on_cpu(const LastBatchArgs& args) {
  BatchPlan plan = plan_batch(args);
  STD_TORCH_CHECK(plan.error.empty(), plan.error.c_str());
  RowLosses losses;
  run_pairs(args, plan, losses);
  const auto unusable = std::count(losses.unusable.begin(), losses.unusable.end(), 1);
  if (unusable > 0 && args.grad == args.logits) {
    // The logits are overwritten, so the batch cannot be done once more here: its caller sees that fewer rows are valid.
    plan.valid_rows -= static_cast<double>(unusable);
  } else if (unusable > 0) {
    // Rows of the given teacher are not finite: the means divide by fewer rows.
    plan = plan_batch(args, &losses.unusable);
    run_pairs(args, plan, losses);
  }
  finish_batch(args, plan, losses);
}

Outputs run_with_teacher(const Tensor& logits, const MaybeTensor& teacher, int64_t teacher_kind, const Options& options,
                         bool need_grad) {
  LastBatchArgs args;
  Outputs outputs = unpack(logits, options, need_grad, args);
  unpack_teacher(logits, teacher, teacher_kind, args);
  run_on_cpu(args);
  return outputs;
}

// The gradient over the logits: a row kernel has read a row, or what it needs of it, before it writes the row's gradient.
LossAndParts run_in_place(Tensor& logits, const MaybeTensor& teacher, int64_t teacher_kind, const Options& options,
                          bool need_grad) {
  STD_TORCH_CHECK(logits.is_contiguous(), "last_batch: logits that take their gradient must be contiguous");
  LastBatchArgs args;
  auto [loss, parts, no_grad] = unpack(logits, options, false, args);
  unpack_teacher(logits, teacher, teacher_kind, args);
  if (need_grad) args.grad = logits.mutable_data_ptr();
  run_on_cpu(args);
  return {loss, parts};
}

Outputs run_with_buffer(const Tensor& logits, const Tensor& rows, const Tensor& slots, const MaybeTensor& ids,
                        int64_t num_old, int64_t again, const Options& options, bool need_grad) {
  LastBatchArgs args;
  Outputs outputs = unpack(logits, options, need_grad, args);
  unpack_buffer(logits, rows, slots, ids, num_old, again, args);
  run_on_cpu(args);
  return outputs;
}

void scale_grad_cpu(Tensor grad, Tensor upstream, Tensor parts) {
  const int64_t rows = grad.size(0), classes = grad.size(1), upstreams = upstream.numel();
  const bool per_row = upstream.dim() == 1;
  STD_TORCH_CHECK(!per_row || upstreams == rows, "scale_grad_: upstream must be 0-d or have one entry per row");
  STD_TORCH_CHECK(grad.is_contiguous(), "scale_grad_: grad must be contiguous");
  const bool is_double = parts.scalar_type() == ST::Double;
  STD_TORCH_CHECK(upstream.scalar_type() == parts.scalar_type(), "scale_grad_: upstream has an unexpected dtype");
  const void *up = upstream.const_data_ptr(), *of_parts = parts.const_data_ptr();
  const auto at = [is_double](const void* p, int64_t i) {
    return is_double ? static_cast<const double*>(p)[i] : static_cast<double>(static_cast<const float*>(p)[i]);
  };
  const double scale = at(of_parts, part_grad_scale);
  const int64_t stride = per_row ? upstream.stride(0) : 0;
  std::vector<double> factors(upstreams);
  bool all_one = true;
  for (int64_t i = 0; i < upstreams; ++i) {
    factors[i] = at(up, i * stride) / scale;
    all_one = all_one && factors[i] == 1.0;
  }
  if (all_one) return;
  void* data = grad.mutable_data_ptr();
  const DType dtype = dtype_of(grad, "grad");
  torch::stable::parallel_for(0, rows, grain(classes), [&](int64_t begin, int64_t end) {
    scale_rows(data, dtype, factors.data(), per_row, classes, begin, end);
  });
}

STABLE_TORCH_LIBRARY(dlb_fast, m) {
  m.def("last_batch(Tensor logits, Tensor? teacher, int teacher_kind, " DLB_OPTION_SCHEMA ", Tensor grad)");
  m.def("last_batch_(Tensor(a!) logits, Tensor? teacher, int teacher_kind, " DLB_OPTION_SCHEMA ")");
  m.def("last_batch_update(Tensor logits, Tensor(a!) rows, Tensor(b!) slots, Tensor? ids, int num_old, int again, "
        DLB_OPTION_SCHEMA ", Tensor grad)");
  m.def("scale_grad_(Tensor(a!) grad, Tensor upstream, Tensor parts) -> ()");
  m.def(DLB_CROPS_SCHEMA);  // implemented in resized_crops.cpp; a library has one such block
}

STABLE_TORCH_LIBRARY_IMPL(dlb_fast, CPU, m) {
  m.impl("last_batch", TORCH_BOX(&last_batch<run_with_teacher>));
  m.impl("last_batch_", TORCH_BOX(&last_batch_<run_in_place>));
  m.impl("last_batch_update", TORCH_BOX(&last_batch_update<run_with_buffer>));
  m.impl("scale_grad_", TORCH_BOX(&scale_grad_cpu));
}

}  // namespace
}  // namespace dlb_fast
