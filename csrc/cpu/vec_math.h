// exp and 16-bit conversions written so that the compiler vectorises them for whatever ISA this file is compiled for.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define DLB_INLINE inline __attribute__((always_inline))

namespace dlb_fast {
namespace DLB_FAST_ISA {

template <typename To, typename From>
DLB_INLINE To bit_cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
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

// 2^t = 2^n 2^f with n = round(t): adding 1.5 * 2^23 rounds to an integer and leaves it, with the exponent's bias, in the
// low bits; f = k d - n comes out of one fused operation without the rounding error of t. The polynomial is the
// minimax one of degree 6 over [-0.5, 0.5] through 1 at 0 (2e-9).
DLB_INLINE float exp_at(float d, const Exponent<float>& e) {
  constexpr float round = 12582912.0f + 127.0f;
  const float x = d < e.lowest ? e.lowest : d;
  const float shifted = x * e.k + round;
  const float f = x * e.k - (shifted - round);
  float p = 1.5353362e-4f;
  p = p * f + 1.3398875e-3f;
  p = p * f + 9.6184369e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);  // n = -127: the bits of 0
}
DLB_INLINE double exp_at(double d, const Exponent<double>& e) { return std::exp(d * e.k); }

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

DLB_INLINE float to_acc(float v) { return v; }
DLB_INLINE double to_acc(double v) { return v; }
DLB_INLINE float to_acc(bf16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
DLB_INLINE float to_acc(f16 v) {
  const uint32_t magnitude = (v.bits & 0x7FFFu) << 13, sign = (v.bits & 0x8000u) << 16;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals in the same step.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u));
  const uint32_t special = magnitude | 0x7F800000u;
  return bit_cast<float>(sign | ((v.bits & 0x7C00u) == 0x7C00u ? special : finite));
}

// Round to nearest, ties to even; NaN stays NaN, overflow becomes infinity.
DLB_INLINE void store(float v, float* out) { *out = v; }
DLB_INLINE void store(double v, double* out) { *out = v; }
DLB_INLINE void store(float v, bf16* out) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(v != v ? 0x7FC0u : rounded);
}
DLB_INLINE void store(float v, f16* out) {
  const uint32_t bits = bit_cast<uint32_t>(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  // Normal results: rebias by subtraction and round on the 13 dropped bits. Subnormal results: adding 0.5 makes the
  // float adder round at 2^-24, float16's smallest step.
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + odd) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  out->bits = static_cast<uint16_t>(sign | half);
}
DLB_INLINE void store(double v, bf16* out) { store(static_cast<float>(v), out); }
DLB_INLINE void store(double v, f16* out) { store(static_cast<float>(v), out); }
DLB_INLINE void store(double v, float* out) { *out = static_cast<float>(v); }
DLB_INLINE void store(float v, double* out) { *out = v; }

}  // namespace DLB_FAST_ISA
}  // namespace dlb_fast
