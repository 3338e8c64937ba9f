// The op `dlb_fast::gathered_views_`: a batch of views of images in memory, in one call on all of torch's threads. Only
// checks: last_batch.cpp declares it, cpu/gathered_views.h computes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/gathered_views.h"

namespace dlb_fast {
namespace {

using torch::stable::Tensor;
using ST = torch::headeronly::ScalarType;

// Values below this many are not worth a second thread.
constexpr int64_t values_per_thread = 65536;

int64_t element_size(const Tensor& table) {
  switch (table.scalar_type()) {
    case ST::Byte: return 1;
    case ST::Half: case ST::BFloat16: return 2;
    case ST::Float: return 4;
    case ST::Double: return 8;
    default:
      STD_TORCH_CHECK(false, "gathered_views_: table must be uint8, float16, bfloat16, float32 or float64");
      return 0;
  }
}

void gathered_views_(Tensor images, Tensor places, Tensor table, Tensor out) {
  STD_TORCH_CHECK(images.dim() == 4 && images.scalar_type() == ST::Byte && images.is_contiguous() && images.size(3) > 0,
                  "gathered_views_: images must be contiguous uint8 (N, height, width, channels), got ", images.dim(), " dimensions");
  STD_TORCH_CHECK(places.dim() == 2 && places.size(0) == 4 && places.scalar_type() == ST::Long && places.is_contiguous(),
                  "gathered_views_: places must be contiguous int64 (4, n): row, top, left, flipped");
  const int64_t views = places.size(1), count = images.size(0), size = element_size(table);
  GatherArgs a;
  a.height = images.size(1), a.width = images.size(2), a.channels = images.size(3);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == a.channels && table.size(1) == 256 && table.is_contiguous(),
                  "gathered_views_: table must be contiguous (", a.channels, ", 256)");
  STD_TORCH_CHECK(out.dim() == 4 && out.size(0) == views && out.size(3) == a.channels && out.scalar_type() == table.scalar_type(),
                  "gathered_views_: out must be (", views, ", height, width, ", a.channels, ") in the dtype of the table");
  a.out_height = out.size(1), a.out_width = out.size(2);
  a.images = static_cast<const uint8_t*>(images.const_data_ptr());
  a.rows = static_cast<const int64_t*>(places.const_data_ptr());
  a.tops = a.rows + views, a.lefts = a.tops + views, a.flips = a.lefts + views;
  for (int64_t i = 0; i < views; ++i)  // what a view reads lies in its image
    STD_TORCH_CHECK(a.rows[i] >= 0 && a.rows[i] < count && a.tops[i] >= 0 && a.tops[i] <= a.height - a.out_height && a.lefts[i] >= 0 &&
                        a.lefts[i] <= a.width - a.out_width,
                    "gathered_views_: places[:, ", i, "] = (", a.rows[i], ", ", a.tops[i], ", ", a.lefts[i], ") leads out of ", count,
                    " images of ", a.height, " x ", a.width);
  a.table = table.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.out_view = out.stride(0), a.out_line = out.stride(1), a.out_column = out.stride(2), a.out_channel = out.stride(3);
  const int64_t per_view = a.out_height * a.out_width * a.channels;
  if (views == 0 || per_view == 0) return;
  const int64_t grain = values_per_thread / per_view > 0 ? values_per_thread / per_view : 1;
  torch::stable::parallel_for(0, views, grain, [&](int64_t begin, int64_t end) {
    switch (size) {
      case 1: return gather_views<uint8_t>(a, begin, end);
      case 2: return gather_views<uint16_t>(a, begin, end);
      case 4: return gather_views<uint32_t>(a, begin, end);
      default: return gather_views<uint64_t>(a, begin, end);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(dlb_fast, CPU, m) { m.impl("gathered_views_", TORCH_BOX(&gathered_views_)); }

}  // namespace
}  // namespace dlb_fast
