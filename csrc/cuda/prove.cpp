// The kernels of this library against the CPU op in float64, on the GPU at hand and without torch. dlb_fast/_proof.py
// calls it in a process of its own, which a broken kernel may take down.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/batch_plan.h"
#include "last_batch_cuda.h"

namespace dlb_fast {
namespace {

// given: a teacher in place of the buffer; padded: rows that do not start on packets; narrow: stored as bfloat16;
// brief: two batches in place of four; few: one block, or cluster, takes all pairs in turn.
enum : int {
  given = 1, probabilities = 2, uniform = 4, weighted = 8, smooth = 16, pairs = 32, dense = 64, padded = 128,
  summed = 256, by_row = 512, no_ids = 1024, narrow = 2048, no_grad = 4096, brief = 8192, few = 16384
};
struct Case {
  int64_t stored, classes;  // rows in a generation of the buffer; a batch has twice as many
  int options;
};
// Every regime, with edges and by whole packets, and every option that has code of its own; a batch whose rows are
// counted in a launch of their own. Each in three dtypes.
constexpr Case cases[] = {
    {12, 10, 0}, {40, 104, no_ids | few}, {12, 129, by_row}, {8, 1000, 0}, {5, 1001, smooth | few},
    {8, 1000, narrow | few}, {3, 1501, weighted}, {3, 4096, summed | few}, {1, 9001, 0}, {2, 17001, few},
    {1, 128256, no_ids | brief}, {1, 151936, brief}, {2100, 10, 0}, {4, 301, padded}, {3, 2501, padded}, {6, 1000, given},
    {6, 100, given | no_grad}, {4, 100, given | probabilities}, {3, 3001, given | probabilities | weighted | smooth},
    {4, 1000, given | uniform}, {4, 100, given | pairs | by_row}, {3, 2001, given | pairs},
    {4, 301, given | dense | smooth}, {1, 17001, given | dense}};
constexpr DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16"};
constexpr double alpha = 0.7, temperature = 3.0, upstream = 0.75;

struct Undecided : std::runtime_error {
  using std::runtime_error::runtime_error;
};
void set_up(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw Undecided(std::string(what) + ": " + cudaGetErrorString(error));
}
void launched(const char* said) {
  if (said == nullptr) return;
  if (std::strstr(said, "out of memory") || std::strstr(said, "device memory")) throw Undecided(said);
  throw std::runtime_error(said);
}

size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

void encode(double value, DType dtype, char* out) {
  const float v = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (dtype == DType::bf16) bits >>= 16;
  if (dtype == DType::f16)  // of normal numbers and NaN
    bits = (bits >> 16 & 0x8000) | (v != v ? 0x7fff : v == 0 ? 0 : (bits >> 13 & 0x3ffff) - (112 << 10));
  std::memcpy(out, &bits, size_of(dtype));
}
double decode(const char* in, DType dtype) {
  uint32_t bits = 0;
  std::memcpy(&bits, in, size_of(dtype));
  if (dtype == DType::f16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = std::ldexp(exponent ? fraction + 1024 : fraction, (exponent ? exponent : 1) - 25);
    return exponent == 31 ? (fraction ? NAN : INFINITY) : bits & 0x8000 ? -size : size;
  }
  if (dtype == DType::bf16) bits <<= 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Memory of the device in one piece, all bits set before a case: what is not written is NaN. 256 bytes lie between two
// arrays, and must be as they were afterwards.
class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    set_up(cudaMalloc(&memory, bytes), "memory for the check");
    memory_ = static_cast<char*>(memory);
  }
  ~Arena() { cudaFree(memory_); }
  void clear() {
    used_ = 256, ends_.clear();
    set_up(cudaMemset(memory_, 0xff, bytes_), "clearing memory");
  }
  template <typename T>
  T* take(size_t bytes, const void* from = nullptr) {
    char* const mine = memory_ + used_;
    ends_.push_back(used_ + bytes);
    used_ = (used_ + bytes + 511) / 256 * 256;
    if (used_ > bytes_) throw Undecided("the check asks for more memory than it has");
    if (from != nullptr) set_up(cudaMemcpy(mine, from, bytes, cudaMemcpyHostToDevice), "copying to the device");
    return reinterpret_cast<T*>(mine);
  }
  static std::vector<char> read(const void* p, size_t bytes) {
    std::vector<char> out(bytes);
    const cudaError_t error = cudaMemcpy(out.data(), p, bytes, cudaMemcpyDeviceToHost);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    return out;
  }
  bool untouched_between() const {
    const std::vector<char> all = read(memory_, used_);
    for (size_t end : ends_)
      for (size_t i = end; i < (end + 511) / 256 * 256; ++i)
        if (static_cast<unsigned char>(all[i]) != 0xff) return false;
    return true;
  }

 private:
  char* memory_ = nullptr;
  size_t bytes_, used_ = 256;
  std::vector<size_t> ends_;
};

void on_cpu(const LastBatchArgs& args) {
  const BatchPlan plan = plan_batch(args);
  RowLosses losses;
  const PairJob job = pair_job(args, plan, losses);
  const int64_t second = args.batch - plan.split;
  pair_kernel(args)(job, 0, plan.split > second ? plan.split : second);
  finish_batch(args, plan, losses);
}

// The largest error of a run as a share of what is allowed, and where it was.
struct Worst {
  double share = 0;
  std::string where;
  void see(double got, double want, double allowed, const char* what) {
    if (got == want || (got != got && want != want)) return;
    const double here = std::fabs(got - want) / allowed;
    if (!(here < wrong)) expect(false, what);  // NaN too
    if (here > share) share = here, where = what;
  }
  void expect(bool right, const char* what) {
    if (!right && share < wrong) share = wrong, where = what;
  }
  static constexpr double wrong = 1e9;
};

class Check {
 public:
  Check(Arena& arena, Worst& worst, uint64_t seed) : arena_(arena), worst_(worst), random_(seed) {}

  // Into a buffer: a first batch, the next one, the same once more, the one after. Otherwise one batch with a teacher.
  void run(const Case& c, DType dtype) {
    const int64_t S = c.stored, C = c.classes;
    const bool held = !(c.options & given);
    const DType kept = c.options & narrow ? DType::bf16 : c.options & probabilities ? DType::f32 : dtype;
    std::vector<double> rows(held ? 2 * S * C : 0, NAN), repeated;
    std::vector<int64_t> slots(slots_base(2, S), 0);
    for (int step = held ? 0 : 1; step < (held && !(c.options & brief) ? 4 : 2); ++step) {
      const int64_t B = step == 0 ? S : 2 * S;
      std::vector<double> z(B * C);
      for (int64_t i = 0; i < B * C; ++i) {
        const bool near = i < static_cast<int64_t>(repeated.size()) && std::isfinite(repeated[i]);
        z[i] = narrowed(narrowed(near ? repeated[i] + value() / 32 : value(), dtype), kept);
      }
      if (c.options & by_row && held && B > S) z[(S + 1) * C + 3] = NAN;  // a row that cannot teach
      std::vector<int64_t> ids(B);
      for (int64_t i = 0; i < B; ++i) ids[i] = (step < 3 ? 0 : S) + i;
      if (step > 0 && S > 2) ids[2] = 1 << 20;  // the row of another sample
      LastBatchArgs truth;
      truth.batch = B, truth.classes = C, truth.alpha = alpha, truth.temperature = temperature;
      truth.kind = c.options & probabilities ? TeacherKind::probabilities
                   : c.options & uniform     ? TeacherKind::virtual_teacher
                                             : TeacherKind::logits;
      truth.label_smoothing = c.options & smooth ? 0.1 : 0, truth.correct_share = c.options & uniform ? 0.6 : -1;
      truth.reduction = c.options & summed   ? Reduction::sum
                        : c.options & by_row ? Reduction::none
                                             : Reduction::mean;
      truth.again = c.options & no_ids ? step == 2 : step == 1 ? 0 : -1;
      one_batch(c, dtype, kept, truth, z, rows, slots, ids);
      if (step != 1) repeated.assign(z.end() - S * C, z.end());
    }
  }

 private:
  double uniform01() {
    random_ = random_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(random_ >> 40) / (1 << 24);
  }
  // Multiples of 1/64 below 16 in size: exact in float16.
  double value() { return std::floor((uniform01() + uniform01() + uniform01() - 1.5) * 512) / 64; }
  static double narrowed(double v, DType dtype) {
    char bytes[4];
    encode(v, dtype, bytes);
    return decode(bytes, dtype);
  }
  static std::vector<char> encoded(const std::vector<double>& values, DType dtype, int64_t width = 1,
                                   int64_t stride = 1) {
    std::vector<char> out(values.size() / width * stride * size_of(dtype), static_cast<char>(0xff));
    for (size_t i = 0; i < values.size(); ++i)
      encode(values[i], dtype, out.data() + (i / width * stride + i % width) * size_of(dtype));
    return out;
  }

  void one_batch(const Case& c, DType dtype, DType kept, LastBatchArgs& truth, std::vector<double>& z,
                 std::vector<double>& rows, std::vector<int64_t>& slots, const std::vector<int64_t>& ids) {
    const int64_t B = truth.batch, C = c.classes, S = c.stored, stride = c.options & padded ? C + 3 : C;
    const bool held = !(c.options & given), per_row = truth.reduction == Reduction::none;
    std::vector<int64_t> labels(B), second(B);
    std::vector<double> weight(C), lam(B), soft, loss(B), parts(part_count), grad(B * C);
    for (int64_t i = 0; i < B; ++i) {
      labels[i] = static_cast<int64_t>(uniform01() * C), second[i] = static_cast<int64_t>(uniform01() * C);
      lam[i] = std::floor(uniform01() * 64) / 64;
    }
    if (B > 1) labels[1] = truth.ignore_index;
    for (double& w : weight) w = 0.5 + std::floor(uniform01() * 64) / 64;
    if (c.options & (dense | probabilities)) {
      soft.resize(B * C);
      for (double& p : soft) p = std::floor(uniform01() * 64) / (32 * C), p = narrowed(p, DType::f32);
    }
    if (!held) {
      rows.resize(S * C);
      for (int64_t i = 0; i < S * C; ++i)
        rows[i] = c.options & probabilities ? soft[i] : narrowed(z[i] + value() / 32, kept);
    }
    LastBatchArgs args = truth;
    arena_.clear();
    // Floats are float64 there and float32 here.
    const auto floats = [&](const std::vector<double>& values) {
      const std::vector<char> bytes = encoded(values, DType::f32);
      return arena_.take<void>(bytes.size(), bytes.data());
    };
    const auto integers = [&](const std::vector<int64_t>& values) {
      return arena_.take<int64_t>(8 * values.size(), values.data());
    };
    truth.dtype = truth.teacher_dtype = DType::f64, args.dtype = dtype, args.teacher_dtype = kept;
    const std::vector<char> logits = encoded(z, dtype, C, stride);
    truth.logits = z.data(), args.logits = arena_.take<void>(logits.size(), logits.data());
    truth.logits_stride = C, args.logits_stride = stride;
    if (c.options & dense) {
      truth.dense = soft.data(), args.dense = floats(soft), truth.dense_stride = args.dense_stride = C;
    } else {
      truth.target = labels.data(), args.target = integers(labels), truth.target_stride = args.target_stride = 1;
    }
    if (c.options & pairs) {
      truth.target_b = second.data(), args.target_b = integers(second);
      truth.target_b_stride = args.target_b_stride = 1;
      truth.lam = lam.data(), args.lam = floats(lam), truth.lam_stride = args.lam_stride = 1;
    }
    if (c.options & weighted) truth.weight = weight.data(), args.weight = floats(weight);
    const std::vector<double> scalars = {alpha, temperature};
    const bool mask[] = {true, false, true};
    if (c.options & summed) {
      const float* const on_device = static_cast<const float*>(floats(scalars));
      truth.alpha_ptr = &scalars[0], truth.temperature_ptr = &scalars[1], truth.alpha = args.alpha = 0;
      args.alpha_ptr = on_device, args.temperature_ptr = on_device + 1;
      truth.kd_mask = mask, args.kd_mask = arena_.take<bool>(sizeof mask, mask);
      truth.kd_mask_rows = args.kd_mask_rows = 3;
    }
    const std::vector<char> before = encoded(rows, kept);
    void* const teacher = arena_.take<void>(before.size(), before.data());
    if (held) {
      truth.rows = rows.data(), args.rows = teacher, truth.rows_stride = args.rows_stride = S * C;
      truth.capacity = args.capacity = S, args.slots = integers(slots), truth.slots = slots.data();
      if (!(c.options & no_ids)) truth.ids = ids.data(), args.ids = integers(ids);
    } else if (!(c.options & uniform)) {
      truth.teacher = rows.data(), args.teacher = teacher, truth.teacher_stride = args.teacher_stride = C;
      truth.teacher_rows = args.teacher_rows = S;
    }
    truth.loss = loss.data(), truth.parts = parts.data();
    args.loss = arena_.take<void>(4 * (per_row ? B : 1)), args.parts = arena_.take<void>(4 * part_count);
    if (!(c.options & no_grad)) truth.grad = grad.data(), args.grad = arena_.take<void>(B * C * size_of(dtype));
    const std::vector<char> up = encoded(std::vector<double>(per_row ? B : 1, upstream), DType::f32);
    const float* const factors = arena_.take<float>(up.size(), up.data());
    set_up(cudaDeviceSynchronize(), "waiting for the device");

    on_cpu(truth);
    std::printf("launch %s C=%lld\n", names[static_cast<int>(dtype)], static_cast<long long>(C));
    std::fflush(stdout);
    launched(last_batch_cuda(args, nullptr, c.options & few ? 1 : 1 << 20));
    ScaleGradArgs scale;
    const float* const own = static_cast<const float*>(args.parts);
    scale.grad = args.grad, scale.dtype = dtype, scale.batch = B, scale.classes = C, scale.parts = own;
    scale.upstream = own + part_grad_scale;  // a factor of 1: nothing changes
    if (args.grad) launched(scale_grad_cuda(scale, nullptr));
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    const std::vector<char> got_grad = Arena::read(args.grad, args.grad ? B * C * size_of(dtype) : 0);
    scale.upstream = factors, scale.upstream_stride = per_row ? 1 : 0;
    if (args.grad) launched(scale_grad_cuda(scale, nullptr));
    const std::vector<char> scaled = Arena::read(args.grad, got_grad.size());
    std::printf("back\n");

    // The tests' rule: float32's error is that of the logits' size in a loss, of the probabilities in a gradient.
    double largest = 1;
    for (double v : z) largest = std::isfinite(v) && std::fabs(v) > largest ? std::fabs(v) : largest;
    const double size = 1 + 2 * largest;
    const std::vector<char> got_loss = Arena::read(args.loss, 4 * (per_row ? B : 1));
    const std::vector<char> got_parts = Arena::read(args.parts, 4 * part_count);
    for (int64_t i = 0; i < (per_row ? B : 1); ++i)
      worst_.see(decode(&got_loss[4 * i], DType::f32), loss[i], 3e-6 * std::fabs(loss[i]) + 2e-6 * size, "loss");
    for (int part = 0; part < part_count; ++part) {
      if (part == part_grad_scale) continue;
      const bool count = part == part_valid || part == part_correct;
      const double allowed = count ? 0.1 : 3e-6 * std::fabs(parts[part]) + 2e-6 * size * B;
      worst_.see(decode(&got_parts[4 * part], DType::f32), parts[part], allowed, count ? "count of rows" : "term");
    }
    const double grad_scale = decode(&got_parts[4 * part_grad_scale], DType::f32);
    worst_.expect(dtype == DType::f16 ? grad_scale > 0 : grad_scale == 1, "scale of the gradient");
    if (args.grad) gradient(truth, z, grad, parts[part_valid], got_grad, scaled, dtype, grad_scale);
    if (held) {
      const std::vector<char> stored = Arena::read(args.rows, before.size());
      const std::vector<char> now = Arena::read(args.slots, 8 * slots.size());
      for (size_t i = 0; i < rows.size(); ++i)
        worst_.see(decode(&stored[i * size_of(kept)], kept), rows[i], 0, "stored rows");
      worst_.expect(std::memcmp(now.data(), slots.data(), now.size()) == 0, "ids and counts of rows");
    }
    worst_.expect(arena_.untouched_between(), "memory outside of the arrays");
  }

  void gradient(const LastBatchArgs& a, const std::vector<double>& z, const std::vector<double>& grad, double valid,
                const std::vector<char>& got, const std::vector<char>& scaled, DType dtype, double grad_scale) {
    std::vector<double> p(a.classes), soft(a.classes);  // shares of the student, and softened
    const bool mean = a.reduction == Reduction::mean;
    const double ce = mean ? 4.0 / a.batch : 1, kl = alpha * temperature / (mean && valid > 1 ? valid : 1);
    const double rounding = dtype == DType::f32 ? 0 : std::ldexp(1.02, dtype == DType::bf16 ? -8 : -11);
    const double smallest = dtype == DType::f16 ? std::ldexp(1.0, -25) : 0;
    for (int64_t row = 0; row < a.batch; ++row) {
      const double* const v = z.data() + row * a.classes;
      double top = -INFINITY, sum = 0, soft_sum = 0;
      for (int64_t j = 0; j < a.classes; ++j) top = v[j] > top ? v[j] : top;
      for (int64_t j = 0; j < a.classes; ++j) {
        soft[j] = std::exp((v[j] - top) / 3), p[j] = soft[j] * soft[j] * soft[j];  // the temperature is 3
        sum += p[j], soft_sum += soft[j];
      }
      for (int64_t j = 0; j < a.classes; ++j) {
        const size_t i = row * a.classes + j;
        const double g = grad[i], share = ce * p[j] / sum + kl * soft[j] / soft_sum + (ce + kl) / a.classes;
        const double once = rounding * std::fabs(g);
        const double allowed = 2e-6 * (share + std::fabs(g)) + once + smallest / grad_scale;
        worst_.see(decode(&got[i * size_of(dtype)], dtype) / grad_scale, g, allowed, "gradient");
        worst_.see(decode(&scaled[i * size_of(dtype)], dtype), upstream * g, upstream * (allowed + once) + smallest,
                   "gradient times a factor");
      }
    }
  }

  Arena& arena_;
  Worst& worst_;
  uint64_t random_;
};

// The device with this UUID, written as 32 hexadecimal digits; any for "".
int device_of(const std::string& uuid) {
  int count = 0;
  set_up(cudaGetDeviceCount(&count), "looking for the GPU");
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp found;
    set_up(cudaGetDeviceProperties(&found, index), "looking at the GPU");
    char text[33];
    for (int i = 0; i < 16; ++i)
      std::snprintf(text + 2 * i, 3, "%02x", static_cast<unsigned char>(found.uuid.bytes[i]));
    if (uuid.empty() || uuid == text) return index;
  }
  throw Undecided("no such GPU is visible");
}

}  // namespace

// The last line is JSON: {"undecided": why}, {"failed": why}, or how many cases ran and the largest error as a share of
// what is allowed. "launch ..." comes before every launch and "back" after it: what hangs, hangs between the two.
extern "C" DLB_API void dlb_fast_prove(const char* uuid, unsigned seed) {
  std::string place = "the start", verdict;
  char text[128];
  int done = 0;
  double in_float32 = 0;
  Worst worst;
  try {
    set_up(cudaSetDevice(device_of(uuid)), "using the GPU");
    Arena arena(8 << 20);
    for (const DType dtype : dtypes) {
      for (const Case& c : cases) {
        place = std::string(names[static_cast<int>(dtype)]) + ", C=" + std::to_string(c.classes);
        Check(arena, worst, seed + 7919u * static_cast<unsigned>(++done)).run(c, dtype);
        if (worst.share > 1) {
          std::snprintf(text, sizeof text, "%s off by %.3g times what is allowed", worst.where.c_str(), worst.share);
          throw std::runtime_error(worst.share < Worst::wrong ? text : worst.where + " wrong");
        }
      }
      if (dtype == DType::f32) in_float32 = worst.share;  // the other dtypes' is their rounding
    }
  } catch (const Undecided& why) {
    verdict = std::string("\"undecided\": \"") + why.what();
  } catch (const std::exception& why) {
    verdict = "\"failed\": \"" + place + ": " + why.what();
  }
  if (verdict.empty()) {
    const int all = static_cast<int>(std::size(dtypes) * std::size(cases));
    const char* const form = "{\"cases\": %d, \"of\": %d, \"worst\": %.3g, \"float32\": %.3g}\n";
    std::printf(form, done, all, worst.share, in_float32);
  } else {
    std::replace(verdict.begin() + 16, verdict.end(), '"', '\'');
    std::printf("{%s\"}\n", verdict.c_str());
  }
  std::fflush(stdout);
}

}  // namespace dlb_fast
