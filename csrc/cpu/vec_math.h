// Vectors of whatever instruction set this file is compiled for: exp, 16-bit conversions, loads and stores.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define DLB_INLINE inline __attribute__((always_inline))

namespace dlb_fast {
namespace DLB_FAST_ISA {

template <typename To, typename From>
DLB_INLINE To bit_cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// What the loops over a row step by: the widest vector of floats that this instruction set has, or one double. Written
// as the compiler's generic vectors, because a loop over plain floats leaves up to a vector's worth of columns for one
// by one.
#if defined(__AVX512F__)
constexpr int float_lanes = 16;
#elif defined(__AVX2__)
constexpr int float_lanes = 8;
#else
constexpr int float_lanes = 4;
#endif
typedef float f32v __attribute__((vector_size(4 * float_lanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * float_lanes)));
typedef uint16_t u16v __attribute__((vector_size(2 * float_lanes)));

template <typename A>
struct Lanes {
  using V = f32v;
  static constexpr int64_t count = float_lanes;
};
template <>
struct Lanes<double> {
  using V = double;
  static constexpr int64_t count = 1;
};

DLB_INLINE double sum_of(double v) { return v; }
DLB_INLINE double max_of(double v) { return v; }

// By halves. Without the builtin (GCC before 12) through memory, where it waits for its own stores.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DLB_HALVES
#endif
#endif
template <typename F>
DLB_INLINE float folded(f32v v, const F& combine) {
#if defined(DLB_HALVES)
#if defined(__AVX512F__)
  const auto v8 = combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                          __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const auto v8 = v;
#endif
#if defined(__AVX2__)
  const auto v4 = combine(__builtin_shufflevector(v8, v8, 0, 1, 2, 3), __builtin_shufflevector(v8, v8, 4, 5, 6, 7));
#else
  const auto v4 = v8;
#endif
  const auto v2 = combine(v4, __builtin_shufflevector(v4, v4, 2, 3, 2, 3));
  return combine(v2[0], v2[1]);
#else
  float s[float_lanes];
  std::memcpy(s, &v, sizeof(s));
  for (int width = float_lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] = combine(s[i], s[i + width]);
  return s[0];
#endif
}
DLB_INLINE float sum_of(f32v v) {
  return folded(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
DLB_INLINE float max_of(f32v v) {
  return folded(v, [](auto a, auto b) __attribute__((always_inline)) { return b > a ? b : a; });
}

// exp(k d) for d <= 0 as exp_at(d, Exponent(k)). Relative error below 1.5 ulp of float32, exactly 1 at d = 0, exactly 0
// below 2^-126.5 and for -inf; NaN stays NaN.
template <typename A>
struct Exponent {
  A k;
  explicit Exponent(double factor) : k(factor) {}
};
template <>
struct Exponent<float> {
  float k, lowest;  // base 2; the largest d whose result is 0
  explicit Exponent(double factor) : k(static_cast<float>(factor * 1.4426950408889634)), lowest(-127.0f / k) {}
};

// 2^t = 2^n 2^f with n = round(t): adding 1.5 * 2^23 rounds to an integer and leaves it, with the exponent's bias, in
// the low bits; f = k d - n comes out of one fused operation without the rounding error of t. The polynomial is the
// minimax one of degree 6 over [-0.5, 0.5] through 1 at 0 (2e-9).
DLB_INLINE f32v exp_at(f32v d, const Exponent<float>& e) {
  constexpr float round = 12582912.0f + 127.0f;
  const f32v lowest = f32v{} + e.lowest;
  const f32v x = d < lowest ? lowest : d;
  const f32v shifted = x * e.k + round;
  const f32v f = x * e.k - (shifted - round);
  f32v p = f * 1.5353362e-4f + 1.3398875e-3f;
  p = p * f + 9.6184369e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * bit_cast<f32v>(bit_cast<u32v>(shifted) << 23);  // n = -127: the bits of 0
}
DLB_INLINE double exp_at(double d, const Exponent<double>& e) { return std::exp(d * e.k); }

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

DLB_INLINE float to_acc(float v) { return v; }
DLB_INLINE double to_acc(double v) { return v; }
DLB_INLINE float to_acc(bf16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }

// float16 bits, one per 32-bit lane or alone. Multiplying by 2^112 moves the exponent bias from 15 to 127 and
// normalises subnormals in the same step.
template <typename F, typename U>
DLB_INLINE F from_f16(U bits) {
  const U magnitude = (bits & 0x7FFFu) << 13, sign = (bits & 0x8000u) << 16;
  const U finite = bit_cast<U>(bit_cast<F>(magnitude) * bit_cast<float>(0x77800000u));
  const U special = magnitude | 0x7F800000u;
  return bit_cast<F>(sign | ((bits & 0x7C00u) == 0x7C00u ? special : finite));
}
DLB_INLINE float to_acc(f16 v) { return from_f16<float>(static_cast<uint32_t>(v.bits)); }

// Round to nearest, ties to even; NaN stays NaN, overflow becomes infinity.
template <typename U>
DLB_INLINE U to_bf16(U bits) {
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, nan = (bits & 0u) + 0x7FC0u;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded;
}
// Normal results: rebias by subtraction and round on the 13 dropped bits. Subnormal results: adding 0.5 makes the float
// adder round at 2^-24, float16's smallest step.
template <typename F, typename U>
DLB_INLINE U to_f16(U bits) {
  const U sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu, none = bits & 0u;
  const U odd = (magnitude >> 13) & 1u;
  const U normal = (magnitude - 0x38000000u + 0x0FFFu + odd) >> 13;
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3F000000u;
  U half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? none + 0x7C00u : half;
  half = magnitude > 0x7F800000u ? none + 0x7E00u : half;
  return sign | half;
}

DLB_INLINE void store(float v, float* out) { *out = v; }
DLB_INLINE void store(double v, double* out) { *out = v; }
DLB_INLINE void store(float v, bf16* out) { out->bits = static_cast<uint16_t>(to_bf16(bit_cast<uint32_t>(v))); }
DLB_INLINE void store(float v, f16* out) { out->bits = static_cast<uint16_t>(to_f16<float>(bit_cast<uint32_t>(v))); }
DLB_INLINE void store(double v, bf16* out) { store(static_cast<float>(v), out); }
DLB_INLINE void store(double v, f16* out) { store(static_cast<float>(v), out); }
DLB_INLINE void store(double v, float* out) { *out = static_cast<float>(v); }
DLB_INLINE void store(float v, double* out) { *out = v; }
DLB_INLINE void store(f32v v, float* out) { std::memcpy(out, &v, sizeof(v)); }
DLB_INLINE void store(f32v v, bf16* out) {
  const u16v half = __builtin_convertvector(to_bf16(bit_cast<u32v>(v)), u16v);
  std::memcpy(out, &half, sizeof(half));
}
DLB_INLINE void store(f32v v, f16* out) {
  const u16v half = __builtin_convertvector(to_f16<f32v>(bit_cast<u32v>(v)), u16v);
  std::memcpy(out, &half, sizeof(half));
}

// The next Lanes<A>::count elements of a row, in the compute dtype.
template <typename A, typename T>
DLB_INLINE typename Lanes<A>::V load(const T* p) {
  if constexpr (std::is_same_v<A, double>) {
    return to_acc(*p);
  } else if constexpr (std::is_same_v<T, float>) {
    f32v v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  } else if constexpr (std::is_same_v<T, double>) {
    f32v v;
    for (int i = 0; i < float_lanes; ++i) v[i] = static_cast<float>(p[i]);
    return v;
  } else {
    u16v half;
    std::memcpy(&half, p, sizeof(half));
    const u32v bits = __builtin_convertvector(half, u32v);
    if constexpr (std::is_same_v<T, bf16>) return bit_cast<f32v>(bits << 16);
    else return from_f16<f32v>(bits);
  }
}

}  // namespace DLB_FAST_ISA
}  // namespace dlb_fast
