// The op's options as C++ parameters and as schema text: written once, used by the CPU and the CUDA registration.
#pragma once

#define DLB_OPTION_PARAMETERS                                                                                         \
  MaybeTensor target, MaybeTensor target_b, MaybeTensor lam, MaybeTensor weight, MaybeTensor kd_mask,                 \
      MaybeTensor alpha_t, MaybeTensor temperature_t, double alpha, double temperature, double ce_weight,             \
      double ce_alpha, double label_smoothing, double z_loss, double correct_share, int64_t ignore_index,             \
      int64_t teacher_kind, int64_t reduction, bool need_grad

#define DLB_OPTIONS                                                                                                   \
  Options {                                                                                                           \
    target, target_b, lam, weight, kd_mask, alpha_t, temperature_t, alpha, temperature, ce_weight, ce_alpha,          \
        label_smoothing, z_loss, correct_share, ignore_index, teacher_kind, reduction, need_grad                      \
  }

#define DLB_OPTION_SCHEMA                                                                                             \
  "Tensor? target, Tensor? target_b, Tensor? lam, Tensor? weight, Tensor? kd_mask, Tensor? alpha_t, "                 \
  "Tensor? temperature_t, float alpha, float temperature, float ce_weight, float ce_alpha, float label_smoothing, "   \
  "float z_loss, float correct_share, int ignore_index, int teacher_kind, int reduction, bool need_grad) "            \
  "-> (Tensor loss, Tensor parts, Tensor grad)"
