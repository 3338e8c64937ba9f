// Softmax, cross entropy and KL of one row, given the sums a kernel has gathered over it. Host and device, no torch.
//
// Notation: m = max z, x = z - m, d1 = sum exp(x), d2 = sum exp(x / tau); for a teacher t of its own maximum,
// y = t - max t, dt = sum exp(y / tau), gap = sum exp(y / tau) (y - x) / tau.
//
//   CE  = G ln d1 - sum g x          g_c = w_c q_c, G = sum g; relative to m, so a common offset costs nothing
//   KL  = gap / dt + ln(d2 / dt)     one pass over the row, no statistics saved from the previous step
//   d/dz_c = a e1_c + b e2_c - k et_c - s w_c - [c = y] label
//
// with e1 = exp(x), e2 = exp(x / tau), et = exp(y / tau) and the coefficients of RowCoefficients below.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define DLB_HD __host__ __device__ __forceinline__
#else
#define DLB_HD inline
#endif

namespace dlb_fast {

// Scalars of the whole batch: the weights of the two terms, already divided by their norms.
template <typename A>
struct TermScales {
  A ce = 0;         // (ce_weight + ce_alpha alpha) / norm
  A kl_loss = 0;    // alpha tau^2 / valid rows, for the loss
  A kl_grad = 0;    // alpha tau / valid rows, for the gradient: d(tau^2 KL)/dz = tau (p_s - p_t)
  A even = 0;       // label_smoothing / C
  A hard = 1;       // 1 - label_smoothing
};

// d/dz_c = a e1_c + b e2_c - k et_c - s w_c - [c = y] label
template <typename A>
struct RowCoefficients {
  A a = 0, b = 0, k = 0, s = 0, label = 0;
};

// The coefficients of the cross entropy; those of the KL depend on the kind of teacher.
template <typename A>
DLB_HD RowCoefficients<A> ce_coefficients(const TermScales<A>& scales, A mass, A label_weight, A d1) {
  RowCoefficients<A> r;
  r.a = scales.ce * mass / d1;
  r.s = scales.ce * scales.even;
  r.label = scales.ce * scales.hard * label_weight;
  return r;
}

// For the bound of a row's cross entropy: how much a dense target may sum to (several right classes) instead of 1; with
// the two octaves below, rows of up to 256 keep a finite gradient.
constexpr double dense_target_room = 64.0;

// The largest power of two in [2^-20, 65536] that keeps |gradient| * scale two octaves inside float16's range. Powers
// of two are exact, so a float16 gradient is stored enlarged and shrinks in the backward, where the loss scale is
// known.
DLB_HD double float16_grad_scale(double bound) {
  double scale = 65536.0;
  while (scale > 9.5367431640625e-07 && scale * bound > 16384.0) scale *= 0.5;
  return scale;
}

}  // namespace dlb_fast
