// Facts about the whole batch that are needed before a row's gradient is written: labels checked, rows counted.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../last_batch.h"
#include "../row_math.h"

namespace dlb_fast {

struct BatchPlan {
  int64_t split = 0;       // rows [0, split) may be valid; row split + j is stored in slot j while j < stored
  int64_t stored = 0;
  int64_t teaching = 0;    // generation of the buffer that teaches; the other one takes the stored rows
  // Of the rows that face a slot: its row has no id, is another sample's, is not finite; or the row repeats it.
  int64_t facing = 0, unknown = 0, mismatched = 0, not_finite = 0, repeating = 0;
  double valid_rows = 0, counted_weight = 0, weight_sum = 0;
  double alpha = 0, temperature = 1, ce_weight = 1, grad_scale = 1;
  TermScales<double> scales;
  std::vector<uint8_t> valid;  // per row below split: a valid teacher exists
  std::string error;            // not empty: nothing may be computed
};

// O(B) over labels, ids and masks; reads no logits and writes nothing but the plan. `unusable` (B,), if given, marks
// rows whose teacher the kernels found not to be finite.
BatchPlan plan_batch(const LastBatchArgs& args, const std::vector<uint8_t>* unusable = nullptr);

// Losses per row, without the weights of their terms, and what the kernels found out about rows.
struct RowLosses {
  std::vector<double> ce, kl;  // CE, KL without tau^2
  std::vector<uint8_t> correct;
  std::vector<uint8_t> unusable;  // the given teacher of the row is not finite
  std::vector<uint8_t> finite;    // the row stored in this slot is finite
};

// What a row kernel sees: raw pointers only. The kernels are compiled once per instruction set, and a std:: template
// instantiated there could end up serving the whole library with instructions the machine does not have.
struct PairJob {
  const LastBatchArgs* args;
  TermScales<double> scales;
  int64_t split, stored, valid_size;
  const uint8_t* valid;
  double temperature, weight_sum, grad_scale;
  double *ce, *kl;
  uint8_t *correct, *unusable, *finite;
  const void* teacher;     // row 0 of the teacher, and elements between its rows
  int64_t teacher_stride;
  void* store;             // row 0 of the generation that takes the new rows
};
PairJob pair_job(const LastBatchArgs& args, const BatchPlan& plan, RowLosses& losses);

// Computes pairs [begin, end): pair j is row j (valid by slot j) and row split + j (then stored in slot j).
using PairKernel = void (*)(const PairJob& job, int64_t begin, int64_t end);
PairKernel pair_kernel(const LastBatchArgs& args);

// Memory of the calling thread, at least `bytes` large, kept for its next call.
void* thread_scratch(int64_t bytes);

// After the pairs: scalar reduction in row order (the same sum whatever the threads did), the ids and counters of the
// buffer.
void finish_batch(const LastBatchArgs& args, const BatchPlan& plan, const RowLosses& losses);

// grad rows *= upstream / grad_scale, in place; nothing is touched where the factor is 1.
void scale_rows(void* grad, DType dtype, const double* factors, bool per_row, int64_t classes, int64_t begin,
                int64_t end);

}  // namespace dlb_fast
