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
// resident kernel is shifted alike (plan_launch sees to it), except the slot a row is stored in. `whole`: compiled for
// rows that are whole packets in every array, where nothing sticks out.
template <typename T, int E, bool whole_rows>
struct ResidentColumns {
  static constexpr int V = packet_columns<T>, packets = E / V;
  static constexpr bool whole = whole_rows;
  int first, step;  // column at which the thread's packet 0 begins (may be negative), and columns between packets
  int classes, shift;
  DLB_DEVICE ResidentColumns(int rank, int size, int shift_of_row, int c)
      : first(rank * V - (whole ? 0 : shift_of_row)), step(size * V), classes(c), shift(whole ? 0 : shift_of_row) {}
  // The thread's packet that begins inside the row and ends outside, or -1. (A row within one packet counts as the
  // first.)
  DLB_DEVICE int tail() const {
    if (whole) return -1;
    const int before = classes - 1 - first, p = before / step;
    return before >= 0 && column(p) >= 0 && column(p) + V > classes ? p : -1;
  }
  DLB_DEVICE int column(int p) const { return first + p * step; }
  DLB_DEVICE bool head() const { return !whole && first < 0; }
  // Whether nothing of the row is there, for the whole group.
  DLB_DEVICE bool beyond(int p) const { return p > 0 && p * step - shift >= classes; }
  DLB_DEVICE bool inside(int p) const {
    return whole ? column(p) < classes : column(p) >= 0 && column(p) + V <= classes;
  }
};

// Columns outside, and all where the row is not `wanted`: -inf. Returns the largest of this thread's. `copy`: where a
// row of the same type and shift goes as it is, or null.
template <typename Columns, typename X, int E>
DLB_DEVICE float load_resident(const Columns& columns, const X* row, bool wanted, float (&out)[E], X* copy = nullptr) {
  constexpr int V = Columns::V, packets = Columns::packets;
  const X* const begin = row + columns.first;
  if constexpr (V * sizeof(X) == 16) {
    Packet raw[packets];
    DLB_UNROLL for (int p = 0; p < packets; ++p)
      raw[p] = load_packet_if(wanted && columns.inside(p), begin + p * columns.step, lowest_word<X>());
    if (copy != nullptr) {
      DLB_UNROLL for (int p = 0; p < packets; ++p) {
        store_packet_if(columns.inside(p), copy + columns.first + p * columns.step, raw[p]);
      }
    }
    DLB_UNROLL for (int p = 0; p < packets; ++p) unpack_packet<X, V>(raw[p], out + p * V);
    if (Columns::whole) {  // two 16-bit elements a comparison
      constexpr int elements = 4 / static_cast<int>(sizeof(X));
      uint32_t largest = raw[0].word[0];
      DLB_UNROLL for (int w = 1; w < 4 * packets; ++w) largest = larger_word<X>(largest, raw[w / 4].word[w % 4]);
      float top[2];
      unpack<X>(largest, top);
      return maximum(-infinity(), maximum(top[0], top[elements - 1]));
    }
  } else {
    DLB_UNROLL for (int e = 0; e < E; ++e) out[e] = -infinity();
    DLB_UNROLL for (int p = 0; p < packets; ++p) {
      if (wanted && columns.inside(p)) load_aligned<X, V>(begin + p * columns.step, out + p * V, true);
    }
  }
  if (wanted && columns.head()) load_edge<X, V>(row, columns.first, columns.classes, out);
  const int tail = columns.tail();
  if (wanted && tail >= 0) {
    float edge[V];
    load_edge<X, V>(row, columns.column(tail), columns.classes, edge);
    DLB_UNROLL for (int p = 0; p < packets; ++p) {
      // A select per element: a branch would be turned into an indexed store, and `out` into local memory.
      DLB_UNROLL for (int e = 0; e < V; ++e) out[p * V + e] = p == tail ? edge[e] : out[p * V + e];
    }
  }
  float top = -infinity();
  DLB_UNROLL for (int e = 0; e < E; ++e) top = maximum(top, out[e]);
  return top;
}

// Stores what `value(p, out)` puts into out[V] for each packet p.
template <typename Columns, typename X, typename Value>
DLB_DEVICE void store_resident(const Columns& columns, X* row, Value value) {
  constexpr int V = Columns::V;
  uint32_t edge[V * sizeof(X) / 4];
  X* const begin = row + columns.first;
  DLB_UNROLL for (int p = 0; p < Columns::packets; ++p) {
    if (columns.beyond(p) || (!Columns::whole && columns.column(p) >= columns.classes)) continue;
    float out[V];
    value(p, out);
    if constexpr (Columns::whole && V * sizeof(X) == 16) {
      store_packet_if(columns.inside(p), begin + p * columns.step, packed<X, V>(out));
    } else if (columns.inside(p)) {
      store_aligned<X, V>(begin + p * columns.step, out);
    } else if (p == 0 && columns.head()) {
      store_edge<X, V>(row, columns.first, columns.classes, out);
    } else if (!Columns::whole) {
      pack_columns<X, V>(out, edge);
    }
  }
  const int tail = columns.tail();
  if (tail >= 0) store_packed_edge<X, V>(row, columns.column(tail), columns.classes, edge);
}

// Teacher and buffer of another dtype than the logits: float32 logits may keep 16-bit rows, the rest takes two passes.
template <typename T, typename Columns, int E>
DLB_DEVICE float load_teacher(const DeviceArgs& a, const BatchState& s, const Columns& columns, int row, bool wanted,
                              float (&out)[E]) {
  const int64_t offset = row * a.teacher_stride;
  if constexpr (sizeof(T) == 2) {
    return load_resident(columns, rows_of<const T>(a, s.taught) + offset, wanted, out);
  } else if (a.teacher_dtype == DType::f32) {
    return load_resident(columns, rows_of<const float>(a, s.taught) + offset, wanted, out);
  } else if (a.teacher_dtype == DType::bf16) {
    return load_resident(columns, rows_of<const Bf16>(a, s.taught) + offset, wanted, out);
  } else {
    return load_resident(columns, rows_of<const F16>(a, s.taught) + offset, wanted, out);
  }
}

template <typename T, typename X, typename Columns, typename Group>
DLB_DEVICE void store_slot_as(const DeviceArgs& a, const Columns& columns, const Group& group, const T* z_row,
                              int shift, X* slot_row, const float* z) {
  constexpr int V = Columns::V;
  if (Columns::whole || shift_of<V>(slot_row) == shift) {
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

template <typename T, typename Columns, typename Group>
DLB_DEVICE void store_slot(const DeviceArgs& a, const BatchState& s, const Columns& columns, const Group& group,
                           const T* z_row, int shift, int slot, const float* z) {
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

// What to subtract from v * scale so that the row's largest logit, `top`, gives 0 or, by the product's rounding, nearly
// so: from 2^24 on it could be off by more than 1, and `top` is subtracted from v itself.
template <int E>
DLB_DEVICE float base_of(float (&v)[E], float top, float scale) {
  const float base = top * scale;
  if (maximum(base, -base) < 16777216.0f) return base;
  DLB_UNROLL for (int e = 0; e < E; ++e) v[e] -= top;
  return 0.0f;
}

// One row. `exists` is false for groups of a warp that have run out of rows but take part in its shuffles.
// `with_teacher`: whether the teacher's arithmetic is compiled in. slot < 0: the row is not stored.
template <typename T, bool with_teacher, int E, bool whole, typename Group>
DLB_DEVICE void resident_row(const DeviceArgs& a, const BatchState& s, Group& group, const RowRole& role, bool exists,
                         int row, int slot, Totals& totals) {
  using Columns = ResidentColumns<T, E, whole>;
  constexpr int V = Columns::V;
  const T* z_row = static_cast<const T*>(a.logits) + (exists ? row * a.logits_stride : 0);
  const int shift = shift_of<V>(z_row);
  const Columns columns(group.rank, group.size(), shift, a.classes);
  float z[E];  // the logits; later x in units of log2, without a teacher exp(x)
  float top[2] = {-infinity(), -infinity()};
  const bool read = exists && (role.active() || slot >= 0);
  // A stored row is a new row, and new rows have no teacher (teacher_limit <= start).
  constexpr bool copies = whole && !with_teacher && sizeof(T) == 2;
  T* const copy = copies && slot >= 0 ? rows_of<T>(a, s.written) + static_cast<int64_t>(slot) * a.classes : nullptr;
  top[0] = load_resident(columns, z_row, read, z, copy);
  if constexpr (!with_teacher && !copies) {
    if (slot >= 0) store_slot(a, s, columns, group, z_row, shift, slot, z);
  }
  RowGradient g;
  float et[with_teacher ? E : 1];  // the teacher's logits, then exp(y / tau)
  if (Group::any(read)) {
    if constexpr (with_teacher) {
      top[1] = load_teacher<T>(a, s, columns, row, exists && role.valid, et);
      group.template reduce<Max, 0>(top);
    } else {
      float only[1] = {top[0]};
      group.template reduce<Max, 0>(only);
      top[0] = only[0];
    }
    // A row of nothing but -inf keeps x = -inf instead of NaN: its exponentials are 0.
    DLB_UNROLL for (int i = 0; i < 2; ++i) top[i] = top[i] == -infinity() ? 0.0f : top[i];

    RowSums n;
    n.top = top[0];
    float sum[max_resident_sums] = {0, 0, 0, 0, 0};  // d1, d2, dt, gap, x_sum
    const bool smoothed = s.scales.even > 0.0f;
    if (smoothed) {
      DLB_UNROLL for (int p = 0; p < Columns::packets; ++p) {
        DLB_UNROLL for (int e = 0; e < V; ++e) {
          const bool inside = static_cast<unsigned>(columns.column(p) + e) < static_cast<unsigned>(a.classes);
          sum[4] += inside ? z[p * V + e] - top[0] : 0.0f;
        }
      }
    }
    // Exponents of 2 by one instruction, z log2(e) - base. What the base's rounding adds to all of a row's exponents
    // cancels between exponentials and their sum; `excess` takes it out of the logarithm of the sum.
    const float base = base_of(z, top[0], log2e);
    n.excess = base == 0.0f ? 0.0f : multiply_add(top[0], log2e, -base);
    float teacher_base = 0.0f;
    if constexpr (with_teacher) teacher_base = base_of(et, top[1], s.log2e_over_t);
    DLB_UNROLL for (int p = 0; p < Columns::packets; ++p) {
      if (columns.beyond(p)) continue;
      DLB_UNROLL for (int e = p * V; e < p * V + V; ++e) {
        z[e] = multiply_add(z[e], log2e, -base);
        const float e1 = exp2_fast(z[e]);
        sum[0] += e1;
        if constexpr (with_teacher) {
          const float x = z[e] * s.inverse, y = multiply_add(et[e], s.log2e_over_t, -teacher_base);
          sum[1] += exp2_fast(x);
          et[e] = exp2_fast(y);
          sum[2] += et[e];
          // A class without teacher mass costs nothing, also where the student's logit is -inf.
          sum[3] = add_unless_zero(et[e], y - x, sum[3]);
        } else {
          z[e] = e1;
        }
      }
    }
    if constexpr (with_teacher) {
      if (smoothed) {
        group.template reduce<Sum, 1>(sum);
      } else {
        float four[4] = {sum[0], sum[1], sum[2], sum[3]};
        group.template reduce<Sum, 1>(four);
        DLB_UNROLL for (int i = 0; i < 4; ++i) sum[i] = four[i];
      }
    } else if (smoothed) {
      float both[2] = {sum[0], sum[4]};
      group.template reduce<Sum, 1>(both);
      sum[0] = both[0], sum[4] = both[1];
    } else {
      float only[1] = {sum[0]};
      group.template reduce<Sum, 1>(only);
      sum[0] = only[0];
    }
    n.d1 = sum[0], n.d2 = sum[1], n.dt = sum[2], n.gap = sum[3] * ln2, n.x_sum = sum[4];
    constexpr Teach teach = with_teacher ? Teach::logits : Teach::none;
    if (exists && role.active()) g = finish_row<teach, false>(a, s, role, n, z_row, row, group.rank == 0, totals);
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
      asm volatile("" ::: "memory");  // a branch, not a selection for every row
      DLB_UNROLL for (int e = 0; e < E; ++e) z[e] = 0.0f;
    }
  }
  store_resident(columns, grad_row, [&](int p, float* out) {
    DLB_UNROLL for (int e = 0; e < V; ++e) {
      float v;
      if constexpr (with_teacher) {
        const float x = z[p * V + e];
        v = -g.k * et[p * V + e] - g.constant;  // the small difference first: student and teacher are one step apart
        v = g.b * exp2_fast(x * s.inverse) + v;
        v = g.a * exp2_fast(x) + v;
      } else {
        v = g.a * z[p * V + e] - g.constant;
      }
      out[e] = v;
    }
    correct_labels<V, false>(g, columns.column(p), out);
  });
}

// Asks for row `row` of an array before anybody waits for it. Not worth it for less than a cache line.
template <typename Group>
DLB_DEVICE void prefetch_row(const DeviceArgs& a, const Group& group, const void* rows, int64_t stride, int size,
                             int row) {
  constexpr int line = 128;
  const int share = (a.classes + Group::parts() - 1) / Group::parts(), first = share * Group::part();
  const int bytes = smaller(share, a.classes - first) * size;
  const char* const begin = static_cast<const char*>(rows) + (row * stride + first) * size;
  if (bytes < line) return;
  if constexpr (Group::by_line) {  // every line that the row is in, and the one with its end
    if (group.rank * line < bytes + line - 1) prefetch_line(begin + smaller(group.rank * line, bytes - 1));
  } else if (group.prefetches()) {
    prefetch(begin, bytes);
  }
}
template <typename T, typename Group>
DLB_DEVICE void prefetch_logits(const DeviceArgs& a, const Group& group, int row) {
  prefetch_row(a, group, a.logits, a.logits_stride, sizeof(T), row);
}
template <typename Group>
DLB_DEVICE void prefetch_teacher(const DeviceArgs& a, const Group& group, int generation, int row) {
  const int size = a.teacher_dtype == DType::f32 ? 4 : 2;
  prefetch_row(a, group, rows_of<const char>(a, generation), a.teacher_stride, size, row);
}

template <typename T, int E, bool whole, typename Group>
DLB_KERNEL DLB_BOUNDS(Group::launch_threads, Group::min_blocks) resident_kernel(DLB_CONSTANT DeviceArgs a) {
  DLB_SHARED(ResidentShared<Group>, shared);
  Group group(shared.group);
  // The first pair is on its way while the batch is counted: the first half for certain, the second where it usually
  // begins.
  if (const int pair = group.first() + group.index; pair < a.batch / 2) {
    prefetch_logits<T>(a, group, pair);
    prefetch_logits<T>(a, group, (a.batch + 1) / 2 + pair);
    if (pair < a.teacher_rows && (Group::by_line || group.prefetches())) {
      // Of a batch whose ids are still to be compared: a new one. `prepare` would wait for this load, too.
      const int taught =
          a.slots != nullptr ? static_cast<int>(load(a.slots + slots_latest) & 1) ^ (a.again > 0 ? 1 : 0) : 0;
      prefetch_teacher(a, group, taught, pair);
    }
  }
  prepare(a, shared.state);
  group.meet();
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
        if (next < s.teacher_limit) prefetch_teacher(a, group, s.taught, next);
      }
      if (s.start + next < a.batch) prefetch_logits<T>(a, group, s.start + next);
    }
    if (Group::any(role.valid))
      resident_row<T, true, E, whole>(a, s, group, role, exists, row, slot, totals);
    else
      resident_row<T, false, E, whole>(a, s, group, role, exists, row, slot, totals);
  }
  finish_launch(a, s, totals, leader, shared.finish);
}

}  // namespace cuda
}  // namespace dlb_fast
