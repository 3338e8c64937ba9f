// The device functions of the kernels: threads, shuffles, barriers, clusters, memory. Two versions exist: this one for
// the GPU, and tests/emulation/emulated_device.h for the host compiler, which checks every access and every barrier.
// Kernels read and write global memory only through load, store, load_packet and store_packet, so that every access is
// checked.
#pragma once
#include <cstdint>

#include "../row_math.h"

#if defined(DLB_EMULATE)
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DLB_DEVICE __device__ __forceinline__
#define DLB_KERNEL __global__ void
#define DLB_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DLB_CONSTANT const __grid_constant__
#define DLB_SHARED(type, name) __shared__ type name
#define DLB_UNROLL _Pragma("unroll")
#define DLB_NO_UNROLL _Pragma("unroll 1")

namespace dlb_fast {
namespace cuda {

struct alignas(16) Packet {
  uint32_t word[4];
};
// Storage types as bits: torch compiles with -D__CUDA_NO_*_CONVERSIONS__, under which the vendor types do not convert.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

DLB_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DLB_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
DLB_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DLB_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }

constexpr unsigned all_lanes = 0xffffffffu;
DLB_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(all_lanes, value, mask); }
DLB_DEVICE float shuffle(float value, int lane) { return __shfl_sync(all_lanes, value, lane); }
DLB_DEVICE bool warp_any(bool value) { return __any_sync(all_lanes, value); }
DLB_DEVICE void sync_block() { __syncthreads(); }
DLB_DEVICE void fence() { __threadfence(); }
DLB_DEVICE uint32_t atomic_add(uint32_t* counter, uint32_t value) { return atomicAdd(counter, value); }

// Clusters exist from sm_90 on. Below, the cluster kernels are compiled to a trap and never launched. The reads of
// special registers are volatile: done where they are used, not kept in an ordinary register through the kernel.
DLB_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  __trap();
  return 0;
#endif
}
DLB_DEVICE int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  unsigned count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return static_cast<int>(count);
#else
  return 1;
#endif
}
DLB_DEVICE int cluster_index() {
#if __CUDA_ARCH__ >= 900
  unsigned index;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return static_cast<int>(index);
#else
  return 0;
#endif
}
DLB_DEVICE int clusters_in_grid() {
#if __CUDA_ARCH__ >= 900
  unsigned count;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return static_cast<int>(count);
#else
  return 1;
#endif
}
DLB_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// Whether every block of the cluster runs: said early, asked before the first write into another one's memory.
DLB_DEVICE void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;");
#endif
}
DLB_DEVICE void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// Writes N values to the place that `address` (in this block's shared memory) has in block `rank` of the cluster.
template <int N>
DLB_DEVICE void cluster_store(float* address, int rank, const float (&values)[N]) {
#if __CUDA_ARCH__ >= 900
  const uint32_t mine = static_cast<uint32_t>(__cvta_generic_to_shared(address));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(mine), "r"(rank));
  DLB_UNROLL for (int i = 0; i < N; ++i)
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote + 4 * i), "f"(values[i]) : "memory");
#endif
}

// The value, computed here: what follows from it is not hoisted out of the kernel's loop into a register of its own.
DLB_DEVICE int computed_here(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <typename X>
DLB_DEVICE X load(const X* p) {
  return *p;
}
template <typename X>
DLB_DEVICE void store(X* p, X value) {
  *p = value;
}
// Written by another block of this launch: past L1, which is not coherent.
DLB_DEVICE float load_other_block(const float* p) { return __ldcg(p); }
template <typename X>
DLB_DEVICE void shared_store(X* p, X value) {
  *p = value;
}
template <typename X>
DLB_DEVICE X shared_load(const X* p) {
  return *p;
}
// `once`: read-only for the launch and not needed again, so it need not evict what L1 holds.
DLB_DEVICE Packet load_packet(const void* p, bool once) {
  Packet r;
  if (once) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
        : "l"(p));
  } else {
    const uint4 v = *static_cast<const uint4*>(p);
    r.word[0] = v.x, r.word[1] = v.y, r.word[2] = v.z, r.word[3] = v.w;
  }
  return r;
}
// Read once, under a condition, otherwise `fill` in every word, without a branch: loads of several packets stay side by
// side and are all on their way before the first is waited for. In a block of its own each would wait for the one
// before.
DLB_DEVICE Packet load_packet_if(bool wanted, const void* p, uint32_t fill) {
  Packet r;
  r.word[0] = r.word[1] = r.word[2] = r.word[3] = fill;
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(r.word[0]), "+r"(r.word[1]), "+r"(r.word[2]), "+r"(r.word[3])
      : "l"(p), "r"(static_cast<uint32_t>(wanted)));
  return r;
}
// By name: from an assignment the compiler makes four stores of a word where it loses sight of the alignment.
DLB_DEVICE void store_packet(void* p, const Packet& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}

// Under a condition, without a branch.
DLB_DEVICE void store_packet_if(bool wanted, void* p, const Packet& v) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted st.global.v4.u32 [%0], {%1, %2, %3, %4};\n\t}" ::"l"(p),
      "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

// A hint that `bytes` from p on are wanted soon: into the second-level cache, by one instruction, without a register or
// a thread waiting. Whole 16-byte pieces; what is cut off at the end comes with its cache line. Nothing before sm_90.
DLB_DEVICE void prefetch(const void* p, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  const uint64_t at = __cvta_generic_to_global(p), begin = at & ~uint64_t(15);
  const uint32_t size = static_cast<uint32_t>(at + static_cast<uint64_t>(bytes) - begin) & ~15u;
  if (size > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(begin), "r"(size));
#endif
}

// The same for the cache line that p is in: each lane its own, where the instruction above takes one after the other.
DLB_DEVICE void prefetch_line(const void* p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
#endif
}

// A launch that the next one depends on says that this may begin; the next one then waits until all that the first
// wrote is there. Both do nothing in an ordinary launch and before sm_90.
DLB_DEVICE void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DLB_DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 2 ulp; results below 2^-126 become 0. -inf gives 0, NaN stays.
DLB_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DLB_DEVICE float log_accurate(float x) { return logf(x); }
// 1 ulp; of an x below 2^-126 or above 2^126: infinite or 0.
DLB_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DLB_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// sum + a * b, and the sum itself where a is 0, whatever b is: two instructions, where a selection takes three.
DLB_DEVICE float add_unless_zero(float a, float b, float sum) {
  asm("{\n\t.reg .pred counts;\n\tsetp.neu.f32 counts, %1, 0f00000000;\n\t@counts fma.rn.f32 %0, %1, %2, %0;\n\t}"
      : "+f"(sum)
      : "f"(a), "f"(b));
  return sum;
}
DLB_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DLB_DEVICE float infinity() { return __int_as_float(0x7f800000); }
DLB_DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }

DLB_DEVICE float to_float(float v) { return v; }
DLB_DEVICE float to_float(Bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
DLB_DEVICE float to_float(F16 v) { return __half2float(__ushort_as_half(v.bits)); }
DLB_DEVICE void from_float(float v, float& out) { out = v; }
DLB_DEVICE void from_float(float v, Bf16& out) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
DLB_DEVICE void from_float(float v, F16& out) { out.bits = __half_as_ushort(__float2half_rn(v)); }

// One 32-bit word holds two 16-bit elements or one float; `low` is the element at the lower address.
template <typename T>
DLB_DEVICE void unpack(uint32_t word, float* out);
template <>
DLB_DEVICE void unpack<float>(uint32_t word, float* out) {
  out[0] = __uint_as_float(word);
}
template <>
DLB_DEVICE void unpack<Bf16>(uint32_t word, float* out) {
  out[0] = __uint_as_float(word << 16);
  out[1] = __uint_as_float(word & 0xffff0000u);
}
template <>
DLB_DEVICE void unpack<F16>(uint32_t word, float* out) {
  const float2 v = __half22float2(__halves2half2(__ushort_as_half(static_cast<uint16_t>(word)),
                                                 __ushort_as_half(static_cast<uint16_t>(word >> 16))));
  out[0] = v.x, out[1] = v.y;
}
template <typename T>
DLB_DEVICE uint32_t pack(const float* in);
template <>
DLB_DEVICE uint32_t pack<float>(const float* in) {
  return __float_as_uint(in[0]);
}
template <>
DLB_DEVICE uint32_t pack<Bf16>(const float* in) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(in[0], in[1]);
  return __bfloat16_as_ushort(v.x) | static_cast<uint32_t>(__bfloat16_as_ushort(v.y)) << 16;
}
template <>
DLB_DEVICE uint32_t pack<F16>(const float* in) {
  const __half2 v = __floats2half2_rn(in[0], in[1]);
  return __half_as_ushort(__low2half(v)) | static_cast<uint32_t>(__half_as_ushort(__high2half(v))) << 16;
}

// The larger of two words, element by element.
template <typename T>
DLB_DEVICE uint32_t larger_word(uint32_t a, uint32_t b) {
  constexpr int n = 4 / static_cast<int>(sizeof(T));
  float x[n], y[n];
  unpack<T>(a, x), unpack<T>(b, y);
  DLB_UNROLL for (int i = 0; i < n; ++i) x[i] = maximum(x[i], y[i]);
  return pack<T>(x);
}
#if __CUDA_ARCH__ >= 800
template <>
DLB_DEVICE uint32_t larger_word<Bf16>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
template <>
DLB_DEVICE uint32_t larger_word<F16>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
#endif

}  // namespace cuda
}  // namespace dlb_fast
#endif
