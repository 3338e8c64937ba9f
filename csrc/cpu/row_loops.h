// The passes over one row: conversion, maximum, sums of exponentials. Plain loops that the compiler vectorises; sums run in
// blocks of 1024 columns, added up in double: at C = 21843 their error is that of a short sum.
#pragma once
#include <cmath>
#include <cstdint>

#include "batch_plan.h"
#include "vec_math.h"

namespace dlb_fast {
namespace DLB_FAST_ISA {
namespace {

constexpr int64_t block = 1024;

template <typename A>
struct Scratch {
  A *z, *t, *e1, *e2;
};

template <typename A>
Scratch<A> scratch_for(int64_t classes) {
  const int64_t padded = (classes + 15) / 16 * 16;
  A* memory = static_cast<A*>(thread_scratch(4 * padded * static_cast<int64_t>(sizeof(A))));
  return {memory, memory + padded, memory + 2 * padded, memory + 3 * padded};
}

// The row in the compute dtype: itself when it already is, otherwise converted into the scratch.
DLB_INLINE const float* converted(const float* row, int64_t, float*) { return row; }
DLB_INLINE const double* converted(const double* row, int64_t, double*) { return row; }
template <typename T, typename A>
DLB_INLINE const A* converted(const T* row, int64_t n, A* out) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) out[c] = to_acc(row[c]);
  return out;
}

// Four streams, because one running maximum waits for itself.
template <typename A>
DLB_INLINE A maximum(const A* v, int64_t n) {
  const int64_t quarter = n / 4;
  const A *v1 = v + quarter, *v2 = v1 + quarter, *v3 = v2 + quarter;
  A m0 = v[0], m1 = m0, m2 = m0, m3 = m0;
#pragma omp simd reduction(max : m0, m1, m2, m3)
  for (int64_t c = 0; c < quarter; ++c) {
    m0 = v[c] > m0 ? v[c] : m0;
    m1 = v1[c] > m1 ? v1[c] : m1;
    m2 = v2[c] > m2 ? v2[c] : m2;
    m3 = v3[c] > m3 ? v3[c] : m3;
  }
  for (int64_t c = 4 * quarter; c < n; ++c) m0 = v[c] > m0 ? v[c] : m0;
  m0 = m1 > m0 ? m1 : m0;
  m2 = m3 > m2 ? m3 : m2;
  return m2 > m0 ? m2 : m0;
}

// e[c] = exp((v[c] - m) k), returns the sum.
template <typename A>
DLB_INLINE double exp_sum(const A* v, int64_t n, A m, const Exponent<A>& k, A* e) {
  double total = 0;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t stop = start + block < n ? start + block : n;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = start; c < stop; ++c) {
      const A value = exp_at(v[c] - m, k);
      e[c] = value;
      sum += value;
    }
    total += sum;
  }
  return total;
}

struct TeacherSums {
  double student = 0, teacher = 0, gap = 0, untempered = 0;
};

// v to the power of a small whole temperature: exp(x) = exp(x / tau)^tau without a second exponential.
template <int power, typename A>
DLB_INLINE A raised(A v) {
  if constexpr (power == 1) return v;
  else if constexpr (power % 2 == 0) return raised<power / 2>(v * v);
  else return v * raised<power - 1>(v);
}

// Student and teacher at one temperature in one pass: e2, et (over t) and the sums of row_math.h, gap without 1 / tau;
// with a power also the sum of exp(x).
template <int power, typename A>
DLB_INLINE TeacherSums teacher_sums(const A* z, const A* t, int64_t n, A mz, A mt, const Exponent<A>& k, A* e2, A* et) {
  TeacherSums sums;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t stop = start + block < n ? start + block : n;
    A student = 0, teacher = 0, gap = 0, untempered = 0;
#pragma omp simd reduction(+ : student, teacher, gap, untempered)
    for (int64_t c = start; c < stop; ++c) {
      const A x = z[c] - mz, y = t[c] - mt;
      const A es = exp_at(x, k), ep = exp_at(y, k);
      // A class without teacher mass costs nothing, also where the student's logit is -inf.
      const A term = ep == 0 ? A(0) : ep * (y - x);
      e2[c] = es;
      et[c] = ep;
      student += es;
      teacher += ep;
      gap += term;
      if constexpr (power > 0) untempered += raised<power>(es);
    }
    sums.student += student;
    sums.teacher += teacher;
    sums.gap += gap;
    sums.untempered += untempered;
  }
  return sums;
}

// Given probabilities p: student sum, mass and sum p (ln p - x / tau).
template <typename A>
TeacherSums probability_sums(const A* z, const A* p, int64_t n, A mz, double k, A* e2) {
  TeacherSums sums;
  sums.student = exp_sum(z, n, mz, Exponent<A>(k), e2);
  for (int64_t c = 0; c < n; ++c) {
    sums.teacher += p[c];
    if (p[c] != 0) sums.gap += p[c] * (std::log(static_cast<double>(p[c])) - static_cast<double>(z[c] - mz) * k);
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
