// Counting for batches of more than plan.h's self_count_rows rows: a few blocks count, the last of them adds up.
#pragma once
#include "batch.cuh"

namespace dlb_fast {
namespace cuda {

struct CountShared {
  float again[block_scratch], partial[2][block_scratch];
  bool last;
};

static DLB_KERNEL DLB_BOUNDS(256, 1) count_kernel(DLB_CONSTANT DeviceArgs a) {
  DLB_SHARED(CountShared, shared);
  let_next_launch_begin();
  const Header header = read_header(a);
  const int thread = block_index() * block_threads() + thread_index(), threads = grid_blocks() * block_threads();
  Counts n;
  count_labels(a, thread, threads, n);
  const bool again = a.again < 0 ? again_by_ids(a, header, shared.again) : a.again != 0;
  Layout s;
  lay_out(a, header, again, s);
  count_teachers(a, s, thread, threads, n);
  float v[count_fields] = {n.weight, n.valid, n.unknown, n.mismatched, n.not_finite};
  reduce_block<Sum>(v, shared.partial[0]);
  Workspace& w = *a.workspace;
  if (thread_index() == 0) {
    DLB_UNROLL for (int i = 0; i < count_fields; ++i) store(&w.count_partial[i][block_index()], v[i]);
    fence();
    shared_store(&shared.last, atomic_add(&w.count_ticket, 1u) == static_cast<uint32_t>(grid_blocks()) - 1u);
  }
  sync_block();
  if (!shared_load(&shared.last)) return;
  fence();
  // A partial per thread: one thread alone would wait for memory once for every few of them.
  const int block = thread_index();
  DLB_UNROLL for (int i = 0; i < count_fields; ++i)
    v[i] = block < grid_blocks() ? load_other_block(&w.count_partial[i][block]) : 0.0f;
  reduce_block<Sum>(v, shared.partial[1]);
  if (thread_index() != 0) return;
  store(&w.again, again ? 1 : 0);
  store(&w.counts.weight, v[0]);
  store(&w.counts.valid, v[1]);
  store(&w.counts.unknown, v[2]);
  store(&w.counts.mismatched, v[3]);
  store(&w.counts.not_finite, v[4]);
  store(&w.count_ticket, 0u);
}

}  // namespace cuda
}  // namespace dlb_fast
