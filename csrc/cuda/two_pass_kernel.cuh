// Two passes over a row: first the sums, with a running maximum, then the gradient, in reverse order, so that it finds
// the end of the row in the caches. For rows too long for the registers (C > 16384 without clusters), for options that
// read another array per class (dense targets, smoothing with class weights, given probabilities) and for virtual
// teachers.
//
// Predicted traffic per logit, gradient and buffer included: 12 bytes float32, 6 bytes 16-bit, when the second read
// hits L2; 18 and 9 when none of it does. ex2: 6 per logit with a teacher, 2 per other one. At most 85 registers plain
// (768 threads per multiprocessor), 128 general. Not yet run on a GPU.
#pragma once
#include "resident_kernel.cuh"

namespace dlb_fast {
namespace cuda {

template <int V>
DLB_DEVICE void load_teacher_columns(const DeviceArgs& a, const BatchState& s, int row, int first, int shift,
                                     float fill, float* out) {
  const int64_t offset = row * a.teacher_stride;
  if (a.teacher_dtype == DType::f32) {
    const float* p = rows_of<const float>(a, s.taught) + offset;
    load_columns<float, V>(p, first, a.classes, shift_of<V>(p) == shift, fill, out);
  } else if (a.teacher_dtype == DType::bf16) {
    const Bf16* p = rows_of<const Bf16>(a, s.taught) + offset;
    load_columns<Bf16, V>(p, first, a.classes, shift_of<V>(p) == shift, fill, out);
  } else {
    const F16* p = rows_of<const F16>(a, s.taught) + offset;
    load_columns<F16, V>(p, first, a.classes, shift_of<V>(p) == shift, fill, out);
  }
}

template <int V>
DLB_DEVICE void store_slot_columns(const DeviceArgs& a, const BatchState& s, int slot, int first, int shift,
                                   const float* in) {
  const int64_t offset = static_cast<int64_t>(slot) * a.classes;
  if (a.teacher_dtype == DType::f32) {
    float* p = rows_of<float>(a, s.written) + offset;
    store_columns<float, V>(p, first, a.classes, shift_of<V>(p) == shift, in);
  } else if (a.teacher_dtype == DType::bf16) {
    Bf16* p = rows_of<Bf16>(a, s.written) + offset;
    store_columns<Bf16, V>(p, first, a.classes, shift_of<V>(p) == shift, in);
  } else {
    F16* p = rows_of<F16>(a, s.written) + offset;
    store_columns<F16, V>(p, first, a.classes, shift_of<V>(p) == shift, in);
  }
}

DLB_DEVICE float shift_base(float top) { return top == -infinity() ? 0.0f : top; }

// A running maximum, and the factor by which sums relative to it shrink when it grows.
struct RunningMax {
  float top = -infinity();
  DLB_DEVICE float move(float to, float log2_scale) {
    const float factor = to > top ? exp2_fast((top - to) * log2_scale) : 1.0f;
    top = maximum(top, to);
    return factor;
  }
};
// How far sums of differences to a maximum have to be moved when it goes from `before` to `base`.
DLB_DEVICE float distance(float before, float base) { return before == -infinity() ? 0.0f : before - base; }
// gap may be infinite where a class that has lost all its mass met a logit of -inf: that class costs nothing.
DLB_DEVICE float shrink_gap(float gap, float factor) { return factor == 0.0f ? 0.0f : gap * factor; }

// The teacher of one row; its kind may be a template argument or read from the arguments.
struct TeacherOfRow {
  bool logits, probabilities, is_virtual;
};
template <Teach teach>
DLB_DEVICE TeacherOfRow teacher_of_row(const DeviceArgs& a, bool valid) {
  if (teach == Teach::none || !valid) return {false, false, false};
  if (teach == Teach::logits) return {true, false, false};
  return {a.kind == TeacherKind::logits, a.kind == TeacherKind::probabilities, a.kind == TeacherKind::virtual_teacher};
}

template <typename T, Teach teach, bool general, typename Group>
DLB_DEVICE void two_pass_row(const DeviceArgs& a, const BatchState& s, Group& group, RowRole role, int row, int slot,
                             Totals& totals) {
  constexpr int V = packet_columns<T>;
  const T* z_row = static_cast<const T*>(a.logits) + row * a.logits_stride;
  T* grad_row = a.grad != nullptr ? static_cast<T*>(a.grad) + static_cast<int64_t>(row) * a.classes : nullptr;
  const int shift = shift_of<V>(z_row), packets = (a.classes + shift + V - 1) / V;
  const bool active = role.active(), leader = group.rank == 0;
  if (!active && slot < 0) {  // reads nothing
    finish_idle_row(a, row, leader);
    if (grad_row == nullptr) return;
    float zero[V];
    DLB_UNROLL for (int e = 0; e < V; ++e) zero[e] = 0.0f;
    const bool aligned = shift_of<V>(grad_row) == shift;
    for (int p = group.rank; p < packets; p += group.size())
      store_columns<T, V>(grad_row, p * V - shift, a.classes, aligned, zero);
    return;
  }
  const TeacherOfRow use = teacher_of_row<teach>(a, role.valid);
  const bool dense = general && a.dense != nullptr && role.counts;
  const bool weighted = general && a.weight != nullptr && (dense || s.scales.even > 0.0f);
  const float* q_row = dense ? a.dense + row * a.dense_stride : nullptr;
  // Sums of x and y are taken relative to the running maximum and moved with it. A class without mass, masked by a
  // large negative logit, then leaves nothing behind wherever it stands, and common offsets cancel.
  RunningMax top, teacher_top;
  float sum[max_sums] = {0, 0, 0, 0, 0, 0, 0, 0};  // d1, d2, dt, gap, x_sum, weighted_x, share_sum, share_x
  float seen = 0, seen_weight = 0;                 // columns in x_sum and weights in weighted_x
  const auto move_x = [&](float moved) {
    sum[4] += seen * moved;
    if (general) sum[5] += seen_weight * moved, sum[7] += sum[6] * moved;
  };
  float best_share = -infinity();
  int best_column = 0;
  DLB_NO_UNROLL for (int p = group.rank; p < packets; p += group.size()) {
    const int first = p * V - shift;
    float z[V];
    load_columns<T, V>(z_row, first, a.classes, true, -infinity(), z);
    if (slot >= 0) store_slot_columns<V>(a, s, slot, first, shift, z);
    float packet_top = z[0];
    DLB_UNROLL for (int e = 1; e < V; ++e) packet_top = maximum(packet_top, z[e]);
    const float before = top.top;
    sum[0] *= top.move(packet_top, log2e);
    const float base = shift_base(top.top), moved = distance(before, base);
    DLB_UNROLL for (int e = 0; e < V; ++e) sum[0] += exp2_fast((z[e] - base) * log2e);
    if (teach != Teach::none && role.valid) {
      RunningMax soft;
      soft.top = before;
      sum[1] *= soft.move(packet_top, s.log2e_over_t);
      DLB_UNROLL for (int e = 0; e < V; ++e) sum[1] += exp2_fast((z[e] - base) * s.log2e_over_t);
    }
    if (use.logits) {
      float t[V];
      load_teacher_columns<V>(a, s, row, first, shift, -infinity(), t);
      float t_top = t[0];
      DLB_UNROLL for (int e = 1; e < V; ++e) t_top = maximum(t_top, t[e]);
      const float t_before = teacher_top.top;
      const float factor = teacher_top.move(t_top, s.log2e_over_t), t_base = shift_base(teacher_top.top);
      sum[3] = shrink_gap(sum[3] + sum[2] * (distance(t_before, t_base) - moved), factor);
      sum[2] *= factor;
      DLB_UNROLL for (int e = 0; e < V; ++e) {
        const float et = exp2_fast((t[e] - t_base) * s.log2e_over_t);
        sum[2] += et;
        sum[3] += et == 0.0f ? 0.0f : et * ((t[e] - t_base) - (z[e] - base));
      }
    }
    if (general && use.probabilities) {
      float t[V];
      load_teacher_columns<V>(a, s, row, first, shift, 0.0f, t);
      sum[3] -= sum[2] * moved * s.inverse;  // in this order: no mass costs nothing, however far the maximum moved
      DLB_UNROLL for (int e = 0; e < V; ++e) {
        sum[2] += t[e];
        if (t[e] != 0.0f) sum[3] += t[e] * (log_accurate(t[e]) - (z[e] - base) * s.inverse);
      }
    }
    if (s.scales.even > 0.0f || use.is_virtual || dense) {
      move_x(moved);
      DLB_UNROLL for (int e = 0; e < V; ++e) {
        const int c = first + e;
        if (c < 0 || c >= a.classes) continue;
        const float x = z[e] - base, w = weighted ? load(a.weight + c) : 1.0f;
        sum[4] += x, seen += 1.0f;
        if (!general) continue;
        sum[5] += w * x, seen_weight += w;
        if (!dense) continue;
        const float q = load(q_row + c), share = q * w;
        sum[6] += share;
        if (share != 0.0f) sum[7] += share * x;
        if (q > best_share) best_share = q, best_column = c;
      }
    }
  }
  float tops[3] = {top.top, teacher_top.top, best_share};
  group.template reduce<Max, 0>(tops);
  const float m = shift_base(tops[0]), mt = shift_base(tops[1]);
  if (dense) {  // the right class of a dense target: the first of its largest shares
    float column[1] = {best_share == tops[2] ? -static_cast<float>(best_column) : -infinity()};
    group.template reduce<Max, 1>(column);
    role.label = column[0] > -infinity() ? -static_cast<int>(column[0]) : 0;
  }
  const float own = top.top, own_teacher = teacher_top.top, moved = distance(own, m);
  sum[0] *= exp2_fast((own - m) * log2e);
  sum[1] *= exp2_fast((own - m) * s.log2e_over_t);
  if (use.logits) {
    const float factor = exp2_fast((own_teacher - mt) * s.log2e_over_t);
    sum[3] = shrink_gap(sum[3] + sum[2] * (distance(own_teacher, mt) - moved), factor) * s.inverse;
    sum[2] *= factor;
  } else {
    sum[3] -= sum[2] * moved * s.inverse;  // in this order: no mass costs nothing, however far the maximum moved
  }
  move_x(moved);
  group.template reduce<Sum, 2>(sum);
  RowSums n;
  n.top = m;
  n.d1 = sum[0], n.d2 = sum[1], n.dt = sum[2], n.gap = sum[3];
  n.x_sum = sum[4], n.weighted_x = sum[5], n.share_sum = sum[6], n.share_x = sum[7];
  RowGradient g;
  if (active)
    g = finish_row<teach, general>(a, s, role, n, z_row, row, leader, totals);
  else
    finish_idle_row(a, row, leader);
  if (slot >= 0 && leader) write_slot(a, s, slot, is_finite(a, n));
  if (grad_row == nullptr) return;
  const bool aligned = shift_of<V>(grad_row) == shift;
  const int last = (packets - 1 - group.rank) / group.size() * group.size() + group.rank;
  DLB_NO_UNROLL for (int p = last; p >= 0 && packets > group.rank; p -= group.size()) {
    const int first = p * V - shift;
    float value[V], t[V];
    if (role.counts || role.valid) {  // what a row that is only shown holds, even NaN, has no gradient
      load_columns<T, V>(z_row, first, a.classes, true, 0.0f, value, true);
      if (use.logits || use.probabilities) load_teacher_columns<V>(a, s, row, first, shift, 0.0f, t);
      DLB_UNROLL for (int e = 0; e < V; ++e) {
        const float x = value[e] - m;
        float v = g.a * exp2_fast(x * log2e) - g.constant;
        if (teach != Teach::none && role.valid) v += g.b * exp2_fast(x * s.log2e_over_t);
        if (use.logits) v -= g.k * exp2_fast((t[e] - mt) * s.log2e_over_t);
        if (general && use.probabilities) v -= g.k * t[e];
        if (general && (weighted || dense)) {
          const int c = first + e;
          if (c >= 0 && c < a.classes) {
            const float w = weighted ? load(a.weight + c) : 1.0f;
            v -= g.per_weight * w;
            if (dense) v -= g.per_share * (load(q_row + c) * w);
          }
        }
        value[e] = v;
      }
      correct_labels<V, general>(g, first, value);
    } else {
      DLB_UNROLL for (int e = 0; e < V; ++e) value[e] = 0.0f;
    }
    store_columns<T, V>(grad_row, first, a.classes, aligned, value);
  }
}

template <typename Group>
struct TwoPassShared {
  typename Group::Shared group;
  StateShared state;
  FinishShared finish;
  Totals totals[max_groups];
};

template <typename T, Teach teach, bool general, typename Group>
DLB_KERNEL DLB_BOUNDS(Group::launch_threads, Group::min_blocks) two_pass_kernel(DLB_CONSTANT DeviceArgs a) {
  DLB_SHARED(TwoPassShared<Group>, shared);
  prepare(a, shared.state);
  const BatchState& s = shared.state.state;
  Group group(shared.group);
  Totals& totals = shared.totals[group.index];
  const bool leader = group.rank == 0;
  if (leader) totals = {0, 0, 0};
  DLB_NO_UNROLL for (int pair = group.first() + group.index; pair < pair_count(a, s); pair += group.groups_in_grid()) {
    DLB_NO_UNROLL for (int half = 0; half < 2; ++half) {
      const int row = half == 0 ? pair : s.start + pair, end = half == 0 ? s.start : a.batch;
      if (row >= end) continue;
      const RowRole role = row_role<general>(a, s, row);
      const int slot = half == 1 && pair < s.stored ? pair : -1;
      two_pass_row<T, teach, general>(a, s, group, role, row, slot, totals);
    }
  }
  finish_launch(a, s, totals, leader, shared.finish);
}

}  // namespace cuda
}  // namespace dlb_fast
