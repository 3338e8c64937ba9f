// The passes over one row: conversion, maximum, sums of exponentials. A row is first copied into the scratch and filled
// up to whole vectors there, so that no pass has columns left over: at 100 classes those took a fifth of the time. A
// long row that needs no conversion stays where it is, because there the copy would cost more. Sums run in short
// blocks, added up in double: at C = 21843 their error is that of a short sum.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "batch_plan.h"
#include "vec_math.h"

namespace dlb_fast {
namespace DLB_FAST_ISA {
namespace {

constexpr int64_t block = 64 * float_lanes;  // columns: 64 additions per lane
constexpr int64_t copied_below = 4096;  // columns

template <typename A>
struct Scratch {
  A *z, *t, *e1, *e2;
};

template <typename A>
Scratch<A> scratch_for(int64_t classes) {
  const int64_t padded = (classes + 15) / 16 * 16 + 16;  // load_row fills a vector's worth after the last column
  A* memory = static_cast<A*>(thread_scratch(4 * padded * static_cast<int64_t>(sizeof(A))));
  return {memory, memory + padded, memory + 2 * padded, memory + 3 * padded};
}

template <typename A>
DLB_INLINE typename Lanes<A>::V larger(typename Lanes<A>::V a, typename Lanes<A>::V b) {
  return a > b ? a : b;
}

// A row for the passes below: they read vectors up to `columns`, and of the last vector what is there.
template <typename A>
struct Row {
  const A* v;
  int64_t columns;
  A max;
};

// The maximum of n columns by vector_at(c), in four streams, because one waits for itself.
template <typename A, typename F>
DLB_INLINE A maximum(int64_t n, const F& vector_at) {
  using V = typename Lanes<A>::V;
  constexpr int64_t lanes = Lanes<A>::count;
  V m0 = vector_at(n - lanes), m1 = m0, m2 = m0, m3 = m0;  // the last vector may overlap the one before it
  int64_t c = 0;
  for (; c + 4 * lanes <= n; c += 4 * lanes) {
    m0 = larger<A>(vector_at(c), m0);
    m1 = larger<A>(vector_at(c + lanes), m1);
    m2 = larger<A>(vector_at(c + 2 * lanes), m2);
    m3 = larger<A>(vector_at(c + 3 * lanes), m3);
  }
  for (; c + lanes <= n; c += lanes) m0 = larger<A>(vector_at(c), m0);
  return max_of(larger<A>(larger<A>(m0, m1), larger<A>(m2, m3)));
}

// The row in the compute dtype, in `out` with `fill` in the columns up to a whole vector, or where it is.
template <typename A, typename T>
DLB_INLINE Row<A> load_row(const T* row, int64_t n, A fill, A* out) {
  using V = typename Lanes<A>::V;
  constexpr int64_t lanes = Lanes<A>::count;
  if constexpr (std::is_same_v<T, A>)
    if (n >= copied_below) return {row, n, maximum<A>(n, [=](int64_t c) { return load<A>(row + c); })};
  const int64_t columns = (n + lanes - 1) / lanes * lanes;
  store(V{} + fill, out + n);
  if (n < lanes) {
    A max = to_acc(row[0]);
    for (int64_t c = 0; c < n; ++c) {
      out[c] = to_acc(row[c]);
      max = out[c] > max ? out[c] : max;
    }
    return {out, columns, max};
  }
  return {out, columns, maximum<A>(n, [=](int64_t c) {
            const V v = load<A>(row + c);
            store(v, out + c);
            return v;
          })};
}

// The vector at the end of a row that has fewer columns left than it.
template <typename A>
DLB_INLINE typename Lanes<A>::V last_vector(const A* v, int64_t left, A fill) {
  A lanes[Lanes<A>::count];
  for (int64_t i = 0; i < Lanes<A>::count; ++i) lanes[i] = i < left ? v[i] : fill;
  return load<A>(lanes);
}

// out[c] = at(c) for n columns, by vectors; `at` may read up to the end of the last vector of a scratch row.
template <typename A, typename T, typename F>
DLB_INLINE void write_row(int64_t n, T* out, const F& at) {
  constexpr int64_t lanes = Lanes<A>::count;
  if (n < lanes) {
    T row[lanes];
    store(at(0), row);
    std::memcpy(out, row, n * sizeof(T));
    return;
  }
  for (int64_t c = 0; c + lanes <= n; c += lanes) store(at(c), out + c);
  if (n % lanes != 0) store(at(n - lanes), out + n - lanes);
}

// What a pass over logits sees past the end of a row: a class that has no share in any sum.
template <typename A>
constexpr A nothing = -std::numeric_limits<A>::infinity();

// v to the power of a small whole temperature: exp(x) = exp(x / tau)^tau without a second exponential.
template <int power, typename V>
DLB_INLINE V raised(V v) {
  if constexpr (power == 1) return v;
  else if constexpr (power % 2 == 0) return raised<power / 2>(v * v);
  else return v * raised<power - 1>(v);
}

// e[c] = exp((v[c] - max) k), returns the sum; with a power also adds up e^power. The exponent by value: behind a
// reference it would be read again after every store.
template <int power = 0, typename A>
DLB_INLINE double exp_sum(const Row<A>& row, Exponent<A> k, A* e, double* of_powers = nullptr) {
  using V = typename Lanes<A>::V;
  constexpr int64_t lanes = Lanes<A>::count;
  const A *v = row.v, m = row.max;
  double total = 0;
  for (int64_t start = 0; start < row.columns; start += block) {
    const int64_t stop = start + block < row.columns ? start + block : row.columns;
    V sum{}, powers{};
    const auto add = [&](int64_t c, V at) __attribute__((always_inline)) {
      const V value = exp_at(at - m, k);
      store(value, e + c);
      sum += value;
      if constexpr (power > 0) powers += raised<power>(value);
    };
    int64_t c = start;
    for (; c + lanes <= stop; c += lanes) add(c, load<A>(v + c));
    if (c < stop) add(c, last_vector(v + c, stop - c, nothing<A>));
    total += sum_of(sum);
    if constexpr (power > 0) *of_powers += sum_of(powers);
  }
  return total;
}

struct TeacherSums {
  double student = 0, teacher = 0, gap = 0, untempered = 0;
};

// Student and teacher at one temperature in one pass: e2, et (over t) and the sums of row_math.h, gap without 1 / tau;
// with a power also the sum of exp(x).
template <int power, typename A>
DLB_INLINE TeacherSums teacher_sums(const Row<A>& student_row, const Row<A>& teacher_row, Exponent<A> k, A* e2, A* et) {
  using V = typename Lanes<A>::V;
  constexpr int64_t lanes = Lanes<A>::count;
  const A *z = student_row.v, *t = teacher_row.v, mz = student_row.max, mt = teacher_row.max;
  const int64_t columns = student_row.columns < teacher_row.columns ? student_row.columns : teacher_row.columns;
  TeacherSums sums;
  for (int64_t start = 0; start < columns; start += block) {
    const int64_t stop = start + block < columns ? start + block : columns;
    V student{}, teacher{}, gap{}, untempered{};
    const auto add = [&](int64_t c, V student_at, V teacher_at) __attribute__((always_inline)) {
      const V x = student_at - mz, y = teacher_at - mt, none{};
      const V es = exp_at(x, k), ep = exp_at(y, k);
      store(es, e2 + c);
      store(ep, et + c);
      student += es;
      teacher += ep;
      // A class without teacher mass costs nothing, also where the student's logit is -inf.
      gap += ep == none ? none : ep * (y - x);
      if constexpr (power > 0) untempered += raised<power>(es);
    };
    int64_t c = start;
    for (; c + lanes <= stop; c += lanes) add(c, load<A>(z + c), load<A>(t + c));
    if (c < stop) add(c, last_vector(z + c, stop - c, nothing<A>), last_vector(t + c, stop - c, nothing<A>));
    sums.student += sum_of(student);
    sums.teacher += sum_of(teacher);
    sums.gap += sum_of(gap);
    if constexpr (power > 0) sums.untempered += sum_of(untempered);
  }
  return sums;
}

// Given probabilities p: student sum, mass and sum p (ln p - x / tau).
template <typename A>
TeacherSums probability_sums(const Row<A>& row, const A* p, int64_t n, const Exponent<A>& exponent, double k, A* e2) {
  TeacherSums sums;
  sums.student = exp_sum(row, exponent, e2);
  for (int64_t c = 0; c < n; ++c) {
    sums.teacher += p[c];
    if (p[c] != 0)
      sums.gap += p[c] * (std::log(static_cast<double>(p[c])) - static_cast<double>(row.v[c] - row.max) * k);
  }
  return sums;
}

template <typename A>
DLB_INLINE double weighted_sum(const A* z, const A* w, int64_t n, A mz) {
  double total = 0;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t stop = start + block < n ? start + block : n;
    A sum = 0;
    if (w) {
#pragma omp simd reduction(+ : sum)
      for (int64_t c = start; c < stop; ++c) sum += w[c] * (z[c] - mz);
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t c = start; c < stop; ++c) sum += z[c] - mz;
    }
    total += sum;
  }
  return total;
}

}  // namespace
}  // namespace DLB_FAST_ISA
}  // namespace dlb_fast
