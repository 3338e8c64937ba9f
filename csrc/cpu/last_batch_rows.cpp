// The row kernels of the CPU. Compiled once per instruction set, with DLB_FAST_ISA naming the namespace and the flags
// choosing the vectors; the loops are plain C++ that the compiler vectorises.
//
// Per row: one read of the logits (and of the teacher), exponentials kept in a per-thread scratch of 4 C numbers, one
// write of the gradient, for which the row is not read again. The label's column is computed apart and rounded once.
#include "row_loops.h"

namespace dlb_fast {
namespace DLB_FAST_ISA {
namespace {

// Everything a gradient element is made of; null pointers and zeros where a term is absent.
template <typename A>
struct Gradient {
  RowCoefficients<A> at;
  A constant = 0;             // of a virtual teacher: kl_grad * (share of a wrong class)
  const A *e1 = nullptr, *e2 = nullptr, *et = nullptr, *weight = nullptr, *dense = nullptr;
  const A *kept_class = nullptr, *kept_kl = nullptr;  // of a top_k teacher: its classes, and the KL's gradient there
  int64_t kept = 0;
  A dense_scale = 0;
  int power = 0;              // e1 is e2 to this power, where e1 is not given
  int64_t label = -1, label_b = -1;
  A label_b_scale = 0;
};

template <typename A>
DLB_INLINE A power_of(A v, int power) {
  return power == 1 ? v : power == 2 ? raised<2>(v) : power == 3 ? raised<3>(v) : raised<4>(v);
}

// The two terms apart: each is a difference of near numbers, and their sum must not round before them.
template <typename A>
DLB_INLINE A ce_element(const Gradient<A>& g, int64_t c) {
  const A w = g.weight ? g.weight[c] : A(1);
  A ce = 0;
  if (g.e1) ce += g.at.a * g.e1[c];
  if (g.power) ce += g.at.a * power_of(g.e2[c], g.power);
  if (c == g.label) ce -= g.at.label;
  if (c == g.label_b) ce -= g.label_b_scale;
  if (g.at.s != 0) ce -= g.at.s * w;
  if (g.dense) ce -= g.dense_scale * g.dense[c] * w;
  return ce;
}

template <typename A>
DLB_INLINE A gradient_element(const Gradient<A>& g, int64_t c) {
  A kl = -g.constant;
  if (g.e2) kl += g.at.b * g.e2[c];
  if (g.et) kl -= g.at.k * g.et[c];
  return ce_element(g, c) + kl;
}

template <int power, typename T, typename A>
DLB_INLINE void write_powered(const Gradient<A>& g, int64_t n, A constant, T* out) {
  const A a = g.at.a, b = g.at.b, k = g.at.k;
  const A *e2 = g.e2, *et = g.et;
  if (!et) {
    return write_row<A>(n, out, [=](int64_t c) {
      const auto v = load<A>(e2 + c);
      return a * raised<power>(v) + b * v - constant;
    });
  }
  write_row<A>(n, out, [=](int64_t c) {
    const auto v = load<A>(e2 + c);
    return a * raised<power>(v) + (b * v - k * load<A>(et + c)) - constant;
  });
}

template <typename T, typename A>
DLB_INLINE void write_gradient(const Gradient<A>& g, int64_t n, T* out) {
  const A a = g.at.a, b = g.at.b, k = g.at.k, constant = g.constant + (g.weight ? A(0) : g.at.s);
  const A *e1 = g.e1, *e2 = g.e2, *et = g.et;
  const bool plain = !g.dense && (!g.weight || g.at.s == 0);
  if (plain && g.power == 1) {
    write_powered<1>(g, n, constant, out);
  } else if (plain && g.power == 2) {
    write_powered<2>(g, n, constant, out);
  } else if (plain && g.power == 3) {
    write_powered<3>(g, n, constant, out);
  } else if (plain && g.power == 4) {
    write_powered<4>(g, n, constant, out);
  } else if (plain && e1 && e2 && et) {
    write_row<A>(n, out, [=](int64_t c) {
      return a * load<A>(e1 + c) + (b * load<A>(e2 + c) - k * load<A>(et + c)) - constant;
    });
  } else if (plain && e1 && !e2) {
    write_row<A>(n, out, [=](int64_t c) { return a * load<A>(e1 + c) - constant; });
  } else if (plain && e1 && e2) {
    write_row<A>(n, out, [=](int64_t c) { return a * load<A>(e1 + c) + b * load<A>(e2 + c) - constant; });
  } else {
    for (int64_t c = 0; c < n; ++c) store(gradient_element(g, c), out + c);
  }
  if (g.label >= 0) store(gradient_element(g, g.label), out + g.label);
  if (g.label_b >= 0) store(gradient_element(g, g.label_b), out + g.label_b);
  for (int64_t j = 0; j < g.kept; ++j) {
    const auto c = static_cast<int64_t>(g.kept_class[j]);
    store(ce_element(g, c) + g.kept_kl[j], out + c);
  }
}

template <typename T, typename TT, typename A>
struct RowKernel {
  const PairJob& job;
  const LastBatchArgs& args;
  Scratch<A> scratch;
  Exponent<A> plain, tempered;
  int whole_temperature;  // 1 to 4, or 0

  explicit RowKernel(const PairJob& j)
      : job(j), args(*j.args), scratch(scratch_for<A>(j.args->classes)), plain(1.0), tempered(1.0 / j.temperature) {
    const double tau = j.temperature;
    whole_temperature = tau == 1 || tau == 2 || tau == 3 || tau == 4 ? static_cast<int>(tau) : 0;
  }

  const T* logits(int64_t row) const { return static_cast<const T*>(args.logits) + row * args.logits_stride; }

  void zero_gradient(int64_t row) const {
    if (!args.grad) return;
    T* out = static_cast<T*>(args.grad) + row * args.classes;
    for (int64_t c = 0; c < args.classes; ++c) store(A(0), out + c);
  }

  // The CE's share of the row: loss, coefficients and label of the gradient. `log_sum` is ln d1.
  void cross_entropy(int64_t row, const A* z, A m, double d1, const A* w, Gradient<A>& g) {
    const int64_t n = args.classes;
    const TermScales<double>& s = job.scales;
    const double log_sum = std::log(d1);
    double mass = 0, dot = 0, label_weight = 0;
    if (args.dense) {
      const A* q = static_cast<const A*>(args.dense) + row * args.dense_stride;
      for (int64_t c = 0; c < n; ++c) {
        const double share = static_cast<double>(q[c]) * (w ? static_cast<double>(w[c]) : 1.0);
        mass += share;
        if (share != 0) dot += share * static_cast<double>(z[c] - m);
      }
      g.dense = q;
    } else {
      g.label = args.target[row * args.target_stride];
      double share = 1.0;
      if (args.target_b) {
        g.label_b = args.target_b[row * args.target_b_stride];
        share = static_cast<const A*>(args.lam)[row * args.lam_stride];
        const double weight_b = (1.0 - share) * (w ? static_cast<double>(w[g.label_b]) : 1.0);
        mass += weight_b;
        dot += weight_b == 0 ? 0 : weight_b * static_cast<double>(z[g.label_b] - m);
        g.label_b_scale = static_cast<A>(s.ce * s.hard * weight_b * job.grad_scale);
      }
      label_weight = share * (w ? static_cast<double>(w[g.label]) : 1.0);
      mass += label_weight;
      dot += label_weight == 0 ? 0 : label_weight * static_cast<double>(z[g.label] - m);
    }
    mass *= s.hard;
    dot *= s.hard;
    if (s.even > 0) {
      mass += s.even * job.weight_sum;
      dot += s.even * weighted_sum(z, w, n, m);
    }
    job.ce[row] = mass * log_sum - dot;
    const RowCoefficients<double> r = ce_coefficients(s, mass, label_weight, d1);
    const double scale = job.grad_scale;
    g.at.a = static_cast<A>(r.a * scale);
    g.at.s = static_cast<A>(r.s * scale);
    g.at.label = static_cast<A>(r.label * scale);
    g.dense_scale = static_cast<A>(s.ce * s.hard * scale);
    g.weight = w;
  }

  void distillation(int64_t row, const Row<A>& of_row, Gradient<A>& g) {
    const int64_t n = args.classes;
    const A *z = of_row.v, m = of_row.max;
    const double scale = job.scales.kl_grad * job.grad_scale;
    if (args.kind == TeacherKind::virtual_teacher) {
      const bool corrected = args.correct_share >= 0;
      const double right = corrected ? args.correct_share : 1.0 / n;
      const double wrong = corrected ? (n > 1 ? (1.0 - right) / (n - 1) : 0.0) : right;
      const double d2 = exp_sum(of_row, tempered, scratch.e2);
      const int64_t y = corrected ? args.target[row * args.target_stride] : 0;
      const double x_right = static_cast<double>(z[y] - m) / job.temperature;
      const double x_all = wrong == 0 ? 0 : weighted_sum<A>(z, nullptr, n, m) / job.temperature;
      const double entropy =
          (right > 0 ? right * std::log(right) : 0) + (wrong > 0 ? (n - 1) * wrong * std::log(wrong) : 0);
      const double more = right - wrong, mass = n > 1 ? 1.0 : right;
      job.kl[row] = entropy + mass * std::log(d2) - wrong * x_all - (more == 0 ? 0 : more * x_right);
      g.at.b = static_cast<A>(scale * mass / d2);
      g.e2 = scratch.e2;
      g.constant = static_cast<A>(scale * wrong);
      if (corrected) {
        g.label = y;
        g.at.label = static_cast<A>(static_cast<double>(g.at.label) + scale * more);
      }
      return;
    }
    const A* t = load_row<A>(teacher(row), n, A(0), scratch.t).v;
    g.e2 = scratch.e2;
    const TeacherSums sums = probability_sums(of_row, t, n, tempered, 1.0 / job.temperature, scratch.e2);
    job.kl[row] = sums.gap + sums.teacher * std::log(sums.student);
    g.at.b = static_cast<A>(scale * sums.teacher / sums.student);
    g.at.k = static_cast<A>(scale);
    g.et = t;
  }

  const TT* teacher(int64_t row) const { return static_cast<const TT*>(job.teacher) + row * job.teacher_stride; }

  // Whether the log-sum-exp of a row is finite: nothing in it is NaN or +inf, and not all of it is -inf.
  bool finite(const TT* values, int64_t columns) const {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    int above = 0, wrong = 0;
#pragma omp simd reduction(| : above, wrong)
    for (int64_t c = 0; c < columns; ++c) {
      const A v = to_acc(values[c]);
      above |= v > -infinity;
      wrong |= !(v < infinity);
    }
    return above && !wrong;
  }

  // The KL to a teacher's logits; with a power also the sum that the CE needs.
  template <int power>
  double logit_distillation(int64_t row, const Row<A>& of_row, Gradient<A>& g) {
    const Row<A> t = load_row<A>(teacher(row), args.classes, nothing<A>, scratch.t);
    const double scale = job.scales.kl_grad * job.grad_scale;
    const TeacherSums sums = teacher_sums<power>(of_row, t, tempered, scratch.e2, scratch.t);
    const double of_teacher = 1.0 / sums.teacher;
    job.kl[row] = sums.gap * of_teacher / job.temperature + std::log(sums.student / sums.teacher);  // equal: exactly 0
    g.at.b = static_cast<A>(scale / sums.student);
    g.at.k = static_cast<A>(scale * of_teacher);
    g.e2 = scratch.e2;
    g.et = scratch.t;
    g.power = power;
    return sums.untempered;
  }

  double logit_distillation(int64_t row, int power, const Row<A>& of_row, Gradient<A>& g) {
    switch (power) {
      case 1: return logit_distillation<1>(row, of_row, g);
      case 2: return logit_distillation<2>(row, of_row, g);
      case 3: return logit_distillation<3>(row, of_row, g);
      case 4: return logit_distillation<4>(row, of_row, g);
      default: return logit_distillation<0>(row, of_row, g);
    }
  }

  // The KL to a teacher of k classes and one bucket for the others, whose classes the student's bucket holds as well;
  // with a power also the sum that the CE needs. The k classes are left out of e2 while the bucket is summed, and a
  // class that is given twice, or is none, makes the row NaN.
  template <int power>
  double top_k_distillation(const TT* packed, double& kl, const Row<A>& of_row, Gradient<A>& g) {
    const int64_t n = args.classes, k = args.kept;
    const A *values = packed, *index = packed + k, *z = of_row.v, m = of_row.max;
    const double inverse = 1.0 / job.temperature, infinity = std::numeric_limits<double>::infinity();
    A *e2 = scratch.e2, *student = scratch.t, *of_teacher = scratch.e1;
    double d1 = 0, d2 = exp_sum<power>(of_row, tempered, e2, &d1), kept = 0, mass = 0;
    A largest = values[0];
    bool usable = packed[2 * k] < infinity;
    for (int64_t j = 0; j < k; ++j) {
      usable = usable && index[j] >= 0 && index[j] < n && !std::signbit(e2[static_cast<int64_t>(index[j])]);
      if (!usable) break;
      A& e = e2[static_cast<int64_t>(index[j])];
      kept += student[j] = e;
      e = A(-0.0);
      largest = values[j] > largest ? values[j] : largest;
    }
    g.e2 = e2;
    g.power = power;
    if (!usable) {
      kl = g.at.b = std::numeric_limits<A>::quiet_NaN();
      return d1;
    }
    // A difference of near numbers has no digits left; the sum of the others has them all.
    double rest = k == n ? 0 : d2 - kept;
    if (k < n && !(rest > 0.5 * d2)) {
      rest = weighted_sum<A>(e2, nullptr, n, A(0));
      d2 = kept + rest;
    }
    const double of_d2 = 1.0 / d2, log_d2 = std::log(d2), scale = job.scales.kl_grad * job.grad_scale;
    // Where the temperature has changed, the k classes alone may have more than the stored log-sum-exp.
    for (int64_t j = 0; j < k; ++j) {
      of_teacher[j] = largest == -infinity ? A(0) : static_cast<A>(std::exp((values[j] - largest) * inverse));
      mass += of_teacher[j];
    }
    const double log_kept = largest * inverse + std::log(mass), stored = packed[2 * k];
    const double log_sum = k < n && stored > log_kept ? stored : log_kept;
    const double share = mass == 0 ? 0 : std::exp(log_kept - log_sum) / mass;
    const double p_rest = -std::expm1(log_kept - log_sum);
    double gap = 0;
    for (int64_t j = 0; j < k; ++j) {
      const auto c = static_cast<int64_t>(index[j]);
      const double p = of_teacher[j] * share;
      if (p != 0) gap += p * ((values[j] - (static_cast<double>(z[c]) - m)) * inverse - log_sum + log_d2);
      e2[c] = student[j];
      student[j] = static_cast<A>(scale * (student[j] * of_d2 - p));
    }
    g.kept_class = index;
    g.kept_kl = student;
    g.kept = k;
    double down = 1;  // of e2 for the other classes
    if (k < n && p_rest > 0 && rest < 1e-30) {  // too small for the exponentials: by their own maximum
      A* others = scratch.e1;
      for (int64_t c = 0; c < n; ++c) others[c] = z[c];
      for (int64_t j = 0; j < k; ++j) others[static_cast<int64_t>(index[j])] = nothing<A>;
      A top = others[0];
      for (int64_t c = 1; c < n; ++c) top = others[c] > top ? others[c] : top;
      if (top > -infinity) {
        rest = exp_sum(Row<A>{others, n, top}, tempered, e2);
        down = std::exp((static_cast<double>(top) - m) * inverse);
        gap -= p_rest * (static_cast<double>(top) - m) * inverse;
        g.power = 0;
      }
    }
    if (p_rest > 0) gap += p_rest * (std::log(p_rest) - std::log(rest) + log_d2);
    kl = gap;
    g.at.b = static_cast<A>(scale * (down * of_d2 - (rest > 0 ? p_rest / rest : 0)));
    return d1;
  }

  double top_k_distillation(int64_t row, int power, const Row<A>& of_row, Gradient<A>& g) {
    if constexpr (std::is_same_v<TT, A>) {  // as unpack_teacher has checked
      const TT* packed = teacher(row);
      switch (power) {
        case 1: return top_k_distillation<1>(packed, job.kl[row], of_row, g);
        case 2: return top_k_distillation<2>(packed, job.kl[row], of_row, g);
        case 3: return top_k_distillation<3>(packed, job.kl[row], of_row, g);
        case 4: return top_k_distillation<4>(packed, job.kl[row], of_row, g);
        default: return top_k_distillation<0>(packed, job.kl[row], of_row, g);
      }
    }
    return 0;
  }

  void compute(int64_t row, bool valid) {
    const int64_t n = args.classes;
    bool counts = args.dense != nullptr, labelled = counts;
    if (args.target) {
      counts = labelled = args.target[row * args.target_stride] != args.ignore_index;
      if (args.target_b) counts = counts && args.target_b[row * args.target_b_stride] != args.ignore_index;
    }
    if (!labelled && !valid) return zero_gradient(row);
    const Row<A> of_row = load_row<A>(logits(row), n, nothing<A>, scratch.z);
    if (labelled && !counts) {  // without its second label the row has no CE, but its first label may be right
      const A label = of_row.v[args.target[row * args.target_stride]];
      job.correct[row] = label >= of_row.max && exp_sum(of_row, plain, scratch.e1) >= 0;  // false where a logit is NaN
      if (!valid) return zero_gradient(row);
    }
    const A *z = of_row.v, m = of_row.max;
    Gradient<A> g;
    const A* w = static_cast<const A*>(args.weight);
    const bool by_logits = valid && args.kind == TeacherKind::logits;
    const bool by_top_k = valid && args.kind == TeacherKind::top_k;
    double d1 = 0;
    if (by_logits) d1 = logit_distillation(row, counts ? whole_temperature : 0, of_row, g);
    if (by_top_k) {
      d1 = top_k_distillation(row, counts ? whole_temperature : 0, of_row, g);
      if (!counts) g.e1 = g.e2;  // times 0, for the loops that have both
    }
    if (counts) {
      if (g.power == 0) {
        d1 = exp_sum(of_row, plain, scratch.e1);
        g.e1 = scratch.e1;
      }
      int64_t y = args.target ? args.target[row * args.target_stride] : 0;
      if (args.dense) {
        const A* q = static_cast<const A*>(args.dense) + row * args.dense_stride;
        for (int64_t c = 1; c < n; ++c) y = q[c] > q[y] ? c : y;
      }
      job.correct[row] = d1 == d1 && z[y] >= m;
      cross_entropy(row, z, m, d1, w, g);
    }
    if (valid && !by_logits && !by_top_k) distillation(row, of_row, g);
    // A buffer knows which of its rows are finite. Of a given teacher it shows here; the batch is then done once more.
    if (valid && job.teacher && !args.rows && !(std::fabs(job.kl[row]) <= std::numeric_limits<double>::max()))
      job.unusable[row] = !finite(teacher(row), args.kept ? 2 * args.kept + 1 : args.classes);
    if (args.grad) write_gradient(g, n, static_cast<T*>(args.grad) + row * n);
  }

  // Slot j takes row `row`, in the buffer's dtype.
  void keep(int64_t row, int64_t slot) const {
    const T* from = logits(row);
    TT* to = static_cast<TT*>(job.store) + slot * args.classes;
    if constexpr (std::is_same_v<T, TT>) {
      std::memcpy(to, from, args.classes * sizeof(T));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < args.classes; ++c) store(to_acc(from[c]), to + c);
    }
    job.finite[slot] = finite(to, args.classes);
  }
};

template <typename T, typename TT, typename A>
void pairs(const PairJob& job, int64_t begin, int64_t end) {
  RowKernel<T, TT, A> kernel(job);
  for (int64_t j = begin; j < end; ++j) {
    if (j < job.split) kernel.compute(j, j < job.valid_size && job.valid[j]);
    const int64_t second = job.split + j;
    if (second < job.args->batch) {
      if (j < job.stored) kernel.keep(second, j);
      kernel.compute(second, false);
    }
  }
}

template <typename T, typename A>
PairKernel for_teacher(DType teacher) {
  switch (teacher) {
    case DType::f32: return &pairs<T, float, A>;
    case DType::f64: return &pairs<T, double, A>;
    case DType::bf16: return &pairs<T, bf16, A>;
    default: return &pairs<T, f16, A>;
  }
}

template <typename T, typename A>
void scale(T* grad, const double* factors, bool per_row, int64_t n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const A factor = static_cast<A>(factors[per_row ? row : 0]);
    if (factor == A(1)) continue;
    T* values = grad + row * n;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) store(to_acc(values[c]) * factor, values + c);
  }
}

}  // namespace

PairKernel pair_kernel(DType dtype, DType teacher);
PairKernel pair_kernel(DType dtype, DType teacher) {
  switch (dtype) {
    case DType::f32: return for_teacher<float, float>(teacher);
    case DType::f64: return for_teacher<double, double>(teacher);
    case DType::bf16: return for_teacher<bf16, float>(teacher);
    default: return for_teacher<f16, float>(teacher);
  }
}

void scale_rows(void* grad, DType dtype, const double* factors, bool per_row, int64_t n, int64_t begin, int64_t end);
void scale_rows(void* grad, DType dtype, const double* factors, bool per_row, int64_t n, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::f32: return scale<float, float>(static_cast<float*>(grad), factors, per_row, n, begin, end);
    case DType::f64: return scale<double, double>(static_cast<double*>(grad), factors, per_row, n, begin, end);
    case DType::bf16: return scale<bf16, float>(static_cast<bf16*>(grad), factors, per_row, n, begin, end);
    default: return scale<f16, float>(static_cast<f16*>(grad), factors, per_row, n, begin, end);
  }
}

}  // namespace DLB_FAST_ISA
}  // namespace dlb_fast
