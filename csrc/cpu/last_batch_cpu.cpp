// One batch on the CPU: batch plan, choice of the instruction set, row kernels, reduction.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

#include "batch_plan.h"
#include "isa.h"

namespace dlb_fast {

// last_batch_rows.cpp, once per instruction set.
#define DLB_DECLARE_ISA(name)                                                                                   \
  namespace name {                                                                                              \
  PairKernel pair_kernel(DType dtype, DType teacher);                                                           \
  void scale_rows(void* grad, DType dtype, const double* factors, bool per_row, int64_t classes, int64_t begin, \
                  int64_t end);                                                                                 \
  }
DLB_DECLARE_ISA(portable)
#if defined(DLB_FAST_X86)
DLB_DECLARE_ISA(avx2)
DLB_DECLARE_ISA(avx512)
#endif

namespace {

double scalar(const LastBatchArgs& args, const void* pointer, double number) {
  if (!pointer) return number;
  return args.dtype == DType::f64 ? *static_cast<const double*>(pointer) : *static_cast<const float*>(pointer);
}

double element(const LastBatchArgs& args, const void* array, int64_t index) {
  return args.dtype == DType::f64 ? static_cast<const double*>(array)[index] : static_cast<const float*>(array)[index];
}

std::string label_error(const char* name, int64_t row, int64_t label, const LastBatchArgs& args) {
  return std::string(name) + "[" + std::to_string(row) + "] = " + std::to_string(label) +
         " is not a class: expected 0 <= label < " + std::to_string(args.classes) + " or ignore_index (" +
         std::to_string(args.ignore_index) + ")";
}

// Labels in range, how many rows count and with what weight.
void count_labels(const LastBatchArgs& args, BatchPlan& plan) {
  for (int64_t row = 0; row < args.batch; ++row) {
    const int64_t label = args.target[row * args.target_stride];
    bool counts = label != args.ignore_index;
    if (counts && (label < 0 || label >= args.classes)) {
      plan.error = label_error("target", row, label, args);
      return;
    }
    if (args.target_b) {
      const int64_t second = args.target_b[row * args.target_b_stride];
      const bool second_counts = second != args.ignore_index;
      if (second_counts && (second < 0 || second >= args.classes)) {
        plan.error = label_error("target_b", row, second, args);
        return;
      }
      counts = counts && second_counts;
    }
    if (!counts) continue;
    plan.counted_weight += args.weight && !args.target_b ? element(args, args.weight, label) : 1.0;
  }
}

int64_t stored_count(const LastBatchArgs& args, int64_t generation) {
  return std::clamp<int64_t>(args.slots[slots_base(generation, args.capacity)], 0, args.capacity);
}

// Whether this is the batch that was stored last: its last rows have the stored ids, and its first rows have not (those
// would be the repeated rows of the next batch) or are all it has.
bool is_stored_batch(const LastBatchArgs& args, int64_t latest) {
  const int64_t count = stored_count(args, latest);
  if (args.again >= 0 || !args.ids) return args.again == 1;
  if (count == 0 || count > args.batch || (args.num_old >= 0 && args.batch - args.num_old != count)) return false;
  const int64_t* stored = args.slots + slots_base(latest, args.capacity) + 1;
  return std::equal(stored, stored + count, args.ids + args.batch - count) &&
         (count == args.batch || !std::equal(stored, stored + count, args.ids));
}

// The generations, and how many rows are stored and face a slot.
int64_t place_in_buffer(const LastBatchArgs& args, BatchPlan& plan) {
  const int64_t latest = args.slots[slots_latest] & 1, batch = args.batch;
  const bool again = is_stored_batch(args, latest);
  plan.teaching = again ? 1 - latest : latest;
  const int64_t count = stored_count(args, latest);
  const int64_t old = args.num_old >= 0 ? std::min(args.num_old, batch)
                      : again           ? std::max<int64_t>(batch - count, 0)
                                        : std::min(count, batch);
  plan.stored = std::clamp<int64_t>(batch - old, 0, args.capacity);
  plan.split = batch - plan.stored;
  return std::min({stored_count(args, plan.teaching), old, plan.split});
}

void mark_valid_rows(const LastBatchArgs& args, const std::vector<uint8_t>* unusable, BatchPlan& plan) {
  int64_t rows = args.batch;
  if (args.rows) {
    rows = plan.facing = place_in_buffer(args, plan);
  } else if (args.kind != TeacherKind::virtual_teacher) {
    rows = plan.split = args.kind == TeacherKind::none ? args.batch : args.teacher_rows;
    if (args.kind == TeacherKind::none) rows = 0;
  } else {
    plan.split = args.batch;
  }
  plan.valid.assign(rows, 1);
  for (int64_t row = 0; row < rows; ++row) {
    bool valid = !args.kd_mask || (row < args.kd_mask_rows && args.kd_mask[row]);
    if (unusable) valid = valid && !(*unusable)[row];
    if (args.rows) {
      const int64_t of_row = slots_base(plan.teaching, args.capacity) + 1 + row, id = args.slots[of_row];
      const bool unknown = args.ids && id == unknown_id, mismatched = args.ids && !unknown && id != args.ids[row];
      const bool not_finite = !unknown && !mismatched && args.slots[of_row + args.capacity] == 0;
      const bool repeats = !unknown && !mismatched && !not_finite;
      plan.unknown += unknown, plan.mismatched += mismatched, plan.not_finite += not_finite, plan.repeating += repeats;
      valid = valid && repeats;
    }
    if (args.kind == TeacherKind::virtual_teacher && args.correct_share >= 0)
      valid = valid && args.target[row * args.target_stride] != args.ignore_index;
    plan.valid[row] = valid;
    plan.valid_rows += valid;
  }
}

}  // namespace

BatchPlan plan_batch(const LastBatchArgs& args, const std::vector<uint8_t>* unusable) {
  BatchPlan plan;
  plan.alpha = scalar(args, args.alpha_ptr, args.alpha);
  plan.temperature = scalar(args, args.temperature_ptr, args.temperature);
  plan.ce_weight = args.ce_weight + args.ce_alpha * plan.alpha;
  if (args.target) {
    count_labels(args, plan);
    if (!plan.error.empty()) return plan;
  } else if (args.dense) {
    plan.counted_weight = static_cast<double>(args.batch);
  }
  mark_valid_rows(args, unusable, plan);

  double largest_weight = 1.0;
  plan.weight_sum = static_cast<double>(args.classes);
  if (args.weight) {
    plan.weight_sum = largest_weight = 0;
    for (int64_t c = 0; c < args.classes; ++c) {
      const double w = element(args, args.weight, c);
      plan.weight_sum += w;
      largest_weight = std::max(largest_weight, std::fabs(w));
    }
  }

  const bool mean = args.reduction == Reduction::mean;
  const double ce_norm = mean ? plan.counted_weight : 1.0, kl_norm = mean ? plan.valid_rows : 1.0;
  TermScales<double>& s = plan.scales;
  s.ce = ce_norm == 0 ? 0 : plan.ce_weight / ce_norm;
  s.kl_grad = kl_norm == 0 ? 0 : plan.alpha * plan.temperature / kl_norm;
  s.kl_loss = s.kl_grad * plan.temperature;
  s.even = args.label_smoothing / static_cast<double>(args.classes);
  s.hard = 1.0 - args.label_smoothing;
  if (args.dtype == DType::f16) {
    // |p - q| <= 1 in both terms.
    const double largest_ce = std::fabs(s.ce) * largest_weight * (args.dense ? dense_target_room : 1.0);
    plan.grad_scale = float16_grad_scale(largest_ce + std::fabs(s.kl_grad));
  }
  return plan;
}

PairKernel pair_kernel(const LastBatchArgs& args) {
#if defined(DLB_FAST_X86)
  if (detected_isa() == Isa::avx512) return avx512::pair_kernel(args.dtype, args.teacher_dtype);
  if (detected_isa() == Isa::avx2) return avx2::pair_kernel(args.dtype, args.teacher_dtype);
#endif
  return portable::pair_kernel(args.dtype, args.teacher_dtype);
}

void scale_rows(void* grad, DType dtype, const double* factors, bool per_row, int64_t classes, int64_t begin,
                int64_t end) {
#if defined(DLB_FAST_X86)
  if (detected_isa() == Isa::avx512) return avx512::scale_rows(grad, dtype, factors, per_row, classes, begin, end);
  if (detected_isa() == Isa::avx2) return avx2::scale_rows(grad, dtype, factors, per_row, classes, begin, end);
#endif
  portable::scale_rows(grad, dtype, factors, per_row, classes, begin, end);
}

PairJob pair_job(const LastBatchArgs& args, const BatchPlan& plan, RowLosses& losses) {
  losses.ce.assign(args.batch, 0);
  losses.kl.assign(args.batch, 0);
  losses.correct.assign(args.batch, 0);
  losses.unusable.assign(args.batch, 0);
  losses.finite.assign(plan.stored, 0);
  const int64_t element = args.teacher_dtype == DType::f64 ? 8 : args.teacher_dtype == DType::f32 ? 4 : 2;
  const auto generation = [&](int64_t which) {
    return args.rows ? static_cast<char*>(args.rows) + which * args.rows_stride * element : nullptr;
  };
  return {&args, plan.scales, plan.split, plan.stored, static_cast<int64_t>(plan.valid.size()), plan.valid.data(),
          plan.temperature, plan.weight_sum, plan.grad_scale,
          losses.ce.data(), losses.kl.data(), losses.correct.data(), losses.unusable.data(), losses.finite.data(),
          args.rows ? generation(plan.teaching) : args.teacher, args.rows ? args.classes : args.teacher_stride,
          generation(1 - plan.teaching)};
}

void* thread_scratch(int64_t bytes) {
  struct Block {
    void* memory = nullptr;
    int64_t size = 0;
    ~Block() { std::free(memory); }
  };
  static thread_local Block block;
  if (block.size < bytes) {
    std::free(block.memory);
    block.size = (bytes + 4095) / 4096 * 4096;
    block.memory = std::aligned_alloc(64, block.size);
    if (!block.memory) throw std::bad_alloc();
  }
  return block.memory;
}

namespace {

template <typename A>
void write_outputs(const LastBatchArgs& args, const BatchPlan& plan, const RowLosses& rows) {
  const bool mean = args.reduction == Reduction::mean;
  const double tau_squared = plan.temperature * plan.temperature;
  double ce = 0, kl = 0, correct = 0;
  A* loss = static_cast<A*>(args.loss);
  for (int64_t i = 0; i < args.batch; ++i) {
    ce += rows.ce[i];
    kl += rows.kl[i];
    correct += rows.correct[i];
    if (args.reduction == Reduction::none) {
      // A weight of 0 must not turn an infinite row of the other term into NaN.
      const double row = plan.ce_weight * rows.ce[i] + (rows.kl[i] == 0 ? 0 : plan.alpha * tau_squared * rows.kl[i]);
      loss[i] = static_cast<A>(row);
    }
  }
  const auto divided = [mean](double sum, double norm) { return !mean ? sum : norm == 0 ? 0.0 : sum / norm; };
  const double ce_term = divided(ce, plan.counted_weight);
  const double lb_term = tau_squared * divided(kl, plan.valid_rows);
  double total = plan.ce_weight * ce_term;
  if (plan.valid_rows > 0) total += plan.alpha * lb_term;
  if (args.reduction != Reduction::none) loss[0] = static_cast<A>(total);
  A* parts = static_cast<A*>(args.parts);
  parts[part_loss] = static_cast<A>(total);
  parts[part_ce] = static_cast<A>(ce_term);
  parts[part_lb] = static_cast<A>(lb_term);
  parts[part_correct] = static_cast<A>(correct);
  parts[part_grad_scale] = static_cast<A>(plan.grad_scale);
  parts[part_valid] = static_cast<A>(plan.valid_rows);
}

}  // namespace

void finish_batch(const LastBatchArgs& args, const BatchPlan& plan, const RowLosses& losses) {
  if (args.dtype == DType::f64)
    write_outputs<double>(args, plan, losses);
  else
    write_outputs<float>(args, plan, losses);
  if (args.rows) {
    int64_t* slots = args.slots;
    const int64_t written = 1 - plan.teaching;
    int64_t *ids = slots + slots_base(written, args.capacity) + 1, *finite = ids + args.capacity;
    for (int64_t j = 0; j < plan.stored; ++j) {
      ids[j] = args.ids ? args.ids[plan.split + j] : unknown_id;
      finite[j] = losses.finite[j];
    }
    slots[slots_base(written, args.capacity)] = plan.stored;
    slots[slots_latest] = written;
    slots[slots_taught] += static_cast<int64_t>(plan.valid_rows);
    slots[slots_mismatched] += plan.mismatched;
    slots[slots_unknown] += plan.unknown;
    slots[slots_not_finite] += plan.not_finite;
    if (plan.facing > 0) slots[slots_untaught] = plan.repeating > 0 ? 0 : slots[slots_untaught] + 1;
  }
}

}  // namespace dlb_fast
