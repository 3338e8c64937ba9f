// The ops' signatures as C++ (last_batch_schema.h: as schema text): written once, used by the CPU and the CUDA registration.
#pragma once
#include "last_batch_schema.h"
#include "unpack.h"

#define DLB_OPTION_PARAMETERS                                                                                         \
  MaybeTensor target, MaybeTensor target_b, MaybeTensor lam, MaybeTensor weight, MaybeTensor kd_mask,                 \
      MaybeTensor alpha_t, MaybeTensor temperature_t, double alpha, double temperature, double ce_weight,             \
      double ce_alpha, double label_smoothing, double correct_share, int64_t ignore_index,             \
      int64_t teacher_kind, int64_t reduction

#define DLB_OPTIONS                                                                                                   \
  Options {                                                                                                           \
    target, target_b, lam, weight, kd_mask, alpha_t, temperature_t, alpha, temperature, ce_weight, ce_alpha,          \
        label_smoothing, correct_share, ignore_index, teacher_kind, reduction                                 \
  }

namespace dlb_fast {

// The two ops around a device's `run` of each kind.
template <auto run>
Outputs last_batch(Tensor logits, MaybeTensor teacher, DLB_OPTION_PARAMETERS, bool need_grad) {
  return run(logits, teacher, DLB_OPTIONS, need_grad);
}

template <auto run>
Outputs last_batch_roll(Tensor logits, Tensor buffer, Tensor slots, MaybeTensor ids, int64_t num_old,
                        DLB_OPTION_PARAMETERS, bool need_grad) {
  return run(logits, buffer, slots, ids, num_old, DLB_OPTIONS, need_grad);
}

}  // namespace dlb_fast
