// From the op's tensors to LastBatchArgs: shapes, dtypes and devices checked, outputs allocated. Any device.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <tuple>

#include "last_batch.h"

namespace dlb_fast {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;  // loss, parts, grad
using LossAndParts = std::tuple<Tensor, Tensor>;
using ST = torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ST::Float: return DType::f32;
    case ST::Double: return DType::f64;
    case ST::BFloat16: return DType::bf16;
    case ST::Half: return DType::f16;
    default:
      STD_TORCH_CHECK(false, "last_batch: ", name, " must be float32, float64, bfloat16 or float16");
      return DType::f32;
  }
}

inline void check_rows(const Tensor& t, const char* name, int64_t classes) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == classes, "last_batch: ", name, " must have ", classes, " columns");
  STD_TORCH_CHECK(classes <= 1 || t.size(0) == 0 || t.stride(1) == 1, "last_batch: ", name,
                  " must have unit column stride");
}

// torch's own macro for this has another name in each version of the stable ABI.
inline void must(AOTITorchError error) {
  STD_TORCH_CHECK(error == 0, "last_batch: torch could not allocate its outputs");
}

// A contiguous tensor on the device of `like`: on the CPU straight from its allocator (through the dispatcher the three
// outputs would take as long as the rows of a small batch), on CUDA through the dispatcher. Each has its own storage:
// outputs of an op must not alias, and to cut loss and parts from one tensor above the op takes longer than this.
inline Tensor allocated(const Tensor& like, ST dtype, const std::array<int64_t, 2>& sizes, int64_t dims) {
  const int64_t strides[2] = {dims == 2 ? sizes[1] : 1, 1};
  int32_t device_type = 0, device_index = 0, code = 0;
  switch (dtype) {
    case ST::Double: code = aoti_torch_dtype_float64(); break;
    case ST::BFloat16: code = aoti_torch_dtype_bfloat16(); break;
    case ST::Half: code = aoti_torch_dtype_float16(); break;
    default: code = aoti_torch_dtype_float32();
  }
  AtenTensorHandle handle = nullptr;
  must(aoti_torch_get_device_type(like.get(), &device_type));
  must(aoti_torch_get_device_index(like.get(), &device_index));
  must(aoti_torch_empty_strided(dims, sizes.data(), strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

// The options as the op got them.
struct Options {
#define DLB_TENSOR(name) const MaybeTensor& name;
#define DLB_NUMBER(name, initial) double name;
#define DLB_INTEGER(name, type, initial) int64_t name;
  DLB_TENSOR_OPTIONS(DLB_TENSOR)
  DLB_NUMBER_OPTIONS(DLB_NUMBER)
  DLB_INTEGER_OPTIONS(DLB_INTEGER)
#undef DLB_TENSOR
#undef DLB_NUMBER
#undef DLB_INTEGER
};

// Reads a tensor's address after checking that the kernel will read what it believes to read.
inline const void* address(const MaybeTensor& t, const Tensor& logits, const char* name, ST dtype, int64_t elements) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == dtype, "last_batch: ", name, " has an unexpected dtype");
  STD_TORCH_CHECK(t->device() == logits.device(), "last_batch: ", name, " must be on the device of the logits");
  STD_TORCH_CHECK(elements < 0 || (t->numel() == elements && t->is_contiguous()), "last_batch: ", name,
                  " must be contiguous with ", elements, " elements");
  return t->const_data_ptr();
}

inline Outputs unpack(const Tensor& logits, const Options& o, bool need_grad, LastBatchArgs& a) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, "last_batch: logits must have shape (B, C) with C >= 1");
  a.batch = logits.size(0);
  a.classes = logits.size(1);
  a.dtype = dtype_of(logits, "logits");
  check_rows(logits, "logits", a.classes);
  a.logits = logits.const_data_ptr();
  a.logits_stride = logits.stride(0);
  const ST acc = a.dtype == DType::f64 ? ST::Double : ST::Float;

  if (o.target && o.target->dim() == 2) {
    check_rows(*o.target, "target", a.classes);
    STD_TORCH_CHECK(o.target->size(0) == a.batch, "last_batch: target must have one row per row of the logits");
    a.dense = address(o.target, logits, "target", acc, -1);
    a.dense_stride = o.target->stride(0);
  } else if (o.target) {
    STD_TORCH_CHECK(o.target->dim() == 1 && o.target->size(0) == a.batch, "last_batch: target must have shape (B,)");
    a.target = static_cast<const int64_t*>(address(o.target, logits, "target", ST::Long, -1));
    a.target_stride = o.target->stride(0);
  }
  if (o.target_b) {
    // The address of an empty tensor may be null.
    STD_TORCH_CHECK((a.target || a.batch == 0) && o.lam, "last_batch: the pair form needs target, target_b and lam");
    STD_TORCH_CHECK(o.target_b->dim() == 1 && o.target_b->size(0) == a.batch,
                    "last_batch: target_b must have shape (B,)");
    a.target_b = static_cast<const int64_t*>(address(o.target_b, logits, "target_b", ST::Long, -1));
    a.target_b_stride = o.target_b->stride(0);
    STD_TORCH_CHECK(o.lam->dim() == 0 || (o.lam->dim() == 1 && o.lam->size(0) == a.batch),
                    "last_batch: lam must be 0-d or have shape (B,)");
    a.lam = address(o.lam, logits, "lam", acc, -1);
    a.lam_stride = o.lam->dim() == 0 ? 0 : o.lam->stride(0);
  }
  a.weight = address(o.weight, logits, "weight", acc, a.classes);
  if (o.kd_mask) {
    a.kd_mask_rows = o.kd_mask->numel();
    a.kd_mask = static_cast<const bool*>(address(o.kd_mask, logits, "kd_mask", ST::Bool, a.kd_mask_rows));
  }
  a.alpha_ptr = address(o.alpha_t, logits, "alpha", acc, 1);
  a.temperature_ptr = address(o.temperature_t, logits, "temperature", acc, 1);
  STD_TORCH_CHECK(o.reduction >= 0 && o.reduction <= 2, "last_batch: unknown reduction ", o.reduction);
#define DLB_NUMBER(name, initial) a.name = o.name;
#define DLB_INTEGER(name, type, initial) a.name = static_cast<type>(o.name);
  DLB_NUMBER_OPTIONS(DLB_NUMBER)
  DLB_INTEGER_OPTIONS(DLB_INTEGER)
#undef DLB_NUMBER
#undef DLB_INTEGER

  const bool per_row = a.reduction == Reduction::none;
  Tensor loss = allocated(logits, acc, {a.batch}, per_row ? 1 : 0);
  Tensor parts_out = allocated(logits, acc, {part_count}, 1);
  Tensor grad = allocated(logits, logits.scalar_type(), {need_grad ? a.batch : 0, a.classes}, 2);
  a.loss = loss.mutable_data_ptr();
  a.parts = parts_out.mutable_data_ptr();
  a.grad = need_grad ? grad.mutable_data_ptr() : nullptr;
  return {loss, parts_out, grad};
}

inline void unpack_teacher(const Tensor& logits, const MaybeTensor& teacher, int64_t teacher_kind, LastBatchArgs& a) {
  STD_TORCH_CHECK(teacher_kind >= 0 && teacher_kind <= 4, "last_batch: unknown teacher_kind ", teacher_kind);
  a.kind = static_cast<TeacherKind>(teacher_kind);
  STD_TORCH_CHECK(a.kind != TeacherKind::virtual_teacher || a.correct_share < 0 || a.target || a.batch == 0,
                  "last_batch: a virtual teacher that knows the right class needs labels");
  if (a.kind == TeacherKind::none || a.kind == TeacherKind::virtual_teacher) return;
  STD_TORCH_CHECK(teacher, "last_batch: this teacher_kind needs a teacher");
  if (a.kind == TeacherKind::top_k) {
    STD_TORCH_CHECK(!logits.is_cuda(), "last_batch: the CUDA kernels have no teacher of kind top_k");
    STD_TORCH_CHECK(teacher->dim() == 2 && teacher->size(1) % 2 == 1 && teacher->size(1) >= 3 &&
                        teacher->size(1) <= 2 * a.classes + 1,
                    "last_batch: a teacher of kind top_k must have 2 k + 1 columns with 1 <= k <= ", a.classes);
    STD_TORCH_CHECK(teacher->scalar_type() == (a.dtype == DType::f64 ? ST::Double : ST::Float),
                    "last_batch: a teacher of kind top_k must have the compute dtype");
    a.kept = teacher->size(1) / 2;
  }
  check_rows(*teacher, "teacher", a.kind == TeacherKind::top_k ? 2 * a.kept + 1 : a.classes);
  STD_TORCH_CHECK(teacher->device() == logits.device(), "last_batch: teacher must be on the device of the logits");
  STD_TORCH_CHECK(teacher->size(0) <= a.batch, "last_batch: teacher has more rows than the logits");
  a.teacher_dtype = dtype_of(*teacher, "teacher");
  a.teacher = teacher->const_data_ptr();
  a.teacher_stride = teacher->stride(0);
  a.teacher_rows = teacher->size(0);
}

inline void unpack_buffer(const Tensor& logits, const Tensor& rows, const Tensor& slots, const MaybeTensor& ids,
                          int64_t num_old, int64_t again, LastBatchArgs& a) {
  STD_TORCH_CHECK(rows.dim() == 3 && rows.size(0) == 2 && rows.size(2) == a.classes,
                  "last_batch: rows must be (2, R, ", a.classes, ")");
  STD_TORCH_CHECK(rows.is_contiguous() && rows.device() == logits.device(),
                  "last_batch: rows must be contiguous and on the device of the logits");
  a.kind = TeacherKind::logits;
  a.teacher_dtype = dtype_of(rows, "rows");
  a.rows = rows.mutable_data_ptr();
  a.rows_stride = rows.size(1) * a.classes;
  a.capacity = (slots.numel() - slots_header - 2) / 4;
  STD_TORCH_CHECK(a.capacity >= 1 && a.capacity <= rows.size(1), "last_batch: rows and slots do not belong together");
  address(slots, logits, "slots", ST::Long, slots_base(2, a.capacity));
  a.slots = static_cast<int64_t*>(slots.mutable_data_ptr());
  STD_TORCH_CHECK(!ids || ids->dim() == 1, "last_batch: ids must have shape (B,)");
  a.ids = static_cast<const int64_t*>(address(ids, logits, "ids", ST::Long, a.batch));
  STD_TORCH_CHECK(num_old >= -1 && num_old <= a.batch, "last_batch: num_old must be between 0 and the batch size");
  a.num_old = num_old;
  STD_TORCH_CHECK(again >= -1 && again <= 1, "last_batch: again must be 1, 0 or -1");
  a.again = static_cast<int>(again);
}

}  // namespace dlb_fast
