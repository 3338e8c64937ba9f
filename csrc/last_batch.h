// The arguments of the last_batch op as plain pointers: what csrc/last_batch.cpp hands to a device's kernels.
// No torch header here; cpu/ and cuda/ see nothing else.
#pragma once
#include <cstdint>

#include "../dlb_fast/options.h"
#include "row_math.h"

namespace dlb_fast {

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class TeacherKind : int32_t { none = 0, logits = 1, probabilities = 2, virtual_teacher = 3, top_k = 4 };
enum class Reduction : int32_t { mean = 0, sum = 1, none = 2 };

// Entries of the op's `parts` output, as in dlb_fast/ops.py PARTS.
enum Part : int32_t { part_loss, part_ce, part_lb, part_correct, part_grad_scale, part_valid, part_count };

// The buffer's `slots`, as in dlb_fast/buffer.py: a header, then generation 0, then generation 1. A generation is
// [count, an id per slot, per slot whether the row is finite].
constexpr int64_t slots_latest = 0, slots_taught = 1, slots_mismatched = 2, slots_unknown = 3, slots_not_finite = 4,
                  slots_untaught = 5, slots_header = 6;
DLB_HD int64_t slots_base(int64_t generation, int64_t capacity) {
  return slots_header + generation * (1 + 2 * capacity);
}
constexpr int64_t unknown_id = INT64_MIN;

// Compute dtype A: double for f64 logits, float for all others. Pointers marked (A) hold that dtype.
struct LastBatchArgs {
  int64_t batch = 0, classes = 0;
  DType dtype = DType::f32;              // of logits and grad
  const void* logits = nullptr;          // (B, C), unit column stride
  int64_t logits_stride = 0;             // elements between rows
  // Cross entropy: labels, or a dense target, or neither (no CE term).
  const int64_t* target = nullptr;       // (B,)
  int64_t target_stride = 0;
  const int64_t* target_b = nullptr;     // (B,) second label of the mixup pair form
  int64_t target_b_stride = 0;
  const void* lam = nullptr;             // (A) share of `target` in the pair form
  int64_t lam_stride = 0;                // 0: one share for all rows
  const void* dense = nullptr;           // (A) (B, C)
  int64_t dense_stride = 0;
  const void* weight = nullptr;          // (A) (C,) class weights
  // Teacher: rows given, or one generation of the buffer; the new rows of the batch are written into the other one.
  TeacherKind kind = TeacherKind::none;
  DType teacher_dtype = DType::f32;      // of teacher or rows
  const void* teacher = nullptr;         // (H, C); of top_k (A) (H, 2 k + 1): k logits, k classes, log-sum-exp
  int64_t teacher_stride = 0, teacher_rows = 0;
  int64_t kept = 0;                      // k
  void* rows = nullptr;                  // (2, R, C) contiguous, R >= S
  int64_t rows_stride = 0;               // R * C: elements between the generations
  int64_t capacity = 0;                  // S
  int64_t* slots = nullptr;              // (slots_base(2, S),) contiguous
  const int64_t* ids = nullptr;          // (B,) contiguous
  int64_t num_old = -1;                  // repeated rows of this batch; -1: by the count in slots
  int again = 0;                         // 1: the batch of the last call once more; 0: a new one; -1: by the ids
  const bool* kd_mask = nullptr;         // one per row with a teacher
  int64_t kd_mask_rows = 0;              // rows from here on have no valid teacher
  // Weights of the terms: (ce_weight + ce_alpha * alpha) CE + alpha tau^2 KL.
  const void* alpha_ptr = nullptr;       // (A) 0-d, overrides alpha
  const void* temperature_ptr = nullptr; // (A) 0-d, overrides temperature
#define DLB_NUMBER(name, initial) double name = initial;
#define DLB_INTEGER(name, type, initial) type name = initial;
  DLB_NUMBER_OPTIONS(DLB_NUMBER)
  DLB_INTEGER_OPTIONS(DLB_INTEGER)
#undef DLB_NUMBER
#undef DLB_INTEGER
  // Outputs.
  void* loss = nullptr;                  // (A) 0-d, or (B,) for Reduction::none
  void* parts = nullptr;                 // (A) (part_count,)
  void* grad = nullptr;                  // (B, C) contiguous in `dtype`, or null: no gradient wanted
};

}  // namespace dlb_fast
