// Runs the CPU op's kernels on seeded random batches under AddressSanitizer and UBSan. Every array is a heap block of
// exactly the size the op promises to touch, so that one element too far is an error. Prints the number of batches.
// With the name of an array as second argument that one is an element too short, to see that it is noticed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/batch_plan.h"

using namespace dlb_fast;

namespace {

std::mt19937_64 rng;
std::string too_short;
int64_t draw(int64_t high) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(high)); }
double real() { return std::normal_distribution<double>()(rng); }

int64_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

struct Block {
  std::unique_ptr<char[]> bytes;
  explicit Block(int64_t n) : bytes(new char[n > 0 ? n : 1]()) {}
  template <typename T> T* as() { return reinterpret_cast<T*>(bytes.get()); }
};

int64_t held(int64_t n, const char* name) { return n > 0 && *name && too_short == name ? n - 1 : n; }

// Random numbers of the dtype, with infinities and NaN now and then.
Block numbers(int64_t n, DType d, const char* name = "") {
  n = held(n, name);
  Block b(n * size_of(d));
  for (int64_t i = 0; i < n; ++i) {
    double v = 4 * real();
    if (draw(97) == 0) v = -INFINITY;
    if (draw(199) == 0) v = NAN;
    if (d == DType::f64) b.as<double>()[i] = v;
    else if (d == DType::f32) b.as<float>()[i] = static_cast<float>(v);
    else b.as<uint16_t>()[i] = static_cast<uint16_t>(rng());  // every bit pattern of the 16-bit types
  }
  return b;
}

void one(uint64_t seed) {
  rng.seed(seed);
  LastBatchArgs a;
  a.batch = draw(9);
  a.classes = draw(3) ? 1 + draw(70) : 1 + draw(5000);
  a.dtype = static_cast<DType>(draw(4));
  a.teacher_dtype = static_cast<DType>(draw(4));
  const DType acc = a.dtype == DType::f64 ? DType::f64 : DType::f32;
  a.logits_stride = draw(4) ? a.classes + draw(5) : 0;
  Block logits = numbers(a.batch ? (a.batch - 1) * a.logits_stride + a.classes : 0, a.dtype, "logits");
  a.logits = logits.bytes.get();
  a.ignore_index = draw(2) ? -100 : draw(a.classes);

  Block labels(a.batch * 2 * 8), second(a.batch * 8), lam = numbers(a.batch, acc);
  Block weight = numbers(a.classes, acc, "weight"), dense = numbers(a.batch * a.classes, acc, "dense");
  for (int64_t i = 0; i < a.batch; ++i) {
    labels.as<int64_t>()[2 * i] = draw(6) ? draw(a.classes) : a.ignore_index;
    second.as<int64_t>()[i] = draw(6) ? draw(a.classes) : a.ignore_index;
  }
  if (draw(30) == 0 && a.batch) labels.as<int64_t>()[0] = a.classes + draw(3);  // out of range: to be refused
  const int64_t form = draw(5);
  if (form == 1) {
    a.dense = dense.bytes.get();
    a.dense_stride = a.classes;
  } else if (form != 0) {
    a.target = labels.as<int64_t>();
    a.target_stride = 2;
    if (form == 2) {
      a.target_b = second.as<int64_t>();
      a.target_b_stride = 1;
      a.lam = lam.bytes.get();
      a.lam_stride = 1;
    }
  }
  if (draw(2)) a.weight = weight.bytes.get();

  const int64_t taught = draw(a.batch + 1);
  Block teacher = numbers(taught * a.classes, a.teacher_dtype, "teacher");
  a.capacity = 1 + draw(6);
  a.rows_stride = (a.capacity + draw(too_short == "stored" ? 1 : 3)) * a.classes;
  Block stored = numbers(2 * a.rows_stride, a.teacher_dtype, "stored"), slots(slots_base(2, a.capacity) * 8);
  Block ids(a.batch * 8), mask(a.batch);
  for (int64_t i = 0; i < a.batch; ++i) {
    ids.as<int64_t>()[i] = draw(4);
    mask.as<bool>()[i] = draw(2);
  }
  slots.as<int64_t>()[slots_latest] = draw(2);
  for (int64_t generation = 0; generation < 2; ++generation) {
    int64_t* of = slots.as<int64_t>() + slots_base(generation, a.capacity);
    of[0] = draw(a.capacity + 1);
    for (int64_t j = 1; j <= a.capacity; ++j) {
      of[j] = draw(3) ? draw(4) : unknown_id;
      of[a.capacity + j] = draw(5) ? 1 : 0;
    }
    // Now and then the last rows of the batch are the stored ones.
    for (int64_t j = 0; draw(2) && j < of[0] && of[0] <= a.batch; ++j)
      of[1 + j] = ids.as<int64_t>()[a.batch - of[0] + j];
  }
  switch (draw(5)) {
    case 0: break;
    case 1: a.kind = TeacherKind::logits; break;
    case 2: a.kind = TeacherKind::probabilities; break;
    case 3:
      a.kind = TeacherKind::virtual_teacher;
      a.correct_share = a.target && draw(2) ? 0.7 : -1;
      break;
    default:
      a.kind = TeacherKind::logits;
      a.rows = stored.bytes.get();
      a.slots = slots.as<int64_t>();
      if (draw(2)) a.ids = ids.as<int64_t>();
      a.num_old = draw(2) ? -1 : draw(a.batch + 1);
      a.again = static_cast<int>(draw(3)) - 1;
  }
  if (!a.rows && (a.kind == TeacherKind::logits || a.kind == TeacherKind::probabilities)) {
    a.teacher = teacher.bytes.get();
    a.teacher_stride = a.classes;
    a.teacher_rows = taught;
  }
  if (draw(2)) {
    a.kd_mask = mask.as<bool>();
    a.kd_mask_rows = draw(a.batch + 1);
  }
  a.label_smoothing = draw(2) * 0.1;
  a.temperature = 0.5 + static_cast<double>(draw(8));
  a.reduction = static_cast<Reduction>(draw(3));
  Block loss((a.reduction == Reduction::none ? a.batch : 1) * size_of(acc)), parts(part_count * size_of(acc));
  Block grad(held(a.batch * a.classes, "grad") * size_of(a.dtype));
  a.loss = loss.bytes.get();
  a.parts = parts.bytes.get();
  a.grad = draw(4) ? grad.bytes.get() : nullptr;

  BatchPlan plan = plan_batch(a);
  if (!plan.error.empty()) return;
  RowLosses rows;
  for (int again = 0; again < 2; ++again) {  // the second time without the teachers that were found not to be finite
    const PairJob job = pair_job(a, plan, rows);
    const int64_t pairs = std::max(plan.split, a.batch - plan.split), middle = pairs ? draw(pairs + 1) : 0;
    pair_kernel(a)(job, 0, middle);
    pair_kernel(a)(job, middle, pairs);
    if (again == 0) plan = plan_batch(a, &rows.unusable);
  }
  finish_batch(a, plan, rows);
  if (a.grad) {
    std::vector<double> factors(a.batch, 1.0);
    for (double& f : factors) f = draw(2) ? 1.0 : real();
    scale_rows(a.grad, a.dtype, factors.data(), true, a.classes, 0, a.batch);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t batches = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 500;
  if (argc > 2) too_short = argv[2];
  for (uint64_t seed = 0; seed < batches; ++seed) one(seed);
  std::printf("%llu batches\n", static_cast<unsigned long long>(batches));
}
