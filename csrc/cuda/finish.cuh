// The end of a launch: each block leaves a partial, and the block that comes last adds them up in block order, writes
// loss and parts, brings the buffer's header up to date and puts the ticket back. The sum depends on the launch shape
// only, never on which block was last. No float atomics.
#pragma once
#include "row.cuh"

namespace dlb_fast {
namespace cuda {

constexpr int total_fields = 3;

struct FinishShared {
  float partial[2][block_scratch];
  bool last;
};

DLB_DEVICE void write_outputs(const DeviceArgs& a, const BatchState& s, const float (&sum)[total_fields]) {
  const bool mean = a.reduction == Reduction::mean;
  const float ce = mean ? over(sum[0], s.counts.weight) : sum[0];
  const float lb = s.temperature * s.temperature * (mean ? over(sum[1], s.counts.valid) : sum[1]);
  float total = s.ce_weight * ce;
  if (s.counts.valid > 0.0f) total += s.alpha * lb;
  if (a.reduction != Reduction::none) store(a.loss, total);
  store(a.parts + part_loss, total);
  store(a.parts + part_ce, ce);
  store(a.parts + part_lb, lb);
  store(a.parts + part_correct, sum[2]);
  store(a.parts + part_grad_scale, s.grad_scale);
  store(a.parts + part_valid, s.counts.valid);
}

// By one thread of the last block: every block has read the header and the counts by now.
DLB_DEVICE void write_header(const DeviceArgs& a, const BatchState& s) {
  const Counts& n = s.counts;
  const auto add = [&](int64_t field, float rows) {
    store(a.slots + field, load(a.slots + field) + static_cast<int64_t>(rows));
  };
  add(slots_taught, n.valid);
  add(slots_unknown, n.unknown);
  add(slots_mismatched, n.mismatched);
  add(slots_not_finite, n.not_finite);
  if (s.teacher_limit > 0) {
    const bool repeats = n.unknown + n.mismatched + n.not_finite < static_cast<float>(s.teacher_limit);
    store(a.slots + slots_untaught, repeats ? int64_t(0) : load(a.slots + slots_untaught) + 1);
  }
  store(slots_of(a, s.written), static_cast<int64_t>(s.stored));
  store(a.slots + slots_latest, static_cast<int64_t>(s.written));
}

// `totals` is read by leaders only.
DLB_DEVICE void finish_launch(const DeviceArgs& a, const BatchState& s, const Totals& totals, bool leader,
                              FinishShared& shared) {
  float sum[total_fields] = {0, 0, 0};
  if (leader) sum[0] = totals.ce, sum[1] = totals.kl, sum[2] = totals.correct;
  reduce_block<Sum>(sum, shared.partial[0]);
  Workspace& w = *a.workspace;
  if (thread_index() == 0) {
    DLB_UNROLL for (int i = 0; i < total_fields; ++i) store(&w.partial[i][block_index()], sum[i]);
    fence();
    const bool last = atomic_add(&w.ticket, 1u) == static_cast<uint32_t>(grid_blocks()) - 1u;
    shared_store(&shared.last, last);
  }
  sync_block();
  if (!shared_load(&shared.last)) return;
  fence();
  DLB_UNROLL for (int i = 0; i < total_fields; ++i) sum[i] = 0.0f;
  // The fields inside: their loads are then on the way together.
  for (int block = thread_index(); block < grid_blocks(); block += block_threads()) {
    DLB_UNROLL for (int i = 0; i < total_fields; ++i) sum[i] += load_other_block(&w.partial[i][block]);
  }
  reduce_block<Sum>(sum, shared.partial[1]);
  if (thread_index() == 0) {
    write_outputs(a, s, sum);
    if (a.slots != nullptr) write_header(a, s);
    store(&w.ticket, 0u);
  }
}

}  // namespace cuda
}  // namespace dlb_fast
