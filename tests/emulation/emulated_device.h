// The words of csrc/cuda/device.cuh for the host compiler and the emulator. Same names, same meaning, every access checked.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "emulator.h"

#define DLB_DEVICE inline
#define DLB_KERNEL void
#define DLB_BOUNDS(threads, blocks)
#define DLB_CONSTANT const
#define DLB_SHARED(type, name) type& name = *static_cast<type*>(emulator::shared_memory(sizeof(type)))
#define DLB_UNROLL
#define DLB_NO_UNROLL

namespace dlb_fast {
namespace cuda {

struct alignas(16) Packet {
  uint32_t word[4];
};
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline int thread_index() { return emulator::here().thread; }
inline int block_threads() { return emulator::here().threads; }
inline int block_index() { return emulator::here().block; }
inline int grid_blocks() { return emulator::here().blocks; }
inline float shuffle_xor(float value, int mask) { return emulator::warp_exchange(mask, value); }
inline float shuffle(float value, int lane) { return emulator::warp_broadcast(lane, value); }
inline bool warp_any(bool value) { return emulator::warp_any(value); }
inline void sync_block() { emulator::sync_block(); }
inline void fence() { emulator::maybe_yield(); }
inline int cluster_rank() { return emulator::here().cluster_rank; }
inline int cluster_blocks() { return emulator::here().cluster_blocks; }
inline int cluster_index() { return block_index() / cluster_blocks(); }
inline int clusters_in_grid() { return grid_blocks() / cluster_blocks(); }
inline void arrive_in_cluster() {}
inline void wait_for_cluster() { emulator::sync_cluster(); }
inline void let_next_launch_begin() {}
inline void wait_for_launch_before() {}
inline void sync_cluster() { emulator::sync_cluster(); }
template <int N>
void cluster_store(float* address, int rank, const float (&values)[N]) {
  for (int i = 0; i < N; ++i) {
    emulator::maybe_yield();
    *emulator::address_in_cluster(address + i, rank) = values[i];
  }
}

inline int computed_here(int value) { return value; }

template <typename X>
X load(const X* p) {
  emulator::check_global(p, sizeof(X), alignof(X), false);
  return *p;
}
template <typename X>
void store(X* p, X value) {
  emulator::maybe_yield();
  emulator::check_global(p, sizeof(X), alignof(X), true);
  *p = value;
}
inline float load_other_block(const float* p) { return load(p); }
inline uint32_t atomic_add(uint32_t* counter, uint32_t value) {
  emulator::check_global(counter, sizeof *counter, alignof(uint32_t), true);
  const uint32_t before = *counter;
  *counter += value;
  return before;
}
template <typename X>
void shared_store(X* p, X value) {
  emulator::maybe_yield();
  emulator::check_shared(p, sizeof(X));
  *p = value;
}
template <typename X>
X shared_load(const X* p) {
  emulator::maybe_yield();
  emulator::check_shared(p, sizeof(X));
  return *p;
}
inline Packet load_packet(const void* p, bool once) {
  emulator::check_global(p, 16, 16, false);
  if (once) emulator::check_read_only(p, 16);
  Packet packet;
  std::memcpy(&packet, p, 16);
  return packet;
}
inline Packet load_packet_if(bool wanted, const void* p, uint32_t fill) {
  return wanted ? load_packet(p, true) : Packet{{fill, fill, fill, fill}};
}
inline void store_packet(void* p, const Packet& packet) {
  emulator::maybe_yield();
  emulator::check_global(p, 16, 16, true);
  std::memcpy(p, &packet, 16);
}

inline void store_packet_if(bool wanted, void* p, const Packet& packet) {
  if (wanted) store_packet(p, packet);
}

inline void prefetch_line(const void* p) { emulator::check_prefetch(p, 1); }
inline void prefetch(const void* p, int64_t bytes) { emulator::check_prefetch(p, static_cast<size_t>(bytes)); }

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;  // flushed, as by ex2.approx.ftz
}
inline float log_accurate(float x) { return std::log(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float add_unless_zero(float a, float b, float sum) { return a == 0.0f ? sum : std::fma(a, b, sum); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }

inline float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t as_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float to_float(float v) { return v; }
inline float to_float(Bf16 v) { return as_float(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(F16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
  return std::copysign(std::ldexp(static_cast<float>(fraction), -24), as_float(sign));
}
// Round to nearest, ties to even, as the hardware converts.
inline void from_float(float v, float& out) { out = v; }
inline void from_float(float v, Bf16& out) {
  const uint32_t bits = as_bits(v);
  out.bits = v != v ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float v, F16& out) {
  const uint16_t sign = static_cast<uint16_t>(as_bits(v) >> 16 & 0x8000);
  const float size = std::fabs(v);
  if (v != v) {
    out.bits = 0x7fff;
  } else if (size >= 65520.0f) {
    out.bits = sign | 0x7c00;
  } else if (size < std::ldexp(1.0f, -14)) {
    out.bits = sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  } else {
    const uint32_t bits = as_bits(size) - (112u << 23);
    out.bits = sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1)) >> 13);
  }
}

template <typename T>
void unpack(uint32_t word, float* out) {
  if constexpr (sizeof(T) == 4) {
    out[0] = as_float(word);
  } else {
    out[0] = to_float(T{static_cast<uint16_t>(word)});
    out[1] = to_float(T{static_cast<uint16_t>(word >> 16)});
  }
}
template <typename T>
uint32_t pack(const float* in) {
  if constexpr (sizeof(T) == 4) {
    return as_bits(in[0]);
  } else {
    T low, high;
    from_float(in[0], low);
    from_float(in[1], high);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
  }
}

template <typename T>
uint32_t larger_word(uint32_t a, uint32_t b) {
  constexpr int n = 4 / sizeof(T);
  float x[n], y[n];
  unpack<T>(a, x), unpack<T>(b, y);
  for (int i = 0; i < n; ++i) x[i] = std::fmax(x[i], y[i]);
  return pack<T>(x);
}

}  // namespace cuda
}  // namespace dlb_fast
