// Which kernel a call gets, and with what shape: a plain function of the arguments and the device, with reasons.
// Host code without CUDA headers; the emulator's tests walk through the same table.
#pragma once
#include <cstdint>

#include "../last_batch.h"

namespace dlb_fast {
namespace cuda {

// Register-resident: one read of every row. Two-pass: rows are read twice; the `general` ones know every option.
enum class Regime : int32_t { lanes, warp, block, cluster, two_pass_warp, two_pass_block };

struct Device {
  int multiprocessors = 132;
  bool dependent_launch = false;  // a kernel may begin while the one before it ends: from sm_90 on
  int largest_cluster = 0;  // blocks of 512 threads: 0 (before sm_90) to 8, or 16 where the device grants that size
};

struct LaunchPlan {
  Regime regime = Regime::block;
  bool general = false;
  bool whole = false;  // the rows of every array are whole packets: a resident kernel without code for edges
  int threads = 0, blocks = 0, cluster = 1;
  int count_blocks = 0;  // > 0: count_kernel runs first
};

// Every block can count the batch's labels itself up to here: 32 KB of L2 reads, about 0.3 us beside the row loads,
// where a second launch costs 2 us. Above, the launch is cheaper.
constexpr int64_t self_count_rows = 4096;
constexpr int64_t max_blocks = 4096;      // what the workspace has room for
constexpr int64_t resident_columns = 32;  // per thread: a logit and a teacher value each fill 64 of the 128 registers

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Which options need a general kernel: those that read another array per class, two labels per row (the resident
// kernels have no registers for them), and virtual teachers (resident kernels for them would add a third to nvcc's
// time, and a second read from L1 costs little).
inline bool needs_general(const LastBatchArgs& a) {
  return a.dense != nullptr || a.kind == TeacherKind::probabilities || a.kind == TeacherKind::virtual_teacher ||
         a.target_b != nullptr || (a.weight != nullptr && a.label_smoothing > 0.0);
}

// Whether row i of all arrays starts equally far past a packet of `per_packet` elements, for every i: true of
// contiguous tensors. Padded or offset ones take two passes, where an array that differs goes element by element.
inline bool shifted_alike(const LastBatchArgs& a, int64_t per_packet) {
  const auto offset = [per_packet](const void* p, DType dtype) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / static_cast<uintptr_t>(element_size(dtype))) %
           per_packet;
  };
  const int64_t shift = offset(a.logits, a.dtype), c = a.classes % per_packet;
  if (a.grad != nullptr && (offset(a.grad, a.dtype) != shift || (a.logits_stride % per_packet != c && a.batch > 1)))
    return false;
  if (a.kind != TeacherKind::logits) return true;
  const void* teacher = a.rows != nullptr ? a.rows : a.teacher;
  const int64_t stride = (a.rows != nullptr ? a.classes : a.teacher_stride) % per_packet;
  return offset(teacher, a.teacher_dtype) == shift && a.rows_stride % per_packet == 0 &&
         (stride == a.logits_stride % per_packet || a.batch < 2);
}

inline LaunchPlan plan_launch(const LastBatchArgs& a, const Device& device) {
  LaunchPlan plan;
  const bool options = needs_general(a);
  const int64_t size = element_size(a.dtype), per_packet = 16 / size, c = a.classes;
  // A row that does not start on a packet boundary needs room for the columns before and after its whole packets.
  const bool aligned = reinterpret_cast<uintptr_t>(a.logits) % 16 == 0 && (a.logits_stride * size) % 16 == 0;
  const int64_t span = aligned ? c : c + per_packet - 1;
  // A teacher of another element type: only float32 logits with 16-bit rows have a resident kernel.
  const bool foreign = a.kind == TeacherKind::logits && a.dtype != a.teacher_dtype && a.dtype != DType::f32;
  const bool held = !options && !foreign && shifted_alike(a, per_packet);
  const int64_t largest_cluster = device.largest_cluster;
  const int64_t pairs = (a.batch + 1) / 2;

  int64_t group = 0;  // threads per row
  if (held && span <= 8 * 16) {
    plan.regime = Regime::lanes, group = 8;       // CIFAR: 4 pairs per warp
  } else if (held && span <= 32 * resident_columns) {
    plan.regime = Regime::warp, group = 32;       // ImageNet: a pair per warp, no block barrier
  } else if (held && span <= 512 * resident_columns) {
    plan.regime = Regime::block;                  // one pair per block
  } else if (held && largest_cluster >= 2 && span <= largest_cluster * 512 * resident_columns) {
    plan.regime = Regime::cluster;                // one pair per cluster: one DRAM read however long the row
  } else {
    plan.regime = c <= 1024 ? Regime::two_pass_warp : Regime::two_pass_block, group = 32;
  }
  plan.whole = aligned && c % per_packet == 0;
  // A plain two-pass kernel exists for logits teachers of long rows only, the one case that matters without clusters.
  const bool two_pass = plan.regime == Regime::two_pass_warp || plan.regime == Regime::two_pass_block;
  plan.general = two_pass && (options || plan.regime == Regime::two_pass_warp || a.kind != TeacherKind::logits);

  const int64_t sms = device.multiprocessors;
  int64_t blocks = pairs;
  switch (plan.regime) {
    case Regime::lanes:
    case Regime::warp:
    case Regime::two_pass_warp: {
      // Spread a small batch over the chip: fewer warps per block while most multiprocessors would have none.
      plan.threads = 128;
      while (plan.threads > 32 && (pairs * group + plan.threads - 1) / plan.threads < sms * 3 / 4) plan.threads /= 2;
      const int64_t groups = plan.threads / group;
      blocks = (pairs + groups - 1) / groups;
      break;
    }
    case Regime::block:
      plan.threads = span <= 2048 ? 64 : span <= 4096 ? 128 : span <= 8192 ? 256 : 512;
      break;
    case Regime::cluster: {
      // Blocks of 256 threads while 8 of them hold the row (or as many as fit): two per multiprocessor, so that one
      // loads while the other reduces. 16 blocks are the non-portable size.
      plan.threads = span <= (largest_cluster < 8 ? largest_cluster : 8) * 256 * resident_columns ? 256 : 512;
      plan.cluster = 2;
      while (plan.cluster * plan.threads * resident_columns < span) plan.cluster *= 2;
      break;
    }
    case Regime::two_pass_block:
      plan.threads = c <= 8192 ? 128 : 256;
      break;
  }
  const int64_t clusters = blocks < 1 ? 1 : blocks;
  plan.blocks = static_cast<int>(clusters * plan.cluster < max_blocks ? clusters : max_blocks / plan.cluster);
  plan.blocks *= plan.cluster;
  if (a.batch > self_count_rows) {
    const int64_t wanted = (a.batch + 1023) / 1024;
    plan.count_blocks = static_cast<int>(wanted < 64 ? wanted : 64);
  }
  return plan;
}

// No more blocks than are on the device at a time: each takes several pairs, asks for the next one while it works on
// one, and prepares itself once.
inline void fit_grid(LaunchPlan& plan, int64_t resident) {
  const int64_t clusters = resident / plan.cluster > 0 ? resident / plan.cluster : 1;
  if (plan.blocks > clusters * plan.cluster) plan.blocks = static_cast<int>(clusters) * plan.cluster;
}

// Why these arguments cannot be computed here, or nullptr. What the binding checks for every device is not repeated.
inline const char* refusal(const LastBatchArgs& a) {
  if (a.dtype == DType::f64 || a.teacher_dtype == DType::f64)
    return "float64 has no CUDA kernel: use impl=\"torch\", or float32 logits and buffer";
  if (a.classes < 1 || a.classes > (1 << 24)) return "the CUDA kernels take 1 to 16777216 classes";
  if (a.batch > (1 << 24) || a.capacity > (1 << 24) || a.teacher_rows > (1 << 24))
    return "the CUDA kernels take at most 16777216 rows: their counters are exact float32 integers";
  if (a.kind == TeacherKind::virtual_teacher && a.correct_share >= 0.0 && a.target == nullptr && a.batch > 0)
    return "a virtual teacher with correct_share needs integer labels";
  return nullptr;
}

}  // namespace cuda
}  // namespace dlb_fast
