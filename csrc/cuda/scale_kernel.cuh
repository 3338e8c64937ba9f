// grad *= upstream / grad_scale, where that is not 1 for all rows.
#pragma once
#include "columns.cuh"
#include "last_batch_cuda.h"

namespace dlb_fast {
namespace cuda {

struct ScaleArgs {
  void* grad;
  int64_t elements, classes;
  const float *upstream, *grad_scale;
  int64_t upstream_stride;
};

// Flat over the elements, 16 bytes per access: element i belongs to row i / C. With one factor for all rows and that
// factor 1 (a loss that is the root of backward), each block leaves after two loads.
template <typename T>
DLB_KERNEL DLB_BOUNDS(256, 4) scale_kernel(DLB_CONSTANT ScaleArgs a) {
  constexpr int V = packet_columns<T>;
  const float scale = load(a.grad_scale);
  const bool common = a.upstream_stride == 0;
  const float factor_of_all = load(a.upstream) / scale;
  if (common && factor_of_all == 1.0f) return;
  T* grad = static_cast<T*>(a.grad);
  const int shift = shift_of<V>(grad);
  const int64_t packets = (a.elements + shift + V - 1) / V,
                step = static_cast<int64_t>(grid_blocks()) * block_threads();
  for (int64_t p = static_cast<int64_t>(block_index()) * block_threads() + thread_index(); p < packets; p += step) {
    const int64_t first = p * V - shift, inside = first < 0 ? 0 : first,
                  end = first + V < a.elements ? first + V : a.elements;
    const int64_t row = common ? 0 : inside / a.classes;
    const float factor = common ? factor_of_all : load(a.upstream + row * a.upstream_stride) / scale;
    if (first >= 0 && first + V <= a.elements && (common || (row + 1) * a.classes >= end)) {
      if (factor == 1.0f) continue;
      float value[V];
      load_aligned<T, V>(grad + first, value, false);
      DLB_UNROLL for (int e = 0; e < V; ++e) value[e] *= factor;
      store_aligned<T, V>(grad + first, value);
    } else {
      DLB_NO_UNROLL for (int64_t i = inside; i < end; ++i) {
        const float f = common ? factor_of_all : load(a.upstream + i / a.classes * a.upstream_stride) / scale;
        T value;
        from_float(to_float(load(grad + i)) * f, value);
        store(grad + i, value);
      }
    }
  }
}

}  // namespace cuda
}  // namespace dlb_fast
