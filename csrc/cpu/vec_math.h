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

// exp(x) for x <= 0, relative error below 1.5 ulp: x = (n + f) ln 2 with the two-part ln 2, a degree 6 polynomial in f,
// and 2^n put into the exponent. Below -87.3 the result is 0 (float32's smallest normal); NaN stays NaN.
DLB_INLINE float exp_nonpositive(float x) {
  constexpr float log2e = 1.44269504088896341f, round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860682030941723e-6f;
  const float clamped = x < -87.33654f ? -87.33654f : x;
  const float shifted = clamped * log2e + round;
  const float n = shifted - round;
  const float r = (clamped - n * ln2_high) - n * ln2_low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = (bit_cast<uint32_t>(shifted) - 0x4B400000u + 127u) << 23;  // NaN: any bits, times NaN
  const float e = p * bit_cast<float>(exponent);
  return x < -87.33654f ? 0.0f : e;
}
DLB_INLINE double exp_nonpositive(double x) { return std::exp(x); }

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
