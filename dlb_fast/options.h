// The options of the objective: the one place that lists them. csrc/ makes the schema, the parameters and the structs
// of them, and dlb_fast/ops.py reads these lines for the schema of the Triton ops and the order of the arguments.
// They follow an op's own tensors in this order; `need_grad` comes last. One option per line.
#pragma once

// X(name): a tensor or None.
#define DLB_TENSOR_OPTIONS(X)                                                             \
  X(target)        /* (B,) int64 labels, or (B, C) probabilities in the compute dtype */  \
  X(target_b)      /* (B,) second labels of the mixup pair form */                        \
  X(lam)           /* weight of `target` in the pair form, 0-d or (B,) */                 \
  X(weight)        /* (C,) class weights */                                               \
  X(kd_mask)       /* bool per row with a teacher; False takes the row out of the KL */   \
  X(alpha_t)       /* 0-d; overrides alpha */                                             \
  X(temperature_t) /* 0-d; overrides temperature */

// X(name, default): a float.
#define DLB_NUMBER_OPTIONS(X)                                                             \
  X(alpha, 1.0)           /* weight of the KL */                                          \
  X(temperature, 3.0)                                                                     \
  X(ce_weight, 1.0)       /* the CE is weighted by ce_weight + ce_alpha * alpha */        \
  X(ce_alpha, 0.0)                                                                        \
  X(label_smoothing, 0.0)                                                                 \
  X(correct_share, -1.0)  /* right class of a virtual teacher; < 0: uniform */

// X(name, type, default): an int; `type` is its type in C++.
#define DLB_INTEGER_OPTIONS(X)                                                            \
  X(ignore_index, int64_t, -100)                                                          \
  X(reduction, Reduction, Reduction::mean)
