// Facts about the whole batch that a block needs before it writes a gradient: which rows have a valid teacher, and the
// counts that the means divide by.
//
// Up to `self_count_rows` rows every block counts for itself (the labels are in L2, one launch); above, count_kernel
// leaves the counts in the workspace.
//
// The buffer has two generations of rows. One teaches and is not written in the launch; the other one takes the new
// rows, with their ids and finite flags, from whoever owns them, at any time. Where the ids decide which is which, a
// block may still compare those that another block is overwriting: the batch is then the one stored last, and they are
// the same. The header and the count of the generation written, which every block reads first, wait for the last block.
#pragma once
#include "../last_batch.h"
#include "groups.cuh"

namespace dlb_fast {
namespace cuda {

struct Counts {
  float weight = 0;                    // class weights of the rows that count for the CE, summed
  float valid = 0;                     // rows with a valid teacher
  // Rows whose slot has no id, another one, or a row that is not finite.
  float unknown = 0, mismatched = 0, not_finite = 0;
};
constexpr int count_fields = 5;

// Device memory kept between launches, zero at rest except where written before read.
constexpr int max_grid = 4096, max_count_grid = 64;
struct Workspace {
  uint32_t ticket, count_ticket;
  int again;
  Counts counts;
  float count_partial[count_fields][max_count_grid];
  float partial[3][max_grid];
};

// LastBatchArgs as the kernels want it: compute dtype float, rows and columns counted in int (products are int64),
// the buffer's first generation and a given teacher in one place.
struct DeviceArgs {
  int64_t logits_stride, target_stride, target_b_stride, lam_stride, dense_stride;
  const void* logits;
  const int64_t *target, *target_b;
  const float *lam, *dense, *weight;
  void* teacher;                        // (H, C), only read, or generation 0 of the buffer
  int64_t teacher_stride;
  int64_t generation_bytes;            // from there to generation 1
  int64_t* slots;                      // null: no buffer
  const int64_t* ids;
  int64_t num_old;
  const bool* kd_mask;
  int64_t kd_mask_rows;
  const float *alpha_ptr, *temperature_ptr;
  float *loss, *parts;
  void* grad;
  Workspace* workspace;
#define DLB_NUMBER(name, initial) float name;
#define DLB_INTEGER(name, type, initial) type name;
  DLB_NUMBER_OPTIONS(DLB_NUMBER)
  DLB_INTEGER_OPTIONS(DLB_INTEGER)
#undef DLB_NUMBER
#undef DLB_INTEGER
  int batch, classes, teacher_rows, capacity, again;
  DType dtype, teacher_dtype;
  TeacherKind kind;
  bool precounted;
};

// Which rows are pairs, which generation of the buffer teaches them and which one takes the new rows.
struct Layout {
  int start, stored, teacher_limit;  // pair j: rows j < start and start + j; slot j < stored takes row start + j
  int taught, written;               // numbers of the generation that teaches and of the one written
};

// Computed once per block; all threads read it from shared memory.
struct BatchState : Layout {
  TermScales<float> scales;
  float temperature, inverse, log2e_over_t;  // tau, 1 / tau, log2(e) / tau
  float alpha, ce_weight, grad_scale, weight_sum;
  Counts counts;
};

constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;

DLB_DEVICE int pair_count(const DeviceArgs& a, const BatchState& s) {
  return s.start > a.batch - s.start ? s.start : a.batch - s.start;
}

DLB_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DLB_DEVICE int clamped(int64_t v, int high) { return v < 0 ? 0 : v > high ? high : static_cast<int>(v); }

// Rows of a generation, or the teacher given. Computed from the kernel's arguments, where the compiler sees that it is
// global memory: an address kept in shared memory would give generic loads and stores.
template <typename X>
DLB_DEVICE X* rows_of(const DeviceArgs& a, int generation) {
  return reinterpret_cast<X*>(static_cast<char*>(a.teacher) + generation * a.generation_bytes);
}
// [count, ids, finite] of a generation.
DLB_DEVICE int64_t* slots_of(const DeviceArgs& a, int generation) {
  return a.slots + slots_base(generation, a.capacity);
}

// As loaded: the counts of both generations, so that no load waits for another one. A wrong generation or count can
// misplace teachers; it cannot leave the arrays.
struct Header {
  int64_t stored_last = 0, first = 0, second = 0;
  DLB_DEVICE int latest() const { return static_cast<int>(stored_last & 1); }
  DLB_DEVICE int count(const DeviceArgs& a, int generation) const {
    return clamped(generation == 0 ? first : second, a.capacity);
  }
};
DLB_DEVICE Header read_header(const DeviceArgs& a) {
  if (a.slots == nullptr) return Header();
  return {load(a.slots + slots_latest), load(slots_of(a, 0)), load(slots_of(a, 1))};
}

// Whether the ids say that this is the batch of the last call once more: its last rows are those that it stored, and
// its first rows are not (as they are in the batch after it), or are all it has. Every thread of the block gets the
// same answer.
DLB_DEVICE bool again_by_ids(const DeviceArgs& a, const Header& header, float* partial) {
  const int count = header.count(a, header.latest()), first = a.batch - count;
  if (count == 0 || first < 0 || (a.num_old >= 0 && a.num_old != first)) return false;
  const int64_t* const stored = slots_of(a, header.latest()) + 1;
  float differs[1] = {0.0f};  // 1: among the first rows, 2: among the last, which settles it
  DLB_NO_UNROLL for (int row = thread_index(); row < count && differs[0] < 2.0f; row += block_threads()) {
    const int64_t id = load(stored + row), old = load(a.ids + row), last = load(a.ids + first + row);
    differs[0] = id != last ? 2.0f : first == 0 || id != old ? 1.0f : differs[0];
  }
  reduce_block<Max>(differs, partial);
  return differs[0] == 1.0f;
}

DLB_DEVICE void lay_out(const DeviceArgs& a, const Header& header, bool again, Layout& s) {
  const int latest = header.latest();
  s.taught = again ? 1 - latest : latest;
  s.written = 1 - s.taught;
  s.stored = 0;
  s.start = (a.batch + 1) / 2;
  if (a.slots != nullptr) {
    const int count = header.count(a, latest), by_count = again ? a.batch - count : count;
    const int old = clamped(a.num_old >= 0 ? a.num_old : by_count, a.batch);
    s.stored = smaller(a.batch - old, a.capacity);
    s.start = a.batch - s.stored;
    s.teacher_limit = smaller(smaller(header.count(a, s.taught), old), s.start);
  } else if (a.kind == TeacherKind::virtual_teacher) {
    s.teacher_limit = a.batch;
  } else {
    s.teacher_limit = a.kind == TeacherKind::none ? 0 : smaller(a.teacher_rows, a.batch);
  }
}

// Of a row and its slot, for row < teacher_limit.
enum class Match { repeats, unknown, mismatched, not_finite };
DLB_DEVICE Match match_of(const DeviceArgs& a, const Layout& s, int row) {
  if (a.slots == nullptr) return Match::repeats;
  const int64_t* const ids = slots_of(a, s.taught) + 1;
  const int64_t finite = load(ids + a.capacity + row);
  if (a.ids != nullptr) {
    const int64_t stored = load(ids + row), id = load(a.ids + row);
    if (stored == unknown_id) return Match::unknown;
    if (stored != id) return Match::mismatched;
  }
  return finite != 0 ? Match::repeats : Match::not_finite;
}

DLB_DEVICE bool label_counts(const DeviceArgs& a, int row) {
  if (load(a.target + row * a.target_stride) == a.ignore_index) return false;
  return a.target_b == nullptr || load(a.target_b + row * a.target_b_stride) != a.ignore_index;
}

// A virtual teacher that depends on the label (correct_share).
DLB_DEVICE bool by_label(const DeviceArgs& a) {
  return a.kind == TeacherKind::virtual_teacher && a.correct_share >= 0.0f;
}

// For row < teacher_limit.
DLB_DEVICE bool has_valid_teacher(const DeviceArgs& a, int row, Match match) {
  if (match != Match::repeats) return false;
  if (a.kd_mask != nullptr && (row >= a.kd_mask_rows || !load(a.kd_mask + row))) return false;
  // No right class, no correction. The second label of a pair has no say in it.
  return !by_label(a) || load(a.target + row * a.target_stride) != a.ignore_index;
}

// This thread's share of the counts when `threads` of them divide the rows.
DLB_DEVICE void count_labels(const DeviceArgs& a, int thread, int threads, Counts& n) {
  if (a.target != nullptr) {
    // Several labels on their way at a time: with one, this loop would be most of a small launch.
    constexpr int at_once = 8;
    DLB_NO_UNROLL for (int first = thread; first < a.batch; first += at_once * threads) {
      int64_t label[at_once];
      DLB_UNROLL for (int k = 0; k < at_once; ++k) {
        const int row = first + k * threads;
        label[k] = row < a.batch ? load(a.target + row * a.target_stride) : a.ignore_index;
      }
      if (a.target_b != nullptr) {
        DLB_UNROLL for (int k = 0; k < at_once; ++k) {
          const int row = first + k * threads;
          if (row < a.batch && load(a.target_b + row * a.target_b_stride) == a.ignore_index) label[k] = a.ignore_index;
        }
      }
      const bool weighted = a.weight != nullptr && a.target_b == nullptr;
      DLB_UNROLL for (int k = 0; k < at_once; ++k) {
        if (label[k] == a.ignore_index) continue;
        n.weight += weighted ? load(a.weight + clamped(label[k], a.classes - 1)) : 1.0f;
      }
    }
  } else if (a.dense != nullptr && thread == 0) {
    n.weight = static_cast<float>(a.batch);
  }
}
DLB_DEVICE void count_teachers(const DeviceArgs& a, const Layout& s, int thread, int threads, Counts& n) {
  const bool by_row = a.kd_mask != nullptr || a.slots != nullptr || a.kind == TeacherKind::virtual_teacher;
  if (by_row) {
    for (int row = thread; row < s.teacher_limit; row += threads) {
      const Match match = match_of(a, s, row);
      n.unknown += match == Match::unknown ? 1.0f : 0.0f;
      n.mismatched += match == Match::mismatched ? 1.0f : 0.0f;
      n.not_finite += match == Match::not_finite ? 1.0f : 0.0f;
      n.valid += has_valid_teacher(a, row, match) ? 1.0f : 0.0f;
    }
  } else if (thread == 0) {
    n.valid = static_cast<float>(s.teacher_limit);
  }
}

struct StateShared {
  float again[block_scratch], partial[block_scratch], largest[block_scratch], weight_sum[block_scratch];
  BatchState state;
};

DLB_DEVICE float scalar(const float* on_device, float number) {
  return on_device != nullptr ? load(on_device) : number;
}
// A term to which no row counts is 0, with zero gradient.
DLB_DEVICE float over(float a, float norm) { return norm == 0.0f ? 0.0f : a / norm; }

// Fills shared.state; ends with a block barrier.
DLB_DEVICE void prepare(const DeviceArgs& a, StateShared& shared) {
  BatchState s;
  const Header header = read_header(a);
  if (a.precounted) {
    wait_for_launch_before();
    lay_out(a, header, load(&a.workspace->again) != 0, s);
    const Counts& n = a.workspace->counts;
    s.counts = {load(&n.weight), load(&n.valid), load(&n.unknown), load(&n.mismatched), load(&n.not_finite)};
  } else {
    Counts n;
    count_labels(a, thread_index(), block_threads(), n);  // the header is on its way meanwhile
    lay_out(a, header, a.again < 0 ? again_by_ids(a, header, shared.again) : a.again != 0, s);
    count_teachers(a, s, thread_index(), block_threads(), n);
    float v[count_fields] = {n.weight, n.valid, n.unknown, n.mismatched, n.not_finite};
    reduce_block<Sum>(v, shared.partial);
    s.counts = {v[0], v[1], v[2], v[3], v[4]};
  }
  float largest[1] = {1.0f}, weight_sum[1] = {static_cast<float>(a.classes)};
  if (a.weight != nullptr && (a.label_smoothing > 0.0f || a.dtype == DType::f16)) {
    largest[0] = weight_sum[0] = 0.0f;
    for (int c = thread_index(); c < a.classes; c += block_threads()) {
      const float w = load(a.weight + c);
      weight_sum[0] += w;
      largest[0] = maximum(largest[0], w < 0.0f ? -w : w);
    }
    reduce_block<Max>(largest, shared.largest);
    reduce_block<Sum>(weight_sum, shared.weight_sum);
  }
  if (thread_index() == 0) {
    s.alpha = scalar(a.alpha_ptr, a.alpha);
    s.temperature = scalar(a.temperature_ptr, a.temperature);
    s.inverse = 1.0f / s.temperature;
    s.log2e_over_t = log2e / s.temperature;
    s.ce_weight = a.ce_weight + a.ce_alpha * s.alpha;
    s.weight_sum = weight_sum[0];
    const bool mean = a.reduction == Reduction::mean;
    s.scales.ce = over(s.ce_weight, mean ? s.counts.weight : 1.0f);
    s.scales.kl_grad = over(s.alpha * s.temperature, mean ? s.counts.valid : 1.0f);
    s.scales.kl_loss = s.scales.kl_grad * s.temperature;
    s.scales.even = a.label_smoothing / static_cast<float>(a.classes);
    s.scales.hard = 1.0f - a.label_smoothing;
    s.grad_scale = 1.0f;
    if (a.dtype == DType::f16) {
      // |p - q| <= 1 in both terms.
      const float ce = s.scales.ce, kl = s.scales.kl_grad;
      const float room = a.dense != nullptr ? static_cast<float>(dense_target_room) : 1.0f;
      const float bound = (ce < 0 ? -ce : ce) * largest[0] * room + (kl < 0 ? -kl : kl);
      s.grad_scale = static_cast<float>(float16_grad_scale(bound));
    }
    shared_store(&shared.state, s);
  }
  sync_block();
}

}  // namespace cuda
}  // namespace dlb_fast
