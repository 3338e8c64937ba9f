// The options of dlb_fast/options.h as schema text, C++ parameters and a struct, and the two ops around a device's
// kernels.
#pragma once
#include "unpack.h"

#define DLB_TENSOR_SCHEMA(name) "Tensor? " #name ", "
#define DLB_NUMBER_SCHEMA(name, initial) "float " #name ", "
#define DLB_INTEGER_SCHEMA(name, type, initial) "int " #name ", "
#define DLB_OPTION_SCHEMA                                                                                              \
  DLB_TENSOR_OPTIONS(DLB_TENSOR_SCHEMA)                                                                                \
  DLB_NUMBER_OPTIONS(DLB_NUMBER_SCHEMA) DLB_INTEGER_OPTIONS(DLB_INTEGER_SCHEMA)                                        \
  "bool need_grad) -> (Tensor loss, Tensor parts"

#define DLB_TENSOR_PARAMETER(name) MaybeTensor name,
#define DLB_NUMBER_PARAMETER(name, initial) double name,
#define DLB_INTEGER_PARAMETER(name, type, initial) int64_t name,
#define DLB_OPTION_PARAMETERS                                                                                          \
  DLB_TENSOR_OPTIONS(DLB_TENSOR_PARAMETER)                                                                             \
  DLB_NUMBER_OPTIONS(DLB_NUMBER_PARAMETER) DLB_INTEGER_OPTIONS(DLB_INTEGER_PARAMETER) bool need_grad

#define DLB_TENSOR_NAME(name) name,
#define DLB_NUMBER_NAME(name, initial) name,
#define DLB_INTEGER_NAME(name, type, initial) name,
#define DLB_OPTIONS                                                                                                    \
  Options {                                                                                                            \
    DLB_TENSOR_OPTIONS(DLB_TENSOR_NAME)                                                                                \
    DLB_NUMBER_OPTIONS(DLB_NUMBER_NAME) DLB_INTEGER_OPTIONS(DLB_INTEGER_NAME)                                          \
  }

namespace dlb_fast {

template <auto run>
Outputs last_batch(Tensor logits, MaybeTensor teacher, int64_t teacher_kind, DLB_OPTION_PARAMETERS) {
  return run(logits, teacher, teacher_kind, DLB_OPTIONS, need_grad);
}

// The gradient, if it is needed, lies over the logits.
template <auto run>
LossAndParts last_batch_(Tensor logits, MaybeTensor teacher, int64_t teacher_kind, DLB_OPTION_PARAMETERS) {
  return run(logits, teacher, teacher_kind, DLB_OPTIONS, need_grad);
}

template <auto run>
Outputs last_batch_update(Tensor logits, Tensor rows, Tensor slots, MaybeTensor ids, int64_t num_old, int64_t again,
                          DLB_OPTION_PARAMETERS) {
  return run(logits, rows, slots, ids, num_old, again, DLB_OPTIONS, need_grad);
}

}  // namespace dlb_fast
