// Executes PTX on the CPU: a warp at a time, 32 lanes in a vector, every memory access checked.
//
// Programs come decoded from program.py. A launch faults on: an access outside the registered arrays, the block's
// shared memory or its alignment; a write into an input; a read-only load of what the launch writes; a remote store
// into a block that has left; lanes that meet in different collectives; a deadlock; and a data race: two accesses to
// the same bytes by different threads, one of them a write, that no barrier and no release-acquire chain orders.
// Because races are found by order and not by luck, a launch without a fault gives the same result under every schedule
// of its threads, up to the order of its atomics, which is drawn at random.
//
// Not modelled: time, caches, the hardware's memory model beyond happens-before. ex2, rcp, lg2 and full-range division
// are off by what the PTX manual allows them to be, by a seeded function of their operands.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr int lanes_per_warp = 32;
constexpr uint32_t everybody = 0xffffffffu;
constexpr int resident_threads = 2048;  // of several blocks at a time, so that blocks meet blocks
constexpr uint32_t shared_base = 1024;  // address 0 is nobody's
constexpr uint32_t window = 1u << 24;   // a cluster's shared memories lie this far apart

struct Instruction {
  int32_t op, guard_kind, guard;  // kind 0: always, 1: where the predicate holds, 2: where it does not, 3: never
  int32_t r[6];                   // rows of registers; ~row: of constants
  int32_t size, count, width, flags;  // memory: bytes of an element, elements; bytes of a register, or of the result
  int64_t imm;
};
enum Flag { read_only = 1, with_sign = 2, where_true = 4, where_false = 8 };

struct Constant {
  uint64_t value;
  int32_t width, row;
};
struct Program {
  const Instruction* code;
  int32_t length, register_bytes, constant_bytes, shared_bytes, parameter_bytes, constants;
  const Constant* constant;
};
struct Range {
  uintptr_t begin, bytes;
  int32_t writable;
  const char* name;
  int32_t before;   // what the launch before may do to it still: 1 read, 2 write. Until this one waits for it.
  int32_t touched;  // what this launch has done to it
};
struct Launch {
  int32_t blocks, threads, cluster, ranges;
  uint64_t seed, card;  // who comes first; how the approximations err
  uint64_t steps;       // instructions of warps after which it has hung
  const unsigned char* parameters;
  Range* range;
  unsigned char* executed;  // per instruction
  uint64_t* issued;         // per instruction, by how many warps and how often
  // A mutant: where, and what stood there; noise: its results are noise where they differ from what they were.
  int32_t mutant, noise;
  const Instruction* original;
  uint32_t* orders;  // per instruction, of a barrier: how many pairs of accesses it orders that the lost one ordered
};
struct Counters {
  uint64_t loads16, stores16, loads, stores, bytes_loaded, bytes_stored, prefetched;
  // Instructions of warps; how often a mutant's differed in effect; of all bytes that could be written, at the end.
  uint64_t steps, infected, digest;
};

[[noreturn]] void fault(const std::string& what) { throw std::runtime_error(what); }

// When and by whom an access happened: a vector clock, of which barriers keep all but these entries equal.
struct Stamp {
  int32_t thread = -1;   // in the grid
  int32_t spread = 0;    // 1: also other lanes of its warp, 2: other warps of its block
  uint32_t in_block = 0, in_warp = 0;
  uint32_t arrived = 0, waited = 0;  // how often its warp had, of the cluster's barriers
  uint32_t segment = 0;  // how often it had released
  uint32_t gone = 0;     // how often it had passed the barrier that a mutant lacks
  int32_t instruction = -1;  // -2: of several, different ones
};
// Several accesses, whoever is ordered after all of them. Of one block each: the others' are a list.
struct Accesses {
  Stamp last;
  int32_t others = -1;
};
// Of the same bytes: who left them there, who has read them, and both for what they were before.
struct Cell {
  Accesses writes, reads, writes_before, reads_before;
  bool atomic = false, changed = false;
};
// Loads that race with a store of their own block: instruction and threads. What they load may be nobody's: a launch is
// repeated with noise in its place, and must end as it did.
struct Suspects {
  std::map<int32_t, std::set<int32_t>> threads;
  std::string first;  // in words
};

// What a release published: everything its thread had done, and what barriers had ordered before it.
struct Learnt {
  uint64_t place;  // address of a counter
  size_t count;    // how many of its releases are known
  bool strict;     // only those by a fence.sc
};
using Known = std::vector<Learnt>;
struct Release {
  Stamp by;
  Known known;  // transitively
  bool strict;
};

void learn(Known& known, const Known& more) {
  for (const Learnt& one : more) {
    bool found = false;
    for (Learnt& entry : known)
      if (entry.place == one.place && entry.strict == one.strict)
        entry.count = std::max(entry.count, one.count), found = true;
    if (!found) known.push_back(one);
  }
}

struct Shadow {
  std::vector<Cell> cells;
  int granule = 1;
};
struct Area {
  uintptr_t begin = 0, end = 0;
  bool writable = false;
  int32_t before = 0, touched = 0;
  std::string name;
  Shadow shadow;
};

struct Cluster;
struct Warp;
struct Block {
  Cluster* cluster;
  int index, rank;
  std::vector<unsigned char> shared;
  Shadow shadow;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Warp*> waiting;
  size_t running = 0;
  uint32_t epoch = 0;
  std::vector<int32_t> barriers;  // by epoch, the instruction that ended it
  Accesses remote;                // writes into its shared memory by other blocks
};
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Warp*> waiting;
  size_t arrived = 0;             // of the barrier at hand
  bool relaxed = false;           // one of them without a release
  uint32_t epoch = 0;
  std::vector<int32_t> barriers;
  Known known, learning;          // as of the last barrier; of those that have arrived since
};
struct Warp {
  Block* block;
  int index;
  unsigned char* registers;
  uint32_t pc[lanes_per_warp] = {};
  uint32_t alive = everybody, blocked = 0, epoch = 0, gone = 0;
  uint32_t arrived = 0, waited = 0;  // of the cluster's barriers
  bool again = false;                // the collective that it waits in is executed once more
  bool waited_for_launch = false;    // the one before
  std::vector<int32_t> barriers;     // by epoch, as a block's
  uint32_t segment[lanes_per_warp] = {};
  // Acquired; seen by an atomic, acquired by the next fence; seen by a thread of its block before a barrier: by the
  // next fence.sc, as the order of such fences agrees with everything else.
  Known known[lanes_per_warp], pending[lanes_per_warp], passed[lanes_per_warp];
  Stamp fenced[lanes_per_warp];
  Known fenced_known[lanes_per_warp];
  bool fenced_strict[lanes_per_warp] = {};
};

template <typename X>
X bits_to(uint64_t bits) {
  X x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float v) { return static_cast<uint32_t>(__builtin_bit_cast(uint32_t, v)); }
inline float float_of(uint32_t v) { return __builtin_bit_cast(float, v); }

uint64_t mixed(uint64_t x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdull, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ull;
  return x ^ x >> 33;
}

// A value off by at most `ulps` units of its float's last place, after its rounding: a function of the operands.
float off_by(double exact, double ulps, uint64_t operands, uint64_t seed) {
  if (!(std::fabs(exact) < 3.0e38) || exact == 0.0) return static_cast<float>(exact);
  const double share = static_cast<double>(mixed(operands * 0x9e3779b97f4a7c15ull + seed) >> 11) * 0x1p-53;
  // Half of the errors are as large as may be.
  const double error = share < 0.25 ? -1.0 : share < 0.5 ? 1.0 : 4.0 * share - 3.0;
  return static_cast<float>(exact + error * (ulps - 0.5) * std::ldexp(1.0, std::max(std::ilogb(exact), -126) - 23));
}
float flushed(float v) { return std::fabs(v) < std::numeric_limits<float>::min() ? std::copysign(0.0f, v) : v; }
float ex2_approximate(float x, uint64_t seed) {
  if (x == 0.0f || x != x || std::isinf(x)) return std::exp2(x);
  return flushed(off_by(std::exp2(static_cast<double>(x)), 2.0, bits_of(x), seed));
}
float rcp_approximate(float x, uint64_t seed) { return flushed(off_by(1.0 / flushed(x), 1.0, bits_of(x), seed + 1)); }
float lg2_approximate(float x, uint64_t seed) {
  const double exact = std::log2(static_cast<double>(flushed(x)));
  if (!std::isfinite(exact) || exact == 0.0) return static_cast<float>(exact);
  const double share = static_cast<double>(mixed(bits_of(x) + seed + 2) >> 11) * 0x1p-52 - 1.0;
  return static_cast<float>(exact + share * 0x1p-22 * 0.7 * (x > 0.5f && x < 2.0f ? 1.0 : std::fabs(exact)));
}
float div_full(float a, float b, uint64_t seed) {
  return off_by(static_cast<double>(a) / b, 2.0, uint64_t{bits_of(a)} << 32 | bits_of(b), seed + 3);
}
// The manual promises 20 bits: the operand's upper half, the result's upper half.
double rcp_double(double x, uint64_t seed) {
  uint64_t bits = bits_to<uint64_t>(__builtin_bit_cast(uint64_t, x)) & 0xffffffff00000000ull;
  const double y = 1.0 / __builtin_bit_cast(double, bits);
  bits = __builtin_bit_cast(uint64_t, y) & 0xffffffff00000000ull;
  if (std::isfinite(y) && y != 0.0 && mixed(bits + seed) & 1) bits += uint64_t{1} << 32;
  return __builtin_bit_cast(double, bits);
}

inline float fma_flushed(float a, float b, float c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); }
template <typename X>
inline X smaller(X a, X b) {
  return a != a ? b : b != b ? a : a < b ? a : b;
}
template <typename X>
inline X larger(X a, X b) {
  return a != a ? b : b != b ? a : a > b ? a : b;
}
template <typename X>
X quotient(X a, X b) {  // undefined by zero, as the manual has it
  if (b == 0) return static_cast<X>(-1);
  return std::is_signed_v<X> && b == static_cast<X>(-1) ? static_cast<X>(0 - static_cast<std::make_unsigned_t<X>>(a))
                                                        : static_cast<X>(a / b);
}
template <typename X>
X remainder_of(X a, X b) {
  if (b == 0) return a;
  return std::is_signed_v<X> && b == static_cast<X>(-1) ? X(0) : static_cast<X>(a % b);
}
template <typename X>
X shifted_left(X a, uint32_t n) {
  return n >= 8 * sizeof(X) ? X(0) : static_cast<X>(a << n);
}
template <typename X>
X shifted_right(X a, uint32_t n) {
  return n >= 8 * sizeof(X) ? (a < 0 ? static_cast<X>(-1) : X(0)) : static_cast<X>(a >> n);
}
template <typename I, typename F>
I truncated(F v) {
  if (v != v) return 0;
  if (v <= static_cast<F>(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
  if (v >= static_cast<F>(std::numeric_limits<I>::max())) return std::numeric_limits<I>::max();
  return static_cast<I>(v);
}
template <typename X>
X inserted(X a, X b, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (position >= 8 * sizeof(X)) return b;
  const X mask = static_cast<X>((length >= 8 * sizeof(X) ? ~X(0) : static_cast<X>((X(1) << length) - 1)) << position);
  return static_cast<X>((b & ~mask) | ((a << position) & mask));
}
inline uint32_t extracted(uint32_t a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (position >= 32) return 0;
  return (a >> position) & (length >= 32 ? ~0u : (1u << length) - 1);
}
inline uint16_t to_bf16(float v) {
  const uint32_t bits = bits_of(v);
  return v != v ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float of_bf16(uint16_t v) { return float_of(static_cast<uint32_t>(v) << 16); }
inline uint16_t to_f16(float v) { return v != v ? 0x7fff : __builtin_bit_cast(uint16_t, static_cast<_Float16>(v)); }
inline float of_f16(uint16_t v) { return static_cast<float>(__builtin_bit_cast(_Float16, v)); }

template <uint16_t (*to)(float), float (*of)(uint16_t)>
inline uint32_t larger_pair(uint32_t a, uint32_t b) {
  const auto one = [&](int shift) {
    return uint32_t{to(larger(of(static_cast<uint16_t>(a >> shift)), of(static_cast<uint16_t>(b >> shift))))};
  };
  return one(0) | one(16) << 16;
}

// name, what it does; x, y, z are the operands of a lane in this type.
// Handled by hand; the collectives stand together.
#define SPECIAL_OPERATIONS(X) \
  X(nop, ) X(exit_, ) X(bra, ) X(trap, ) X(special, ) X(ld_param, ) X(ld_global, ) X(st_global, ) X(ld_shared, ) \
  X(st_shared, ) X(st_cluster, ) X(atom_add_relaxed, ) X(atom_add_acq_rel, ) X(fence, ) X(prefetch, ) \
  X(launch_wait, ) X(gone, ) X(bar_sync, ) X(bar_warp, ) X(cluster_arrive, ) X(cluster_wait, ) X(shfl_bfly, ) \
  X(shfl_idx, ) X(vote_any, ) X(redux_add, ) X(redux_min, ) X(redux_max, ) X(st_matrix, ) X(ld_matrix, )
#define OPERATIONS_OF_LANES(X) \
  X(mov_pred, UN(bool, bool, x)) X(mov_b16, UN(uint16_t, uint16_t, x)) X(mov_b32, UN(uint32_t, uint32_t, x)) \
  X(mov_b64, UN(uint64_t, uint64_t, x)) \
  X(pack_b32, BI(uint16_t, uint32_t, x | uint32_t(y) << 16)) \
  X(pack_b64, BI(uint32_t, uint64_t, x | uint64_t(y) << 32)) \
  X(low_b32, UN(uint32_t, uint16_t, x)) X(high_b32, UN(uint32_t, uint16_t, x >> 16)) \
  X(low_b64, UN(uint64_t, uint32_t, x)) X(high_b64, UN(uint64_t, uint32_t, x >> 32)) \
  X(add_f32, BI(float, float, x + y)) X(sub_f32, BI(float, float, x - y)) X(mul_f32, BI(float, float, x * y)) \
  X(div_f32, BI(float, float, x / y)) X(fma_f32, TER(float, float, std::fma(x, y, z))) \
  X(fma_ftz_f32, TER(float, float, fma_flushed(x, y, z))) X(div_full_f32, BI(float, float, div_full(x, y, seed))) \
  X(rcp_f32, UN(float, float, 1.0f / x)) X(rcp_approx_f32, UN(float, float, rcp_approximate(x, seed))) \
  X(ex2_approx_f32, UN(float, float, ex2_approximate(x, seed))) \
  X(lg2_approx_f32, UN(float, float, lg2_approximate(x, seed))) \
  X(max_bf16x2, BI(uint32_t, uint32_t, (larger_pair<to_bf16, of_bf16>(x, y)))) \
  X(max_f16x2, BI(uint32_t, uint32_t, (larger_pair<to_f16, of_f16>(x, y)))) \
  X(min_f32, BI(float, float, smaller(x, y))) X(max_f32, BI(float, float, larger(x, y))) \
  X(neg_f32, UN(float, float, -x)) X(abs_f32, UN(float, float, std::fabs(x))) \
  X(abs_ftz_f32, UN(float, float, flushed(std::fabs(x)))) \
  X(abs_b16, UN(uint16_t, uint16_t, x & 0x7fff)) X(neg_b16, UN(uint16_t, uint16_t, x ^ 0x8000)) \
  X(add_f64, BI(double, double, x + y)) X(sub_f64, BI(double, double, x - y)) X(mul_f64, BI(double, double, x * y)) \
  X(div_f64, BI(double, double, x / y)) X(fma_f64, TER(double, double, std::fma(x, y, z))) \
  X(rcp_approx_f64, UN(double, double, rcp_double(x, seed))) \
  X(min_f64, BI(double, double, smaller(x, y))) X(max_f64, BI(double, double, larger(x, y))) \
  X(neg_f64, UN(double, double, -x)) X(abs_f64, UN(double, double, std::fabs(x))) \
  X(add_b16, BI(uint16_t, uint16_t, x + y)) X(add_b32, BI(uint32_t, uint32_t, x + y)) \
  X(add_b64, BI(uint64_t, uint64_t, x + y)) X(sub_b16, BI(uint16_t, uint16_t, x - y)) \
  X(sub_b32, BI(uint32_t, uint32_t, x - y)) X(sub_b64, BI(uint64_t, uint64_t, x - y)) \
  X(mul_b32, BI(uint32_t, uint32_t, x * y)) X(mul_b64, BI(uint64_t, uint64_t, x * y)) \
  X(mul_wide_s32, BI(int32_t, int64_t, int64_t(x) * y)) X(mul_wide_u32, BI(uint32_t, uint64_t, uint64_t(x) * y)) \
  X(mul_hi_u64, BI(uint64_t, uint64_t, static_cast<unsigned __int128>(x) * y >> 64)) \
  X(mul_hi_s64, BI(int64_t, int64_t, static_cast<__int128>(x) * y >> 64)) \
  X(mul_hi_s32, BI(int32_t, int32_t, int64_t(x) * y >> 32)) \
  X(mul_hi_u32, BI(uint32_t, uint32_t, uint64_t(x) * y >> 32)) \
  X(mad_b32, TER(uint32_t, uint32_t, x * y + z)) X(mad_b64, TER(uint64_t, uint64_t, x * y + z)) \
  X(mad_wide_s32, WIDE(int32_t, int64_t)) X(mad_wide_u32, WIDE(uint32_t, uint64_t)) \
  X(div_s32, BI(int32_t, int32_t, quotient(x, y))) X(div_u32, BI(uint32_t, uint32_t, quotient(x, y))) \
  X(div_s64, BI(int64_t, int64_t, quotient(x, y))) X(div_u64, BI(uint64_t, uint64_t, quotient(x, y))) \
  X(rem_s32, BI(int32_t, int32_t, remainder_of(x, y))) X(rem_u32, BI(uint32_t, uint32_t, remainder_of(x, y))) \
  X(rem_s64, BI(int64_t, int64_t, remainder_of(x, y))) X(rem_u64, BI(uint64_t, uint64_t, remainder_of(x, y))) \
  X(min_s32, BI(int32_t, int32_t, std::min(x, y))) X(max_s32, BI(int32_t, int32_t, std::max(x, y))) \
  X(min_u32, BI(uint32_t, uint32_t, std::min(x, y))) X(max_u32, BI(uint32_t, uint32_t, std::max(x, y))) \
  X(min_s64, BI(int64_t, int64_t, std::min(x, y))) X(max_s64, BI(int64_t, int64_t, std::max(x, y))) \
  X(min_u64, BI(uint64_t, uint64_t, std::min(x, y))) X(max_u64, BI(uint64_t, uint64_t, std::max(x, y))) \
  X(neg_s32, UN(uint32_t, uint32_t, 0 - x)) X(neg_s64, UN(uint64_t, uint64_t, 0 - x)) \
  X(abs_s32, UN(int32_t, int32_t, x < 0 ? 0 - uint32_t(x) : uint32_t(x))) \
  X(and_pred, BI(bool, bool, x & y)) X(or_pred, BI(bool, bool, x | y)) X(xor_pred, BI(bool, bool, x ^ y)) \
  X(not_pred, UN(bool, bool, !x)) \
  X(and_b16, BI(uint16_t, uint16_t, x & y)) X(or_b16, BI(uint16_t, uint16_t, x | y)) \
  X(xor_b16, BI(uint16_t, uint16_t, x ^ y)) X(not_b16, UN(uint16_t, uint16_t, ~x)) \
  X(and_b32, BI(uint32_t, uint32_t, x & y)) X(or_b32, BI(uint32_t, uint32_t, x | y)) \
  X(xor_b32, BI(uint32_t, uint32_t, x ^ y)) X(not_b32, UN(uint32_t, uint32_t, ~x)) \
  X(and_b64, BI(uint64_t, uint64_t, x & y)) X(or_b64, BI(uint64_t, uint64_t, x | y)) \
  X(xor_b64, BI(uint64_t, uint64_t, x ^ y)) X(not_b64, UN(uint64_t, uint64_t, ~x)) \
  X(shl_b16, SHIFT(uint16_t, shifted_left)) X(shl_b32, SHIFT(uint32_t, shifted_left)) \
  X(shl_b64, SHIFT(uint64_t, shifted_left)) X(shr_u16, SHIFT(uint16_t, shifted_right)) \
  X(shr_s16, SHIFT(int16_t, shifted_right)) X(shr_u32, SHIFT(uint32_t, shifted_right)) \
  X(shr_s32, SHIFT(int32_t, shifted_right)) X(shr_u64, SHIFT(uint64_t, shifted_right)) \
  X(shr_s64, SHIFT(int64_t, shifted_right)) \
  X(bfi_b32, INSERT(uint32_t)) X(bfi_b64, INSERT(uint64_t)) \
  X(bfe_u32, TER(uint32_t, uint32_t, extracted(x, y, z))) \
  X(selp_b16, SELECT(uint16_t)) X(selp_b32, SELECT(uint32_t)) X(selp_b64, SELECT(uint64_t)) \
  X(setp_f32, COMPARE(float, float, v)) X(setp_f64, COMPARE(double, double, v)) \
  X(setp_bf16, COMPARE(uint16_t, float, of_bf16(v))) X(setp_f16, COMPARE(uint16_t, float, of_f16(v))) \
  X(setp_s16, COMPARE(int16_t, int16_t, v)) X(setp_u16, COMPARE(uint16_t, uint16_t, v)) \
  X(setp_s32, COMPARE(int32_t, int32_t, v)) X(setp_u32, COMPARE(uint32_t, uint32_t, v)) \
  X(setp_s64, COMPARE(int64_t, int64_t, v)) X(setp_u64, COMPARE(uint64_t, uint64_t, v)) \
  X(cvt_s64_s32, UN(int32_t, int64_t, x)) X(cvt_u64_u32, UN(uint32_t, uint64_t, x)) \
  X(cvt_u64_u16, UN(uint16_t, uint64_t, x)) X(cvt_s64_s16, UN(int16_t, int64_t, x)) \
  X(cvt_u32_u64, UN(uint64_t, uint32_t, x)) X(cvt_u16_u64, UN(uint64_t, uint16_t, x)) \
  X(cvt_u32_u16, UN(uint16_t, uint32_t, x)) X(cvt_s32_s16, UN(int16_t, int32_t, x)) \
  X(cvt_u16_u32, UN(uint32_t, uint16_t, x)) \
  X(cvt_f32_s32, UN(int32_t, float, x)) X(cvt_f32_u32, UN(uint32_t, float, x)) X(cvt_f32_s64, UN(int64_t, float, x)) \
  X(cvt_f64_s32, UN(int32_t, double, x)) X(cvt_f64_u32, UN(uint32_t, double, x)) \
  X(cvt_f64_s64, UN(int64_t, double, x)) \
  X(cvt_rzi_s32_f32, UN(float, int32_t, truncated<int32_t>(x))) \
  X(cvt_rzi_s64_f32, UN(float, int64_t, truncated<int64_t>(x))) \
  X(cvt_rzi_s32_f64, UN(double, int32_t, truncated<int32_t>(x))) \
  X(cvt_rzi_s64_f64, UN(double, int64_t, truncated<int64_t>(x))) \
  X(cvt_f32_f64, UN(double, float, x)) X(cvt_f64_f32, UN(float, double, x)) \
  X(cvt_f32_f16, UN(uint16_t, float, of_f16(x))) X(cvt_f32_bf16, UN(uint16_t, float, of_bf16(x))) \
  X(cvt_bf16_f32, UN(float, uint16_t, to_bf16(x))) X(cvt_f16_f32, UN(float, uint16_t, to_f16(x))) \
  X(cvt_bf16x2_f32, BI(float, uint32_t, uint32_t(to_bf16(x)) << 16 | to_bf16(y))) \
  X(cvt_f16x2_f32, BI(float, uint32_t, uint32_t(to_f16(x)) << 16 | to_f16(y))) \
  X(mapa, BI(uint32_t, uint32_t, (x & (window - 1)) | (y + 1) << 24))
#define OPERATIONS(X) SPECIAL_OPERATIONS(X) OPERATIONS_OF_LANES(X)

enum Op {
#define NAME(name, body) op_##name,
  OPERATIONS(NAME)
#undef NAME
      op_count
};
constexpr int first_of_lanes = op_mov_pred;
const char* const op_names[] = {
#define NAME(name, body) #name,
    OPERATIONS(NAME)
#undef NAME
};
enum Comparison {
  cmp_eq,
  cmp_ne,
  cmp_lt,
  cmp_le,
  cmp_gt,
  cmp_ge,
  cmp_equ,
  cmp_neu,
  cmp_ltu,
  cmp_leu,
  cmp_gtu,
  cmp_geu,
  cmp_num,
  cmp_nan
};
enum Special { tid, ntid, ctaid, nctaid, laneid, cluster_rank, cluster_size, cluster_index, cluster_total };

template <typename F>
inline __attribute__((always_inline)) void lanes(uint32_t mask, F f) {
  if (mask == everybody) {
#pragma GCC ivdep
    for (int l = 0; l < lanes_per_warp; ++l) f(l);
  } else {
    for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}

template <typename X, typename C, typename Get>
inline void compare(bool* d, const X* a, const X* b, uint32_t mask, int64_t how, Get get) {
  const auto each = [&](auto test) {
    lanes(mask, [&](int l) {
      const C x = get(a[l]), y = get(b[l]);
      d[l] = test(x, y);
    });
  };
  switch (how) {
    case cmp_eq: return each([](C x, C y) { return x == y; });
    case cmp_ne: return each([](C x, C y) { return x < y || x > y; });
    case cmp_lt: return each([](C x, C y) { return x < y; });
    case cmp_le: return each([](C x, C y) { return x <= y; });
    case cmp_gt: return each([](C x, C y) { return x > y; });
    case cmp_ge: return each([](C x, C y) { return x >= y; });
    case cmp_equ: return each([](C x, C y) { return !(x < y || x > y); });
    case cmp_neu: return each([](C x, C y) { return !(x == y); });
    case cmp_ltu: return each([](C x, C y) { return !(x >= y); });
    case cmp_leu: return each([](C x, C y) { return !(x > y); });
    case cmp_gtu: return each([](C x, C y) { return !(x <= y); });
    case cmp_geu: return each([](C x, C y) { return !(x < y); });
    case cmp_num: return each([](C x, C y) { return x == x && y == y; });
    case cmp_nan: return each([](C x, C y) { return x != x || y != y; });
    default: fault("unknown comparison");
  }
}

class Machine {
 public:
  Machine(const Program& program, const Launch& launch, Counters& counters, const Suspects& noisy, Suspects& found)
      : program_(program), launch_(launch), counters_(counters), noisy_(noisy), found_(found), random_(launch.seed) {
    for (int i = 0; i < launch.ranges; ++i) {
      const Range& range = launch.range[i];
      Area area;
      area.begin = range.begin, area.end = range.begin + range.bytes, area.writable = range.writable != 0;
      area.name = range.name, area.before = range.before;
      area.shadow.granule = 2;
      if (area.writable) area.shadow.cells.resize((range.bytes + 1) / 2);
      areas_.push_back(std::move(area));
    }
    constants_.resize(static_cast<size_t>(program.constant_bytes) + 64);
    for (int i = 0; i < program.constants; ++i) {
      const Constant& c = program.constant[i];
      for (int l = 0; l < lanes_per_warp; ++l)
        std::memcpy(&constants_[static_cast<size_t>(c.row + l * c.width)], &c.value, static_cast<size_t>(c.width));
    }
  }

  void run() {
    if (launch_.blocks % launch_.cluster != 0) fault("grid is not a multiple of the cluster");
    if (launch_.threads % lanes_per_warp != 0) fault("a block is not made of whole warps");
    std::vector<int> order(static_cast<size_t>(launch_.blocks / launch_.cluster));
    releases_of_cluster_.resize(order.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    std::shuffle(order.begin(), order.end(), random_);
    const size_t together = static_cast<size_t>(std::max(1, resident_threads / (launch_.threads * launch_.cluster)));
    for (size_t begin = 0; begin < order.size(); begin += together) {
      clusters_.clear();
      used_registers_ = 0;
      unfinished_ = 0;
      for (size_t i = begin; i < std::min(order.size(), begin + together); ++i) start(order[i]);
      while (!runnable_.empty()) {
        std::swap(runnable_[random_() % runnable_.size()], runnable_.back());
        warp_ = runnable_.back();
        runnable_.pop_back();
        try {
          step();
        } catch (const std::runtime_error& error) {
          throw std::runtime_error(std::string(error.what()) + " (block " + std::to_string(warp_->block->index) +
                                   ", warp " + std::to_string(warp_->index) + ", instruction " + std::to_string(at_) +
                                   ")");
        }
      }
      if (unfinished_ > 0)
        fault("deadlock: " + std::to_string(unfinished_) + " warps wait for others that have left or wait elsewhere");
    }
    for (size_t i = 0; i < areas_.size(); ++i) launch_.range[i].touched |= areas_[i].touched;
  }

 private:
  const Program& program_;
  const Launch& launch_;
  Counters& counters_;
  const Suspects& noisy_;
  Suspects& found_;
  std::mt19937_64 random_;
  std::vector<Area> areas_;
  size_t last_area_ = 0;
  std::vector<unsigned char> constants_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<Warp*> runnable_;
  std::vector<std::vector<Stamp>> others_;
  std::vector<std::vector<char>> releases_of_cluster_;  // by epoch of its barrier: whether that orders memory
  std::unordered_map<uint64_t, std::vector<Release>> releases_;
  Warp* warp_ = nullptr;
  size_t unfinished_ = 0, used_registers_ = 0;
  uint32_t at_ = 0;
  bool peeking_ = false;  // what a mutant's load would have found: leaves no trace
  static std::vector<std::unique_ptr<unsigned char[]>> register_files_;
  static std::vector<size_t> register_bytes_;

  unsigned char* register_file() {
    const size_t bytes = static_cast<size_t>(program_.register_bytes) + 64;
    if (used_registers_ == register_files_.size()) register_files_.emplace_back(), register_bytes_.push_back(0);
    if (register_bytes_[used_registers_] < bytes) {
      register_files_[used_registers_].reset(new unsigned char[bytes]);
      register_bytes_[used_registers_] = bytes;
    }
    return register_files_[used_registers_++].get();
  }

  // What a mutant no longer writes is noise, and not what an earlier launch has left there.
  void forget(unsigned char* registers) {
    if (launch_.mutant < 0) return;
    const Instruction& i = program_.code[launch_.mutant];
    if (i.op == op_bra) {
      std::memset(registers, noise[0], static_cast<size_t>(program_.register_bytes));
    } else if (i.width > 0) {
      for (int k = 0; k < std::max(i.count, 1); ++k)
        if (i.r[k] >= 0) std::memset(registers + i.r[k], noise[0], static_cast<size_t>(i.width) * lanes_per_warp);
    }
  }

  void start(int index) {
    clusters_.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters_.back();
    for (int rank = 0; rank < launch_.cluster; ++rank) {
      cluster.blocks.push_back(std::make_unique<Block>());
      Block& block = *cluster.blocks.back();
      block.cluster = &cluster, block.rank = rank, block.index = index * launch_.cluster + rank;
      block.shared.assign(static_cast<size_t>(program_.shared_bytes), 0xff);  // NaN
      block.shadow.cells.resize(block.shared.size());
      block.running = static_cast<size_t>(launch_.threads / lanes_per_warp);
      for (int w = 0; w < launch_.threads / lanes_per_warp; ++w) {
        block.warps.push_back(std::make_unique<Warp>());
        Warp& warp = *block.warps.back();
        warp.block = &block, warp.index = w, warp.registers = register_file();
        forget(warp.registers);
        runnable_.push_back(&warp);
        ++unfinished_;
      }
    }
  }

  int thread_of(const Warp& warp, int lane) const {
    return warp.block->index * launch_.threads + warp.index * lanes_per_warp + lane;
  }
  int block_of(const Stamp& s) const { return s.thread / launch_.threads; }
  Stamp now(int lane) const {
    Stamp s;
    s.thread = thread_of(*warp_, lane), s.in_block = warp_->block->epoch, s.in_warp = warp_->epoch;
    s.arrived = warp_->arrived, s.waited = warp_->waited, s.segment = warp_->segment[lane], s.gone = warp_->gone;
    s.instruction = static_cast<int32_t>(at_);
    return s;
  }
  // The first barrier of a cluster, at or after the `arrived`-th, of which all arrivals released.
  uint32_t releasing(int cluster, uint32_t arrived) const {
    const std::vector<char>& releases = releases_of_cluster_[static_cast<size_t>(cluster)];
    while (arrived < releases.size() && !releases[arrived]) ++arrived;
    return arrived;
  }
  // Of the barriers between an access and a later one of the same block or cluster: none, or one that orders them.
  enum Order { none, by_program, by_block, by_warp, by_cluster };
  Order barrier_between(const Stamp& before, const Stamp& later) const {
    if (before.spread == 0 && before.thread == later.thread) return by_program;
    const int block = block_of(before), theirs = block_of(later);
    if (block == theirs) {
      if (before.in_block < later.in_block) return by_block;
      if (before.spread < 2 && before.thread / lanes_per_warp == later.thread / lanes_per_warp &&
          before.in_warp < later.in_warp)
        return by_warp;
    }
    const int cluster = block / launch_.cluster;
    if (cluster == theirs / launch_.cluster && before.arrived < later.waited &&
        releasing(cluster, before.arrived) < later.waited)
      return by_cluster;
    return none;
  }

  // Whether `before`, which was executed earlier, is ordered before what thread `me` does now.
  bool ordered(const Stamp& before, const Stamp& me, int lane) {
    if (before.thread < 0) return true;
    const Order order = barrier_between(before, me);
    if (order == none) return knows(warp_->known[lane], before);
    if (launch_.orders != nullptr && order != by_program && before.gone < me.gone) {
      // A mutant lacks a barrier between the two: which one orders them in its place?
      const std::vector<int32_t>& barriers = order == by_block  ? warp_->block->barriers
                                             : order == by_warp ? warp_->barriers
                                                                : warp_->block->cluster->barriers;
      const uint32_t epoch = order == by_block  ? before.in_block
                             : order == by_warp ? before.in_warp
                                                : releasing(block_of(me) / launch_.cluster, before.arrived);
      ++launch_.orders[barriers[epoch]];
    }
    return true;
  }
  bool ordered(const Accesses& before, const Stamp& me, int lane) {
    return unordered(before, me, lane).thread < 0;
  }
  // Of several accesses one that is not ordered before `me`.
  Stamp unordered(const Accesses& before, const Stamp& me, int lane) {
    if (!ordered(before.last, me, lane)) return before.last;
    if (before.others >= 0)
      for (const Stamp& one : others_[static_cast<size_t>(before.others)])
        if (!ordered(one, me, lane)) return one;
    return Stamp();
  }
  // Whether an atomic of this thread, or of one that it is ordered after, came after all others of that place so far:
  // then so does what this thread does next.
  bool observed(uint64_t place, int lane) {
    const size_t all = releases_[place].size();
    const auto in = [&](const Known& known) {
      return std::any_of(known.begin(), known.end(),
                         [&](const Learnt& one) { return one.place == place && one.count >= all; });
    };
    return all > 0 && (in(warp_->pending[lane]) || in(warp_->passed[lane]) || in(warp_->known[lane]));
  }
  bool knows(const Known& known, const Stamp& before) {
    for (const Learnt& learnt : known) {
      const std::vector<Release>& list = releases_[learnt.place];
      for (size_t i = 0; i < learnt.count; ++i) {
        if (learnt.strict && !list[i].strict) continue;
        const Stamp& by = list[i].by;
        if (by.thread < 0) continue;
        if (before.spread == 0 && by.thread == before.thread && before.segment < by.segment) return true;
        const Order order = barrier_between(before, by);
        if (order != none && order != by_program) return true;
        for (const Learnt& further : list[i].known)  // of this place, all that it knew stand in the list themselves
          if (further.place != learnt.place && knows({further}, before)) return true;
      }
    }
    return false;
  }

  // Adds an access to others of the same kind. Whatever is ordered after the sum is ordered after each of them.
  void add(Accesses& sum, const Stamp& me) {
    Stamp* of_block = &sum.last;
    if (sum.last.thread >= 0 && block_of(sum.last) != block_of(me)) {
      if (sum.others < 0) sum.others = static_cast<int32_t>(others_.size()), others_.emplace_back();
      std::vector<Stamp>& others = others_[static_cast<size_t>(sum.others)];
      const auto found =
          std::find_if(others.begin(), others.end(), [&](const Stamp& s) { return block_of(s) == block_of(me); });
      if (found == others.end()) {
        others.push_back(me);
        return;
      }
      of_block = &*found;
    }
    Stamp& last = *of_block;
    if (last.thread < 0 || barrier_between(last, me) != none) {
      last = me;
      return;
    }
    const bool one_warp = last.spread < 2 && last.thread / lanes_per_warp == me.thread / lanes_per_warp;
    const Stamp earlier = last;
    last = me, last.spread = one_warp ? 1 : 2;
    if (earlier.instruction != me.instruction) last.instruction = -2;
    last.in_block = std::max(last.in_block, earlier.in_block), last.in_warp = std::max(last.in_warp, earlier.in_warp);
    last.arrived = std::max(last.arrived, earlier.arrived), last.gone = std::max(last.gone, earlier.gone);
  }

  std::string who(const Stamp& s) const {
    return "block " + std::to_string(block_of(s)) + " thread " + std::to_string(s.thread % launch_.threads);
  }
  std::string race(const char* first, const char* second, const Stamp& before, const Stamp& me,
                   const std::string& where) const {
    return std::string("race: ") + second + " of " + where + " by " + who(me) + " is not ordered after the " + first +
           " by " + who(before) + " (instruction " + std::to_string(before.instruction) + ")";
  }
  // `read` by one thread and `write` by another of its block, unordered.
  void suspect(const Stamp& read, const Stamp& write, const std::string& words) {
    if (read.instruction < 0 || block_of(read) != block_of(write)) fault(words);
    if (found_.first.empty()) found_.first = words + " (instruction " + std::to_string(at_) + ")";
    const int reach = read.spread == 0 ? 1 : read.spread == 1 ? lanes_per_warp : launch_.threads;
    const int first = read.thread / reach * reach;
    for (int thread = first; thread < first + reach; ++thread)
      if (thread != write.thread) found_.threads[read.instruction].insert(thread);
  }

  // The rules by which a launch without a fault has one result. By induction over what each thread reads: where a
  // location's bytes change, the write is ordered after every earlier access of it; a write of the bytes that are there
  // is ordered after everything that met other bytes; a read is ordered after all who wrote what it finds, unless it
  // stood there before the launch. Then no other schedule can put other bytes in front of a read.
  void note_read(Cell& cell, const Stamp& me, int lane, const std::string& where, size_t byte, uint64_t place = 0) {
    if (cell.changed && !(cell.atomic && observed(place, lane)))
      if (const Stamp write = unordered(cell.writes, me, lane); write.thread >= 0)
        suspect(me, write, race("write", "read", write, me, where + " at byte " + std::to_string(byte)));
    add(cell.reads, me);
  }
  void note_write(Cell& cell, const Stamp& me, int lane, bool atomic, const std::string& where, size_t byte,
                  bool same, uint64_t place = 0, bool strict = false) {
    const bool joins = same || (atomic && cell.atomic);  // atomics are ordered among themselves
    const auto check = [&](const Accesses& before, const char* kind) {
      const Stamp one = unordered(before, me, lane);
      if (one.thread < 0 || (cell.atomic && !joins && &before == &cell.writes && observed(place, lane))) return;
      const std::string words = race(kind, "write", one, me, where + " at byte " + std::to_string(byte));
      if (kind[0] == 'w') fault(words);
      suspect(one, me, words);
    };
    if (atomic || !same || strict) check(cell.reads, "read");
    if (joins) {
      // Scratch holds the same bytes by chance, unless the threads of one store share a part of a layout.
      if (const Stamp one = strict ? unordered(cell.writes, me, lane) : Stamp();
          one.thread >= 0 && one.instruction != me.instruction)
        fault(race("write", "write", one, me, where + " at byte " + std::to_string(byte)));
      check(cell.writes_before, "write"), check(cell.reads_before, "read");
    } else {
      check(cell.writes, "write");
      cell.writes_before = cell.writes, cell.reads_before = cell.reads;
      cell.writes = Accesses(), cell.reads = Accesses();
    }
    add(cell.writes, me);
    cell.atomic = atomic && (joins ? cell.atomic || !cell.changed : true);
    cell.changed |= atomic || !same;
  }

  Area& area_of(uintptr_t at, size_t bytes, bool write) {
    const char* verb = write ? "write" : "read";
    if (at % bytes != 0) fault(std::string("misaligned ") + verb + " of " + std::to_string(bytes) + " bytes");
    const auto holds = [&](const Area& area) {
      return at >= area.begin && at + bytes <= area.end && (!write || area.writable);
    };
    if (last_area_ < areas_.size() && holds(areas_[last_area_])) return areas_[last_area_];
    for (size_t i = 0; i < areas_.size(); ++i)
      if (holds(areas_[i])) return areas_[last_area_ = i];
    for (const Area& area : areas_) {
      if (write && at >= area.begin && at + bytes <= area.end) fault("write into the input " + area.name);
      if (at + 4096 >= area.begin && at < area.end + 4096)
        fault(std::string("out of bounds ") + verb + " at byte " +
              std::to_string(static_cast<int64_t>(at - area.begin)) + " of " + area.name + " (" +
              std::to_string(area.end - area.begin) + " bytes)");
    }
    fault(std::string("out of bounds ") + verb + ", far from every array");
  }

  // The bytes behind a global address, after all checks. `value`: what will be written.
  unsigned char* global(uintptr_t at, size_t bytes, int lane, bool write, bool once, const unsigned char* value,
                        bool atomic = false) {
    Area& area = area_of(at, bytes, write);
    if (once)
      for (const Area& other : areas_)
        if (other.writable && at < other.end && at + bytes > other.begin)
          fault("load through the read-only path from " + other.name + ", which the launch writes");
    if (!warp_->waited_for_launch && (area.before & (write ? 3 : 2)) != 0)
      fault("access of " + area.name + ", which the launch before may still " +
            ((area.before & 2) != 0 ? "write" : "read"));
    unsigned char* const p = reinterpret_cast<unsigned char*>(at);
    if (peeking_) return p;
    area.touched |= write ? 2 : 1;
    if (area.writable) {
      const Stamp me = now(lane);
      const size_t first = at - area.begin;
      for (size_t byte = first; byte < first + bytes; byte += 2) {
        Cell& cell = area.shadow.cells[byte / 2];
        const size_t wide = std::min<size_t>(2, first + bytes - byte), from = byte - first;
        // A batch that is shown again writes its ids once more: the same bytes.
        if (write) note_write(cell, me, lane, atomic, area.name, byte,
                              !atomic && std::memcmp(p + from, value + from, wide) == 0, at);
        else note_read(cell, me, lane, area.name, byte, at);
      }
    }
    (write ? (bytes == 16 ? counters_.stores16 : counters_.stores)
           : (bytes == 16 ? counters_.loads16 : counters_.loads)) += 1;
    (write ? counters_.bytes_stored : counters_.bytes_loaded) += bytes;
    return p;
  }

  unsigned char* shared(Block& block, uint32_t at, size_t bytes, int lane, bool write, const unsigned char* value) {
    if (at % bytes != 0) fault("misaligned access of shared memory");
    if (at < shared_base || at + bytes > shared_base + block.shared.size())
      fault("access outside the block's shared memory, at byte " +
            std::to_string(static_cast<int64_t>(at) - shared_base) + " of " + std::to_string(block.shared.size()));
    const size_t first = at - shared_base;
    const Stamp me = now(lane);
    for (size_t byte = first; byte < first + bytes; ++byte) {
      Cell& cell = block.shadow.cells[byte];
      // Threads that hold the same part of a layout write the same. What was there before anybody is not the same.
      if (write) note_write(cell, me, lane, false, "shared memory", byte,
                            cell.changed && block.shared[byte] == value[byte - first], 0, true);
      else if (!cell.changed)
        fault("read of shared memory that nobody has written, at byte " + std::to_string(byte));
      else if (!peeking_) note_read(cell, me, lane, "shared memory", byte);
    }
    return block.shared.data() + first;
  }

  template <typename X>
  X* row(int32_t r) {
    return reinterpret_cast<X*>(r >= 0 ? warp_->registers + r : constants_.data() + ~r);
  }
  // A bit per lane of a predicate; lanes that never wrote it may hold anything.
  uint32_t truth(int32_t r) {
    const unsigned char* const p = row<unsigned char>(r);
    uint32_t holds = 0;
    for (int l = 0; l < lanes_per_warp; ++l) holds |= static_cast<uint32_t>(p[l] != 0) << l;
    return holds;
  }
  uint64_t lane_value(int32_t r, int width, int lane) {
    uint64_t v = 0;
    std::memcpy(&v, row<unsigned char>(r) + lane * width, static_cast<size_t>(width));
    return v;
  }
  void set_lane(int32_t r, int width, int lane, const unsigned char* bytes, int size, bool sign = false) {
    uint64_t v = 0;
    std::memcpy(&v, bytes, static_cast<size_t>(size));
    if (sign && size < 8 && v >> (8 * size - 1) != 0) v |= ~uint64_t{0} << 8 * size;
    std::memcpy(row<unsigned char>(r) + lane * width, &v, static_cast<size_t>(width));
  }

  void learn_pending(int lane) {
    learn(warp_->known[lane], warp_->pending[lane]);
  }
  void atomic_add(const Instruction& i, int lane, bool acq_rel) {
    const size_t bytes = static_cast<size_t>(i.size);
    const uintptr_t at = static_cast<uintptr_t>(lane_value(i.r[4], 8, lane) + static_cast<uint64_t>(i.imm));
    unsigned char* const p = global(at, bytes, lane, true, false, nullptr, true);
    uint64_t before = 0;
    std::memcpy(&before, p, bytes);
    const uint64_t after = before + lane_value(i.r[1], i.size, lane);
    std::memcpy(p, &after, bytes);
    set_lane(i.r[0], i.size, lane, reinterpret_cast<unsigned char*>(&before), i.size);
    std::vector<Release>& list = releases_[at];
    const Known seen = {{at, list.size() + 1, false}};
    if (acq_rel) {
      ++warp_->segment[lane];
      list.push_back({now(lane), warp_->known[lane], false});
      learn(warp_->known[lane], seen);
    } else {
      // Without a fence before it, it publishes nothing but itself.
      list.push_back({warp_->fenced[lane], warp_->fenced_known[lane], warp_->fenced_strict[lane]});
      learn(warp_->pending[lane], seen);
    }
  }

  // What one thread has acquired, or will have by a fence.sc, all threads have behind the barrier.
  void share_known(const std::vector<Warp*>& warps) {
    Known known, passed;
    for (Warp* w : warps) gather(*w, known, passed);
    if (known.empty() && passed.empty()) return;
    for (Warp* w : warps)
      for (int l = 0; l < lanes_per_warp; ++l) w->known[l] = known, w->passed[l] = passed;
  }
  static void gather(Warp& w, Known& known, Known& passed) {
    for (int l = 0; l < lanes_per_warp; ++l) {
      learn(known, w.known[l]), learn(passed, w.passed[l]);
      for (Learnt one : w.pending[l]) one.strict = true, learn(passed, {one});
    }
  }

  // A collective of all lanes. True: the warp goes on; false: it waits.
  bool collective(const Instruction& i) {
    if (i.op != op_bar_sync && i.op != op_cluster_arrive && i.op != op_cluster_wait && i.op < op_st_matrix) {
      const uint32_t* const named = row<uint32_t>(i.r[4]);
      for (int l = 0; l < lanes_per_warp; ++l)
        if (named[l] != everybody) fault("a collective that does not name all lanes");
    }
    switch (i.op) {
      case op_shfl_bfly:
      case op_shfl_idx: {
        uint32_t from[lanes_per_warp];
        std::memcpy(from, row<uint32_t>(i.r[1]), sizeof from);
        const uint32_t *const mask = row<uint32_t>(i.r[2]), *const clamp = row<uint32_t>(i.r[3]);
        for (int l = 0; l < lanes_per_warp; ++l)
          if (clamp[l] != 31) fault("an exchange within parts of a warp");
        if (i.imm != no_register) std::memset(row<bool>(static_cast<int32_t>(i.imm)), 1, lanes_per_warp);
        uint32_t* const d = row<uint32_t>(i.r[0]);
        for (int l = 0; l < lanes_per_warp; ++l)
          d[l] = from[(i.op == op_shfl_idx ? mask[l] : static_cast<uint32_t>(l) ^ mask[l]) & 31];
        break;
      }
      case op_vote_any: {
        const bool any = truth(i.r[1]) != 0;
        bool* const d = row<bool>(i.r[0]);
        for (int l = 0; l < lanes_per_warp; ++l) d[l] = any;
        break;
      }
      case op_redux_add:
      case op_redux_min:
      case op_redux_max: {
        const int32_t* const v = row<int32_t>(i.r[1]);
        uint32_t sum = 0;
        int32_t least = v[0], most = v[0];
        for (int l = 0; l < lanes_per_warp; ++l)
          sum += static_cast<uint32_t>(v[l]), least = std::min(least, v[l]), most = std::max(most, v[l]);
        uint32_t* const d = row<uint32_t>(i.r[0]);
        for (int l = 0; l < lanes_per_warp; ++l)
          d[l] = i.op == op_redux_add ? sum : static_cast<uint32_t>(i.op == op_redux_min ? least : most);
        break;
      }
      case op_st_matrix:
      case op_ld_matrix:  // lane 8 m + r names row r of matrix m; lane 4 r + j holds elements 2 j and 2 j + 1 of it
        for (int m = 0; m < i.count; ++m) {
          for (int l = 0; l < lanes_per_warp; ++l) {
            const uint64_t at = lane_value(i.r[4], i.r[5], 8 * m + l / 4) + static_cast<uint64_t>(i.imm);
            if (at % 16 != 0) fault("misaligned access of shared memory");
            uint32_t& value = row<uint32_t>(i.r[m])[l];
            const bool store = i.op == op_st_matrix;
            const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(&value);
            unsigned char* const p =
                shared(*warp_->block, static_cast<uint32_t>(at) + 4 * static_cast<uint32_t>(l % 4), 4, l, store, bytes);
            if (store) std::memcpy(p, &value, 4);
            else std::memcpy(&value, noisy(l) ? noise : p, 4);
          }
        }
        break;
      case op_bar_warp:
        ++warp_->epoch;
        warp_->barriers.push_back(static_cast<int32_t>(at_));
        share_known({warp_});
        break;
      case op_bar_sync: {
        Block& block = *warp_->block;
        block.waiting.push_back(warp_);
        if (block.waiting.size() < block.warps.size()) return false;
        ++block.epoch;
        block.barriers.push_back(static_cast<int32_t>(at_));
        share_known(block.waiting);
        runnable_.insert(runnable_.end(), block.waiting.begin(), block.waiting.end());
        block.waiting.clear();
        return false;  // the last to arrive need not be the first to go on
      }
      case op_cluster_arrive: {
        Cluster& cluster = *warp_->block->cluster;
        if (warp_->arrived != warp_->waited) fault("arrives twice at a cluster's barrier without waiting");
        ++warp_->arrived;
        const bool relaxed = i.imm != 0;
        cluster.relaxed |= relaxed;
        Known passed;
        if (!relaxed) gather(*warp_, cluster.learning, passed);
        if (++cluster.arrived < cluster.blocks.size() * warp_->block->warps.size()) break;
        ++cluster.epoch;
        cluster.barriers.push_back(static_cast<int32_t>(at_));
        releases_of_cluster_[static_cast<size_t>(warp_->block->index / launch_.cluster)].push_back(!cluster.relaxed);
        learn(cluster.known, cluster.learning);
        cluster.arrived = 0, cluster.relaxed = false, cluster.learning.clear();
        runnable_.insert(runnable_.end(), cluster.waiting.begin(), cluster.waiting.end());
        cluster.waiting.clear();
        break;
      }
      case op_cluster_wait: {
        Cluster& cluster = *warp_->block->cluster;
        if (warp_->arrived == warp_->waited) fault("waits for a cluster's barrier without having arrived");
        if (warp_->waited < cluster.epoch) {
          ++warp_->waited;
          for (int l = 0; l < lanes_per_warp; ++l) learn(warp_->known[l], cluster.known);
          runnable_.push_back(warp_);
        } else {
          warp_->again = true;  // the instruction is executed again when all have arrived
          cluster.waiting.push_back(warp_);
        }
        return false;
      }
    }
    return true;
  }

  void step() {
    const Instruction* const code = program_.code;
    const uint64_t seed = launch_.card;
    Warp& w = *warp_;
    for (;;) {
      uint32_t ready = w.alive & ~w.blocked;
      if (ready == 0) {
        if (w.alive == 0) {
          for (int l = 0; l < lanes_per_warp; ++l)
            if (!ordered(w.block->remote, now(l), l)) fault(leaving);
          --unfinished_, --w.block->running;
          return;
        }
        const uint32_t pc = at_ = w.pc[__builtin_ctz(w.alive)];
        for (int l = 0; l < lanes_per_warp; ++l)
          if (w.alive >> l & 1 && w.pc[l] != pc) fault("the lanes of a warp have met in different collectives");
        if (w.alive != everybody) fault("a collective of a warp of which lanes have left");
        for (int l = 0; l < lanes_per_warp; ++l) w.pc[l] = pc + 1;
        w.blocked = 0;
        launch_.executed[pc] = 1, ++launch_.issued[pc];
        ++counters_.steps;
        const bool goes_on = collective(code[pc]);
        if (w.again)
          for (int l = 0; l < lanes_per_warp; ++l) w.pc[l] = pc;
        w.again = false;
        if (!goes_on) return;
        continue;
      }
      // The lanes that are furthest behind go first: they meet the others again where their ways join.
      uint32_t pc = ~0u, stop = ~0u, mask = 0;
      for (uint32_t m = ready; m != 0; m &= m - 1) pc = std::min(pc, w.pc[__builtin_ctz(m)]);
      for (uint32_t m = ready; m != 0; m &= m - 1) {
        const int l = __builtin_ctz(m);
        if (w.pc[l] == pc) mask |= 1u << l;
        else stop = std::min(stop, w.pc[l]);
      }
      const auto put = [&](uint32_t lanes_here, uint32_t to) {
        for (; lanes_here != 0; lanes_here &= lanes_here - 1) w.pc[__builtin_ctz(lanes_here)] = to;
      };
      for (;; ++pc) {
        if (pc == stop) {
          put(mask, pc);
          break;
        }
        at_ = pc;
        const Instruction& i = code[pc];
        uint32_t active = mask;
        if (i.guard_kind != 0) {
          active &= guarded(i);
        }
        if (active != 0) launch_.executed[pc] = 1;
        ++launch_.issued[pc];
        if (++counters_.steps > launch_.steps) fault("does not end");
        if (static_cast<int32_t>(pc) == launch_.mutant && execute_mutant(i, mask, active, seed)) continue;
        if (i.op >= op_bar_sync && i.op <= op_ld_matrix) {
          if (mask == w.alive && mask == everybody) {
            if (collective(i)) continue;
            put(mask, w.again ? pc : pc + 1);
            w.again = false;
            return;
          }
          --launch_.issued[pc];  // but once, when all lanes have met
          put(mask, pc);
          w.blocked |= mask;
          break;
        }
        if (i.op == op_bra) {
          const uint32_t target = static_cast<uint32_t>(i.imm);
          if (active == 0) continue;
          if (active == mask && stop == ~0u) {
            pc = target - 1;
            continue;
          }
          put(active, target);
          put(mask & ~active, pc + 1);
          break;
        }
        if (i.op == op_exit_) {
          w.alive &= ~active;
          if (active == 0) continue;
          put(mask & ~active, pc + 1);
          break;
        }
        if (active == 0) continue;
        if (i.op == op_atom_add_relaxed || i.op == op_atom_add_acq_rel) {
          lanes(active, [&](int l) { atomic_add(i, l, i.op == op_atom_add_acq_rel); });
          put(mask, pc + 1);
          runnable_.push_back(&w);  // others may come before what follows
          return;
        }
        execute(i, active, seed);
      }
    }
  }

#define UN(T, R, e)                                       \
  {                                                       \
    const T* const a = row<T>(i.r[1]);                    \
    R* const d = row<R>(i.r[0]);                          \
    lanes(mask, [&](int l) {                              \
      const T x = a[l];                                   \
      d[l] = static_cast<R>(e);                           \
    });                                                   \
  }
#define BI(T, R, e)                                       \
  {                                                       \
    const T *const a = row<T>(i.r[1]), *const b = row<T>(i.r[2]); \
    R* const d = row<R>(i.r[0]);                          \
    lanes(mask, [&](int l) {                              \
      const T x = a[l], y = b[l];                         \
      d[l] = static_cast<R>(e);                           \
    });                                                   \
  }
#define TER(T, R, e)                                      \
  {                                                       \
    const T *const a = row<T>(i.r[1]), *const b = row<T>(i.r[2]), *const c = row<T>(i.r[3]); \
    R* const d = row<R>(i.r[0]);                          \
    lanes(mask, [&](int l) {                              \
      const T x = a[l], y = b[l], z = c[l];               \
      d[l] = static_cast<R>(e);                           \
    });                                                   \
  }
#define WIDE(T, R)                                        \
  {                                                       \
    const T *const a = row<T>(i.r[1]), *const b = row<T>(i.r[2]); \
    const uint64_t* const c = row<uint64_t>(i.r[3]);      \
    uint64_t* const d = row<uint64_t>(i.r[0]);            \
    lanes(mask, [&](int l) { d[l] = static_cast<uint64_t>(static_cast<R>(a[l]) * b[l]) + c[l]; }); \
  }
#define SHIFT(T, f)                                       \
  {                                                       \
    const T* const a = row<T>(i.r[1]);                    \
    const uint32_t* const b = row<uint32_t>(i.r[2]);      \
    T* const d = row<T>(i.r[0]);                          \
    lanes(mask, [&](int l) { d[l] = f<T>(a[l], b[l]); }); \
  }
#define INSERT(T)                                         \
  {                                                       \
    const T *const a = row<T>(i.r[1]), *const b = row<T>(i.r[2]); \
    const uint32_t *const c = row<uint32_t>(i.r[3]), *const n = row<uint32_t>(i.r[4]); \
    T* const d = row<T>(i.r[0]);                          \
    lanes(mask, [&](int l) { d[l] = inserted<T>(a[l], b[l], c[l], n[l]); }); \
  }
#define SELECT(T)                                         \
  {                                                       \
    const T *const a = row<T>(i.r[1]), *const b = row<T>(i.r[2]); \
    const bool* const c = row<bool>(i.r[3]);              \
    T* const d = row<T>(i.r[0]);                          \
    lanes(mask, [&](int l) {                              \
      const T x = a[l], y = b[l];                         \
      d[l] = c[l] ? x : y;                                \
    });                                                   \
  }
#define COMPARE(T, C, e) \
  compare<T, C>(row<bool>(i.r[0]), row<T>(i.r[1]), row<T>(i.r[2]), mask, i.imm, [](T v) -> C { return e; });

  void execute(const Instruction& i, uint32_t mask, uint64_t seed) {
    switch (i.op) {
      case op_trap: fault("trap");
      case op_launch_wait: warp_->waited_for_launch = true; return;
      case op_gone: ++warp_->gone; return;
      case op_special: return special(i, mask);
      case op_fence:
        lanes(mask, [&](int l) {
          learn_pending(l);
          if (i.imm != 0) learn(warp_->known[l], warp_->passed[l]);
          ++warp_->segment[l];
          warp_->fenced[l] = now(l), warp_->fenced_known[l] = warp_->known[l], warp_->fenced_strict[l] = i.imm != 0;
        });
        return;
      case op_ld_param:
        lanes(mask, [&](int l) {
          const int64_t at = (i.r[4] == no_register ? 0 : static_cast<int64_t>(lane_value(i.r[4], 8, l))) + i.imm;
          if (at < 0 || at + i.size * i.count > program_.parameter_bytes) fault("read outside the kernel's parameters");
          for (int k = 0; k < i.count; ++k)
            set_lane(i.r[k], i.width, l, launch_.parameters + at + k * i.size, i.size, (i.flags & with_sign) != 0);
        });
        return;
      case op_ld_global:
        return move(
            i, mask,
            [&](int l, uint64_t at, size_t n, bool, const unsigned char*) {
              return global(at, n, l, false, (i.flags & read_only) != 0, nullptr);
            },
            false);
      case op_st_global:
        return move(
            i, mask,
            [&](int l, uint64_t at, size_t n, bool, const unsigned char* v) {
              return global(at, n, l, true, false, v);
            },
            true);
      case op_ld_shared:
        if (i.flags & (where_true | where_false)) return load_where_taken(i, mask);
        return move(
            i, mask,
            [&](int l, uint64_t at, size_t n, bool, const unsigned char*) {
              return shared(*warp_->block, static_cast<uint32_t>(at), n, l, false, nullptr);
            },
            false);
      case op_st_shared:
        return move(
            i, mask,
            [&](int l, uint64_t at, size_t n, bool, const unsigned char* v) {
              return shared(*warp_->block, static_cast<uint32_t>(at), n, l, true, v);
            },
            true);
      case op_st_cluster:
        return move(i, mask, [&](int l, uint64_t at, size_t n, bool, const unsigned char* v) {
          const uint32_t a = static_cast<uint32_t>(at), rank = (a >> 24) - 1;
          auto& blocks = warp_->block->cluster->blocks;
          if (rank >= blocks.size()) fault("no such block in the cluster");
          if (warp_->waited == 0) fault("write into the shared memory of a block that may not have begun");
          Block& other = *blocks[rank];
          if (other.running < other.warps.size()) fault(leaving);
          add(other.remote, now(l));
          return shared(other, a & (window - 1), n, l, true, v);
        }, true);
      case op_prefetch:
        lanes(mask, [&](int l) {
          const uintptr_t at = lane_value(i.r[4], 8, l) + static_cast<uint64_t>(i.imm);
          const size_t bytes = lane_value(i.r[1], 4, l);
          if (i.flags != 0) counters_.prefetched += 127;  // the line of a byte
          else if (at % 16 != 0 || bytes % 16 != 0 || bytes == 0)
            fault("a bulk prefetch moves whole packets of 16 bytes");
          const bool inside = std::any_of(areas_.begin(), areas_.end(),
                                          [&](const Area& a) { return at + 16 > a.begin && at + bytes <= a.end; });
          if (!inside) fault("out of bounds prefetch");
          counters_.prefetched += bytes;
        });
        return;
#define CASE(name, body) \
  case op_##name:        \
    body return;
      OPERATIONS_OF_LANES(CASE)
#undef CASE
      default: return;
    }
  }

  static constexpr int32_t no_register = std::numeric_limits<int32_t>::max();
  static constexpr const char* leaving = "write into the shared memory of a block that is leaving";

  uint32_t guarded(const Instruction& i) {
    if (i.guard_kind == 0) return everybody;
    if (i.guard_kind == 3) return 0;
    const uint32_t holds = truth(i.guard);
    return i.guard_kind == 1 ? holds : ~holds;
  }

  // Counts where a mutant's instruction does what the original would not. True: it has been executed; a jump, a store
  // or a collective is executed by whoever called.
  bool execute_mutant(const Instruction& i, uint32_t mask, uint32_t active, uint64_t seed) {
    const Instruction& o = *launch_.original;
    const uint32_t would = mask & guarded(o);
    const bool load = i.op == op_ld_global || i.op == op_ld_shared || i.op == op_ld_param;
    if (!load && i.op < first_of_lanes && i.op != op_special) {
      if (would != active || i.imm != o.imm) ++counters_.infected;
      return false;
    }
    const int rows = load ? i.count : 1;
    const size_t bytes = static_cast<size_t>(i.width) * lanes_per_warp;
    std::vector<unsigned char> before, wanted;
    const auto kept = [&] {
      std::vector<unsigned char> all;
      for (int k = 0; k < rows; ++k) {
        const unsigned char* const p = row<unsigned char>(i.r[k]);
        all.insert(all.end(), p, p + bytes);
      }
      return all;
    };
    before = kept();
    const Counters counted = counters_;
    peeking_ = true;
    try {
      if (would != 0) execute(o, would, seed);
      wanted = kept();
    } catch (const std::runtime_error&) {  // the mutant's own doing, by an earlier pass
    }
    peeking_ = false, counters_ = counted;
    for (int k = 0; k < rows; ++k)
      std::memcpy(row<unsigned char>(i.r[k]), &before[bytes * static_cast<size_t>(k)], bytes);
    if (active != 0) execute(i, active, seed);
    bool differs = wanted.empty();
    for (int k = 0; k < rows; ++k)
      for (int l = 0; l < lanes_per_warp && !wanted.empty(); ++l) {
        unsigned char* const got = row<unsigned char>(i.r[k]) + l * i.width;
        if (std::memcmp(got, &wanted[bytes * static_cast<size_t>(k) + static_cast<size_t>(l * i.width)],
                        static_cast<size_t>(i.width)) == 0)
          continue;
        differs = true;
        if (launch_.noise != 0 && i.width > 1) std::memcpy(got, noise, static_cast<size_t>(i.width));
      }
    counters_.infected += differs;
    return true;
  }

  // As a float of any size large, and no NaN: a maximum would pass over that.
  static constexpr unsigned char noise[8] = {0x4b, 0x4b, 0x4b, 0x4b, 0x4b, 0x4b, 0x4b, 0x4b};
  bool noisy(int lane) const {
    if (noisy_.threads.empty()) return false;
    const auto found = noisy_.threads.find(static_cast<int32_t>(at_));
    return found != noisy_.threads.end() && found->second.count(thread_of(*warp_, lane)) != 0;
  }

  template <typename Where>
  void move(const Instruction& i, uint32_t mask, Where where, bool write) {
    const size_t bytes = static_cast<size_t>(i.size * i.count);
    for (; mask != 0; mask &= mask - 1) {
      const int l = __builtin_ctz(mask);
      const uint64_t at = (i.r[4] == no_register ? 0 : lane_value(i.r[4], i.r[5], l)) + static_cast<uint64_t>(i.imm);
      unsigned char value[32];
      if (write)
        for (int k = 0; k < i.count; ++k)
          std::memcpy(value + k * i.size, row<unsigned char>(i.r[k]) + l * i.width, static_cast<size_t>(i.size));
      unsigned char* const p = where(l, at, bytes, write, value);
      if (write) std::memcpy(p, value, bytes);
      else
        for (int k = 0; k < i.count; ++k)
          set_lane(i.r[k], i.width, l, noisy(l) ? noise : p + k * i.size, i.size, (i.flags & with_sign) != 0);
    }
  }

  // A load before the selection that drops it in some lanes: those read nothing, and find noise.
  void load_where_taken(const Instruction& i, uint32_t mask) {
    const uint32_t holds = truth(i.r[3]), taken = (i.flags & where_true) != 0 ? holds : ~holds;
    lanes(mask & ~taken, [&](int l) { set_lane(i.r[0], i.width, l, noise, i.size); });
    Instruction plain = i;
    plain.flags &= ~(where_true | where_false);
    if (mask & taken) execute(plain, mask & taken, 0);
  }

  void special(const Instruction& i, uint32_t mask) {
    const Block& block = *warp_->block;
    uint32_t* const d = row<uint32_t>(i.r[0]);
    lanes(mask, [&](int l) {
      int v = 0;
      switch (i.imm) {
        case tid: v = warp_->index * lanes_per_warp + l; break;
        case ntid: v = launch_.threads; break;
        case ctaid: v = block.index; break;
        case nctaid: v = launch_.blocks; break;
        case laneid: v = l; break;
        case cluster_rank: v = block.rank; break;
        case cluster_size: v = launch_.cluster; break;
        case cluster_index: v = block.index / launch_.cluster; break;
        case cluster_total: v = launch_.blocks / launch_.cluster; break;
        default: fault("unknown special register");
      }
      d[l] = static_cast<uint32_t>(v);
    });
  }
};
std::vector<std::unique_ptr<unsigned char[]>> Machine::register_files_;
std::vector<size_t> Machine::register_bytes_;

}  // namespace

extern "C" {
const char* ptx_operation(int index) { return index < op_count ? op_names[index] : nullptr; }
int ptx_run(const Program* program, const Launch* launch, Counters* counters, char* error, int room) {
  std::vector<std::vector<unsigned char>> before, after;
  const auto memory = [&](const auto& each) {
    for (int i = 0; i < launch->ranges; ++i)
      if (launch->range[i].writable)
        each(reinterpret_cast<unsigned char*>(launch->range[i].begin), launch->range[i].bytes);
  };
  const auto kept = [&] {
    std::vector<std::vector<unsigned char>> copies;
    memory([&](unsigned char* p, size_t bytes) { copies.emplace_back(p, p + bytes); });
    return copies;
  };
  try {
    before = kept();
    Suspects noisy, found;
    Machine(*program, *launch, *counters, noisy, found).run();
    while (!found.threads.empty()) {
      if (after.empty()) after = kept();
      size_t next = 0;
      memory([&](unsigned char* p, size_t bytes) { std::memcpy(p, before[next++].data(), bytes); });
      *counters = Counters();
      for (const auto& [where, threads] : found.threads) noisy.threads[where].insert(threads.begin(), threads.end());
      if (noisy.first.empty()) noisy.first = found.first;
      found = Suspects();
      try {
        Machine(*program, *launch, *counters, noisy, found).run();
      } catch (const std::runtime_error&) {
        fault(noisy.first);
      }
      if (kept() != after) fault(noisy.first);
      bool more = false;
      for (const auto& [where, threads] : found.threads)
        for (int32_t thread : threads) more |= noisy.threads[where].count(thread) == 0;
      if (!more) break;
    }
    uint64_t digest = 0;
    memory([&](const unsigned char* p, size_t bytes) {
      for (size_t at = 0; at < bytes; at += 8) {
        uint64_t word = 0;
        std::memcpy(&word, p + at, std::min<size_t>(8, bytes - at));
        digest = mixed(digest * 0x9e3779b97f4a7c15ull + word + at);
      }
    });
    counters->digest = digest;
  } catch (const std::exception& e) {
    std::strncpy(error, e.what(), static_cast<size_t>(room) - 1);
    return 1;
  }
  return 0;
}
}
