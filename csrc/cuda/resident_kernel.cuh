// Register-resident rows: every logit and teacher logit is read from memory once, every gradient element written once.
//
// A group of threads (a few lanes, a warp, a block, a cluster) owns row j and row start + j; each thread holds E
// columns of the row in registers: as exp(x), or, where there is a teacher, as x and the teacher's exp(y / tau).
// Keeping exp(x) and exp(x / tau) as well would save 2 ex2 per logit with a teacher and costs 32 registers more, which
// spill. Options that read another array per class (dense targets, smoothing with class weights, given probabilities),
// two labels per row and virtual teachers take two passes.
//
// Predicted traffic per logit of the batch, gradient and buffer included: 12 bytes float32, 6 bytes bfloat16 and
// float16; 5 ex2 per logit with a teacher, 1 per other one (benchmarks/sass_budget.py counts what else). The next pair
// is asked for while one is worked on. Registers: 64 for a row pair's values at E = 32, at most 128 in all. One launch.
// Not yet run on a GPU.
#pragma once
#include "finish.cuh"

namespace dlb_fast {
namespace cuda {

template <typename Group>
struct ResidentShared {
  typename Group::Shared group;
  StateShared state;
  FinishShared finish;
  Totals totals[max_groups];
};

// The columns one thread of a group holds: packets rank, rank + size, ... Whole packets move as 16 bytes; of the two
// that may stick out of the row, the first can only be a thread's packet 0 and the last is its packet `tail()`. They go
// element by element, once per row and array, so that the code for it exists once and not per packet. Every array of a
// resident kernel is shifted alike (plan_launch sees to it), except the slot a row is stored in.
template <typename T, int E>
struct ResidentColumns {
  static constexpr int V = packet_columns<T>, packets = E / V;
  int first, step;  // column at which the thread's packet 0 begins (may be negative), and columns between packets
  int classes;
  DLB_DEVICE ResidentColumns(int rank, int size, int shift, int c)
      : first(rank * V - shift), step(size * V), classes(c) {}
  // The thread's packet that begins inside the row and ends outside, or -1. (A row within one packet counts as the
  // first.)
  DLB_DEVICE int tail() const {
    const int before = classes - 1 - first, p = before / step;
    return before >= 0 && column(p) >= 0 && column(p) + V > classes ? p : -1;
  }
  DLB_DEVICE int column(int p) const { return first + p * step; }
  DLB_DEVICE bool head() const { return first < 0; }
  DLB_DEVICE bool whole(int p) const { return column(p) >= 0 && column(p) + V <= classes; }
};

// `once`: as in load_packet. Columns outside: -inf.
template <typename T, typename X, int E>
DLB_DEVICE void load_resident(const ResidentColumns<T, E>& columns, const X* row, float* out, bool once) {
  constexpr int V = ResidentColumns<T, E>::V;
  constexpr int packets = ResidentColumns<T, E>::packets;
  if constexpr (V * sizeof(X) == 16) {
    Packet raw[packets];
    if (once) {
      DLB_UNROLL for (int p = 0; p < packets; ++p)
        raw[p] = load_packet_if(columns.whole(p), row + columns.column(p), true, lowest_word<X>());
    } else {
      DLB_UNROLL for (int p = 0; p < packets; ++p)
        raw[p] = load_packet_if(columns.whole(p), row + columns.column(p), false, lowest_word<X>());
    }
    DLB_UNROLL for (int p = 0; p < packets; ++p) unpack_packet<X, V>(raw[p], out + p * V);
  } else {
    DLB_UNROLL for (int e = 0; e < E; ++e) out[e] = -infinity();
    DLB_UNROLL for (int p = 0; p < packets; ++p) {
      if (columns.whole(p)) load_aligned<X, V>(row + columns.column(p), out + p * V, once);
    }
  }
  if (columns.head()) load_edge<X, V>(row, columns.first, columns.classes, out);
  const int tail = columns.tail();
  if (tail >= 0) {
    float edge[V];
    load_edge<X, V>(row, columns.column(tail), columns.classes, edge);
    DLB_UNROLL for (int p = 0; p < ResidentColumns<T, E>::packets; ++p) {
      // A select per element: a branch would be turned into an indexed store, and `out` into local memory.
      DLB_UNROLL for (int e = 0; e < V; ++e) out[p * V + e] = p == tail ? edge[e] : out[p * V + e];
    }
  }
}

// Stores what `value(p, out)` puts into out[V] for each packet p.
template <typename T, typename X, int E, typename Value>
DLB_DEVICE void store_resident(const ResidentColumns<T, E>& columns, X* row, Value value) {
  constexpr int V = ResidentColumns<T, E>::V;
  uint32_t edge[V * sizeof(X) / 4];
  DLB_UNROLL for (int p = 0; p < ResidentColumns<T, E>::packets; ++p) {
    if (columns.column(p) >= columns.classes) continue;
    float out[V];
    value(p, out);
    if (columns.whole(p)) {
      store_aligned<X, V>(row + columns.column(p), out);
    } else if (p == 0 && columns.head()) {
      store_edge<X, V>(row, columns.first, columns.classes, out);
    } else {
      pack_columns<X, V>(out, edge);
    }
  }
  const int tail = columns.tail();
  if (tail >= 0) store_packed_edge<X, V>(row, columns.column(tail), columns.classes, edge);
}

// Teacher and buffer of another dtype than the logits: float32 logits may keep 16-bit rows, the rest takes two passes.
template <typename T, int E>
DLB_DEVICE void load_teacher(const DeviceArgs& a, const BatchState& s, const ResidentColumns<T, E>& columns, int row,
                             float* out) {
  const int64_t offset = row * a.teacher_stride;
  if constexpr (sizeof(T) == 2) {
    load_resident(columns, rows_of<const T>(a, s.taught) + offset, out, true);
  } else if (a.teacher_dtype == DType::f32) {
    load_resident(columns, rows_of<const float>(a, s.taught) + offset, out, true);
  } else if (a.teacher_dtype == DType::bf16) {
    load_resident(columns, rows_of<const Bf16>(a, s.taught) + offset, out, true);
  } else {
    load_resident(columns, rows_of<const F16>(a, s.taught) + offset, out, true);
  }
}

template <typename T, typename X, int E, typename Group>
DLB_DEVICE void store_slot_as(const DeviceArgs& a, const ResidentColumns<T, E>& columns, const Group& group,
                              const T* z_row, int shift, X* slot_row, const float* z) {
  constexpr int V = ResidentColumns<T, E>::V;
  if (shift_of<V>(slot_row) == shift) {
    store_resident(columns, slot_row, [z](int p, float* out) {
      DLB_UNROLL for (int e = 0; e < V; ++e) out[e] = z[p * V + e];
    });
  } else {  // row start + j and slot j shifted differently (odd C and odd start): column by column, coalesced
    DLB_NO_UNROLL for (int c = group.rank; c < a.classes; c += group.size()) {
      X value;
      from_float(to_float(load(z_row + c)), value);
      store(slot_row + c, value);
    }
  }
}

template <typename T, int E, typename Group>
DLB_DEVICE void store_slot(const DeviceArgs& a, const BatchState& s, const ResidentColumns<T, E>& columns,
                           const Group& group, const T* z_row, int shift, int slot, const float* z) {
  const int64_t offset = static_cast<int64_t>(slot) * a.classes;
  if constexpr (sizeof(T) == 2) {
    store_slot_as(a, columns, group, z_row, shift, rows_of<T>(a, s.written) + offset, z);
  } else if (a.teacher_dtype == DType::f32) {
    store_slot_as(a, columns, group, z_row, shift, rows_of<float>(a, s.written) + offset, z);
  } else if (a.teacher_dtype == DType::bf16) {
    store_slot_as(a, columns, group, z_row, shift, rows_of<Bf16>(a, s.written) + offset, z);
  } else {
    store_slot_as(a, columns, group, z_row, shift, rows_of<F16>(a, s.written) + offset, z);
  }
}

// One row. `exists` is false for groups of a warp that have run out of rows but take part in its shuffles.
// `with_teacher`: whether the teacher's arithmetic is compiled in. slot < 0: the row is not stored.
template <typename T, Teach teach, bool with_teacher, int E, typename Group>
DLB_DEVICE void resident_row(const DeviceArgs& a, const BatchState& s, Group& group, const RowRole& role, bool exists,
                         int row, int slot, Totals& totals) {
  using Columns = ResidentColumns<T, E>;
  constexpr int V = Columns::V;
  const T* z_row = static_cast<const T*>(a.logits) + (exists ? row * a.logits_stride : 0);
  const int shift = shift_of<V>(z_row);
  const Columns columns(group.rank, group.size(), shift, a.classes);
  float z[E];  // the logits; later x, without a teacher exp(x)
  const bool read = exists && (role.active() || slot >= 0);
  if (!read) {
    DLB_UNROLL for (int e = 0; e < E; ++e) z[e] = -infinity();
  } else {
    // A row that is stored with another shift is read once more: it may stay in L1.
    load_resident(columns, z_row, z, slot < 0);
    // A stored row is a new row, and new rows have no teacher (teacher_limit <= start).
    if constexpr (!with_teacher) {
      if (slot >= 0) store_slot(a, s, columns, group, z_row, shift, slot, z);
    }
  }
  RowGradient g;
  float et[with_teacher ? E : 1];  // the teacher's logits, then exp(y / tau)
  float m = 0;
  if (Group::any(read)) {
    float top[2] = {-infinity(), -infinity()};
    DLB_UNROLL for (int e = 0; e < E; ++e) top[0] = maximum(top[0], z[e]);
    if constexpr (with_teacher) {
      if (exists && role.valid) {
        load_teacher(a, s, columns, row, et);
      } else {
        DLB_UNROLL for (int e = 0; e < E; ++e) et[e] = -infinity();
      }
      DLB_UNROLL for (int e = 0; e < E; ++e) top[1] = maximum(top[1], et[e]);
      group.template reduce<Max, 0>(top);
    } else {
      float only[1] = {top[0]};
      group.template reduce<Max, 0>(only);
      top[0] = only[0];
    }
    // A row of nothing but -inf keeps x = -inf instead of NaN: its exponentials are 0.
    DLB_UNROLL for (int i = 0; i < 2; ++i) top[i] = top[i] == -infinity() ? 0.0f : top[i];

    RowSums n;
    n.top = m = top[0];
    float sum[max_resident_sums] = {0, 0, 0, 0, 0};  // d1, d2, dt, gap, x_sum
    if (s.scales.even > 0.0f) {
      DLB_UNROLL for (int p = 0; p < Columns::packets; ++p) {
        DLB_UNROLL for (int e = 0; e < V; ++e) {
          const bool inside = static_cast<unsigned>(columns.column(p) + e) < static_cast<unsigned>(a.classes);
          sum[4] += inside ? z[p * V + e] - m : 0.0f;
        }
      }
    }
    DLB_UNROLL for (int p = 0; p < Columns::packets; ++p) {
      if (p > 0 && p * columns.step - shift >= a.classes) continue;  // for the whole group: nothing there
      DLB_UNROLL for (int e = p * V; e < p * V + V; ++e) {
        const float x = z[e] - m, e1 = exp2_fast(x * log2e);
        sum[0] += e1;
        if constexpr (with_teacher) {
          z[e] = x;
          sum[1] += exp2_fast(x * s.log2e_over_t);
          const float y = et[e] - top[1];
          et[e] = exp2_fast(y * s.log2e_over_t);
          sum[2] += et[e];
          // A class without teacher mass costs nothing, also where the student's logit is -inf.
          sum[3] += et[e] * (et[e] == 0.0f ? 0.0f : y - x);
        } else {
          z[e] = e1;
        }
      }
    }
    if constexpr (with_teacher) {
      group.template reduce<Sum, 1>(sum);
    } else {
      float both[2] = {sum[0], sum[4]};
      group.template reduce<Sum, 1>(both);
      sum[0] = both[0], sum[4] = both[1];
    }
    n.d1 = sum[0], n.d2 = sum[1], n.dt = sum[2], n.gap = sum[3] * s.inverse, n.x_sum = sum[4];
    constexpr Teach by = with_teacher ? teach : Teach::none;
    if (exists && role.active()) g = finish_row<by, false>(a, s, role, n, z_row, row, group.rank == 0, totals);
    if constexpr (!with_teacher) {
      if (slot >= 0 && group.rank == 0) write_slot(a, s, slot, is_finite(a, n));
    }
  }
  // Keeps the compiler from moving the stores' addresses up, across the sums, where they would spill.
  asm volatile("" ::: "memory");
  if (!exists) return;
  if (!role.active()) finish_idle_row(a, row, group.rank == 0);
  if (a.grad == nullptr) return;
  T* grad_row = static_cast<T*>(a.grad) + static_cast<int64_t>(row) * a.classes;
  // Of an idle row nothing is left but zeros: with a teacher by exp(-inf) and coefficients of 0, here by hand.
  if constexpr (!with_teacher) {
    if (!role.active()) {
      DLB_UNROLL for (int e = 0; e < E; ++e) z[e] = 0.0f;
    }
  }
  store_resident(columns, grad_row, [&](int p, float* out) {
    DLB_UNROLL for (int e = 0; e < V; ++e) {
      float v;
      if constexpr (with_teacher) {
        const float x = z[p * V + e];
        v = -g.k * et[p * V + e] - g.constant;  // the small difference first: student and teacher are one step apart
        v = g.b * exp2_fast(x * s.log2e_over_t) + v;
        v = g.a * exp2_fast(x * log2e) + v;
      } else {
        v = g.a * z[p * V + e] - g.constant;
      }
      out[e] = v;
    }
    correct_labels<V, false>(g, columns.column(p), out);
  });
}

// Asks for row `row` of an array before anybody waits for it.
template <typename Group>
DLB_DEVICE void prefetch_row(const DeviceArgs& a, const Group& group, const void* rows, int64_t stride, int64_t size,
                             int row) {
  if (!group.prefetches()) return;
  const int share = (a.classes + Group::parts() - 1) / Group::parts(), first = share * Group::part();
  const int columns = smaller(share, a.classes - first);
  if (columns * size < 128) return;  // less than a cache line
  prefetch(static_cast<const char*>(rows) + (row * stride + first) * size, columns * size);
}
template <typename T, typename Group>
DLB_DEVICE void prefetch_logits(const DeviceArgs& a, const Group& group, int row) {
  prefetch_row(a, group, a.logits, a.logits_stride, sizeof(T), row);
}
template <typename Group>
DLB_DEVICE void prefetch_teacher(const DeviceArgs& a, const Group& group, int generation, int row) {
  const int64_t size = a.teacher_dtype == DType::f32 ? 4 : 2;
  prefetch_row(a, group, rows_of<const char>(a, generation), a.teacher_stride, size, row);
}

template <typename T, Teach teach, int E, typename Group>
DLB_KERNEL DLB_BOUNDS(Group::launch_threads, Group::min_blocks) resident_kernel(DLB_CONSTANT DeviceArgs a) {
  DLB_SHARED(ResidentShared<Group>, shared);
  Group group(shared.group);
  // The first pair is on its way while the batch is counted: the first half for certain, the second where it usually
  // begins.
  if (const int pair = group.first() + group.index; pair < a.batch / 2) {
    prefetch_logits<T>(a, group, pair);
    prefetch_logits<T>(a, group, (a.batch + 1) / 2 + pair);
    if (teach != Teach::none && pair < a.teacher_rows && group.prefetches()) {
      // Of a batch whose ids are still to be compared: a new one. `prepare` would wait for this load, too.
      const int taught =
          a.slots != nullptr ? static_cast<int>(load(a.slots + slots_latest) & 1) ^ (a.again > 0 ? 1 : 0) : 0;
      prefetch_teacher(a, group, taught, pair);
    }
  }
  prepare(a, shared.state);
  const BatchState& s = shared.state.state;
  Totals& totals = shared.totals[group.index];
  const bool leader = group.rank == 0;
  if (leader) totals = {0, 0, 0};
  // The bounds are the same for all threads of the block: groups without a pair still take part in shuffles. Pair and
  // half (row j, row start + j) share one counter: every register counts here.
  DLB_NO_UNROLL for (int turn = 2 * group.first(); turn < 2 * pair_count(a, s);
                     turn += turn % 2 == 0 ? 1 : 2 * group.groups_in_grid() - 1) {
    const int half = turn % 2, pair = turn / 2 + group.index;
    const int row = half == 0 ? pair : s.start + pair, end = half == 0 ? s.start : a.batch;
    const bool exists = row < end;
    const RowRole role = exists ? row_role<false>(a, s, row) : RowRole();
    const int slot = half == 1 && exists && pair < s.stored ? pair : -1;
    if (half == 1) {
      // The next pair while this row is worked on; its second row was asked for together with the first.
      const int next = pair + group.groups_in_grid();
      if (next < s.start) {
        prefetch_logits<T>(a, group, next);
        if (teach != Teach::none && next < s.teacher_limit) prefetch_teacher(a, group, s.taught, next);
      }
      if (s.start + next < a.batch) prefetch_logits<T>(a, group, s.start + next);
    }
    if (teach != Teach::none && Group::any(role.valid))
      resident_row<T, teach, teach != Teach::none, E>(a, s, group, role, exists, row, slot, totals);
    else
      resident_row<T, teach, false, E>(a, s, group, role, exists, row, slot, totals);
  }
  finish_launch(a, s, totals, leader, shared.finish);
}

}  // namespace cuda
}  // namespace dlb_fast
