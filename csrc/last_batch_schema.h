// The ops' signatures as schema text, for whoever registers one; no torch header.
#pragma once

#define DLB_OPTION_SCHEMA                                                                                             \
  "Tensor? target, Tensor? target_b, Tensor? lam, Tensor? weight, Tensor? kd_mask, Tensor? alpha_t, "                 \
  "Tensor? temperature_t, float alpha, float temperature, float ce_weight, float ce_alpha, float label_smoothing, "   \
  "float correct_share, int ignore_index, int teacher_kind, int reduction"
#define DLB_RETURNS "(Tensor loss, Tensor parts, Tensor grad)"
