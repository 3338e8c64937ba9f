// One row: what it takes part in, and from the sums over its columns its losses and the coefficients of its gradient.
//
//   d/dz_c = a e1_c + b e2_c - k et_c - constant - per_weight w_c - per_share q_c w_c - [c = label] at_label - ...
//
// Notation as in row_math.h. Everything is float32 and rounded once, at the store, label column included.
#pragma once
#include "batch.cuh"
#include "columns.cuh"

namespace dlb_fast {
namespace cuda {

// Kind of teacher a kernel is compiled for. `any`, the general kernel, reads it from the arguments.
enum class Teach { none, logits, any };

struct RowRole {
  bool counts = false, valid = false;
  bool shown = false;                // a pair without its second label: not in the loss, but in the count of right rows
  int label = 0, label_b = -1;       // -1: no second label
  float share = 0, share_b = 0;      // mixup share times class weight; NaN when the label is not a class
  DLB_DEVICE bool active() const { return counts || valid || shown; }
};

DLB_DEVICE float label_share(const DeviceArgs& a, int64_t label, float share, int& column) {
  const bool inside = label >= 0 && label < a.classes;
  column = inside ? static_cast<int>(label) : 0;
  if (!inside) return not_a_number();  // poisons the row's loss and gradient: the host could not see this label
  return a.weight != nullptr ? share * load(a.weight + label) : share;
}

template <bool general>
DLB_DEVICE RowRole row_role(const DeviceArgs& a, const BatchState& s, int row) {
  RowRole r;
  r.valid = row < s.teacher_limit && has_valid_teacher(a, row, match_of(a, s, row));
  if (a.target != nullptr) {
    r.counts = label_counts(a, row);
    const int64_t label = load(a.target + row * a.target_stride);
    if (r.counts) {
      const bool two = general && a.target_b != nullptr;
      const float lam = two ? load(a.lam + row * a.lam_stride) : 1.0f;
      r.share = label_share(a, label, lam, r.label);
      if (two)
        r.share_b = label_share(a, load(a.target_b + row * a.target_b_stride), 1.0f - lam, r.label_b);
    } else if (general && a.target_b != nullptr && label != a.ignore_index && label >= 0 && label < a.classes) {
      r.shown = true, r.label = static_cast<int>(label);
    }
  } else {
    r.counts = a.dense != nullptr;
  }
  return r;
}

// Sums over the columns of one row. The x_ sums are relative to the row maximum.
struct RowSums {
  float top = 0;                    // m
  float excess = 0;                 // log2 of a factor that all terms of d1 have
  float d1 = 1, d2 = 1, dt = 1;     // for given probabilities dt is their sum
  float gap = 0;                    // logits: sum et (y - x) / tau; probabilities: sum p (ln p - x / tau)
  float x_sum = 0;                  // sum x_c (needed by label smoothing and by a virtual teacher)
  float weighted_x = 0;             // sum w_c x_c (label smoothing with class weights)
  float share_sum = 0, share_x = 0; // dense targets: sum q_c w_c and sum q_c w_c x_c
};

struct RowGradient {
  float a = 0, b = 0, k = 0, constant = 0, per_weight = 0, per_share = 0;
  int label = -1, label_b = -1;
  float at_label = 0, at_label_b = 0;
};

// Sums over the rows of one group, in shared memory: its leader alone touches them, once per row, and they would cost
// every thread four registers.
struct Totals {
  float ce, kl, correct;
};
constexpr int max_groups = 16;

// The probabilities of a virtual teacher: `right` for the label, `wrong` for every other class.
struct VirtualProbabilities {
  float right, wrong;
};
DLB_DEVICE VirtualProbabilities virtual_probabilities(const DeviceArgs& a) {
  const float classes = static_cast<float>(a.classes);
  if (a.correct_share < 0.0f) return {1.0f / classes, 1.0f / classes};
  return {a.correct_share, a.classes > 1 ? (1.0f - a.correct_share) / (classes - 1.0f) : 0.0f};
}
DLB_DEVICE float p_log_p(float p) { return p > 0.0f ? p * log_accurate(p) : 0.0f; }

template <Teach teach, bool general, typename T>
DLB_DEVICE RowGradient finish_row(const DeviceArgs& a, const BatchState& s, const RowRole& role, const RowSums& n,
                                  const T* z_row, int row, bool leader, Totals& totals) {
  RowGradient g;
  const TermScales<float>& scales = s.scales;
  float ce = 0, kl = 0;
  const float x_label = leader ? to_float(load(z_row + role.label)) - n.top : 0.0f;  // losses are the leader's
  if (role.counts) {
    float mass = scales.hard * role.share;
    float dot = mass == 0.0f ? 0.0f : mass * x_label;
    if (general && role.label_b >= 0) {
      const float mass_b = scales.hard * role.share_b;
      mass += mass_b;
      dot += mass_b == 0.0f ? 0.0f : mass_b * (to_float(load(z_row + role.label_b)) - n.top);
      g.label_b = role.label_b;
      g.at_label_b = scales.ce * mass_b;
    }
    if (general && a.dense != nullptr) {
      mass += scales.hard * n.share_sum;
      dot += scales.hard * n.share_x;
      g.per_share = scales.ce * scales.hard;
    }
    if (scales.even > 0.0f) {
      mass += scales.even * s.weight_sum;
      dot += scales.even * (general && a.weight != nullptr ? n.weighted_x : n.x_sum);
    }
    if (leader) ce = mass * (log_accurate(n.d1) - n.excess * ln2) - dot;
    const RowCoefficients<float> r = ce_coefficients<float>(scales, mass * reciprocal(n.d1), role.share, 1.0f);
    g.a = r.a;
    if (general && a.weight != nullptr) g.per_weight = r.s; else g.constant = r.s;
    if (a.dense == nullptr) g.label = role.label, g.at_label = r.label;
  }
  const bool labelled = role.counts ? role.share == role.share : general && role.shown;
  if (leader && labelled && n.d1 == n.d1 && x_label >= 0.0f) totals.correct += 1.0f;
  if (teach != Teach::none && role.valid) {
    const TeacherKind kind = teach == Teach::any ? a.kind : TeacherKind::logits;
    if (kind == TeacherKind::virtual_teacher) {
      const VirtualProbabilities p = virtual_probabilities(a);
      const float more = p.right - p.wrong;
      const float entropy = p_log_p(p.right) + static_cast<float>(a.classes - 1) * p_log_p(p.wrong);
      float mass = a.classes > 1 ? 1.0f : p.right;  // of a single class no other one makes up the rest
      if (by_label(a) && !role.counts && !role.shown) mass = not_a_number();  // the label is no class
      kl = entropy + mass * log_accurate(n.d2) - (p.wrong == 0.0f ? 0.0f : p.wrong * n.x_sum * s.inverse);
      if (more != 0.0f) kl -= more * x_label * s.inverse;
      g.b = scales.kl_grad * mass / n.d2;
      g.constant += scales.kl_grad * p.wrong;
      if (a.correct_share >= 0.0f) g.label = role.label, g.at_label += scales.kl_grad * more;
    } else if (kind == TeacherKind::probabilities) {
      if (leader) kl = n.gap + n.dt * log_accurate(n.d2);
      g.b = scales.kl_grad * n.dt / n.d2;
      g.k = scales.kl_grad;
    } else {
      const float share = reciprocal(n.dt);
      if (leader) kl = n.gap * share + log_accurate(n.d2 * share);
      g.b = scales.kl_grad * reciprocal(n.d2);
      g.k = scales.kl_grad * share;
    }
  }
  if (leader) {
    totals.ce += ce, totals.kl += kl;
    if (a.reduction == Reduction::none) {
      // A weight of 0 must not turn an infinite row of the other term into NaN.
      const float loss = s.ce_weight * ce + (kl == 0.0f ? 0.0f : s.alpha * s.temperature * s.temperature * kl);
      store(a.loss + row, loss);
    }
  }
  // A float16 gradient is enlarged before it is rounded; the factor is 1 otherwise.
  const float f = s.grad_scale;
  g.a *= f, g.b *= f, g.k *= f, g.constant *= f, g.per_weight *= f, g.per_share *= f, g.at_label *= f,
      g.at_label_b *= f;
  return g;
}

// Whether a row with these sums can teach, as it is stored: its largest entry is finite after rounding, and no entry is
// NaN. d1 is NaN where an entry is NaN or +inf, and 0 where all are -inf.
DLB_DEVICE bool is_finite(const DeviceArgs& a, const RowSums& n) {
  float top = n.top;
  if (a.teacher_dtype == DType::bf16) {
    Bf16 rounded;
    from_float(top, rounded);
    top = to_float(rounded);
  } else if (a.teacher_dtype == DType::f16) {
    F16 rounded;
    from_float(top, rounded);
    top = to_float(rounded);
  }
  return n.d1 > 0.0f && top - top == 0.0f;
}

// What belongs to a stored row beside its logits.
DLB_DEVICE void write_slot(const DeviceArgs& a, const BatchState& s, int slot, bool finite) {
  int64_t* const id = slots_of(a, s.written) + 1 + slot;
  store(id, a.ids != nullptr ? load(a.ids + s.start + slot) : unknown_id);
  store(id + a.capacity, int64_t(finite));
}

// For a row that takes no part: zeros, whatever it holds.
DLB_DEVICE void finish_idle_row(const DeviceArgs& a, int row, bool leader) {
  if (leader && a.reduction == Reduction::none) store(a.loss + row, 0.0f);
}

// Subtracts the label columns of a packet that starts at column `first`.
template <int V, bool general>
DLB_DEVICE void correct_labels(const RowGradient& g, int first, float* values) {
  if (static_cast<unsigned>(g.label - first) < static_cast<unsigned>(V)) {
    DLB_UNROLL for (int e = 0; e < V; ++e) values[e] -= first + e == g.label ? g.at_label : 0.0f;
  }
  if (general && static_cast<unsigned>(g.label_b - first) < static_cast<unsigned>(V)) {
    DLB_UNROLL for (int e = 0; e < V; ++e) values[e] -= first + e == g.label_b ? g.at_label_b : 0.0f;
  }
}

}  // namespace cuda
}  // namespace dlb_fast
