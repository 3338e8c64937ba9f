// The op `dlb_fast::resized_crops_`: up to two views of one decoded image into their rows of two batches, in one call
// that holds no interpreter lock. This file only checks; last_batch.cpp declares the op, cpu/resized_crop_cpu.cpp
// computes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cpu/resized_crop.h"

namespace dlb_fast {
namespace {

using torch::stable::Tensor;
using ST = torch::headeronly::ScalarType;

CropArgs view(const Tensor& image, const Tensor& images, int64_t row, int64_t top, int64_t left, int64_t height,
              int64_t width, bool flip, const std::optional<Tensor>& table) {
  STD_TORCH_CHECK(images.dim() == 4 && images.scalar_type() == (table ? ST::Float : ST::Byte),
                  "resized_crops_: images must be (rows, height, width, channels), float32 with a table and uint8 "
                  "without, got ", images.dim(), " dimensions or another dtype");
  STD_TORCH_CHECK(images.size(3) == image.size(0), "resized_crops_: images must have the image's ", image.size(0),
                  " channels in its last dimension, got ", images.size(3));
  STD_TORCH_CHECK(images.size(1) > 0 && images.size(2) > 0, "resized_crops_: images must have pixels, got ",
                  images.size(1), " x ", images.size(2));
  STD_TORCH_CHECK(row >= 0 && row < images.size(0), "resized_crops_: row must be in [0, ", images.size(0), "), got ",
                  row);
  const bool inside = top >= 0 && left >= 0 && height > 0 && width > 0 && height <= image.size(1) &&
                      width <= image.size(2) && top <= image.size(1) - height && left <= image.size(2) - width;
  STD_TORCH_CHECK(inside, "resized_crops_: the crop (top, left, height, width) must lie inside the image of ",
                  image.size(1), " x ", image.size(2), ", got (", top, ", ", left, ", ", height, ", ", width, ")");
  CropArgs a;
  a.image = static_cast<const uint8_t*>(image.const_data_ptr());
  a.channels = image.size(0), a.image_height = image.size(1), a.image_width = image.size(2);
  a.image_channel = image.stride(0), a.image_line = image.stride(1), a.image_column = image.stride(2);
  a.top = top, a.left = left, a.height = height, a.width = width, a.flip = flip;
  if (table) {
    a.table = static_cast<const float*>(table->const_data_ptr());
    a.out_values = static_cast<float*>(images.mutable_data_ptr()) + row * images.stride(0);
  } else {
    a.out = static_cast<uint8_t*>(images.mutable_data_ptr()) + row * images.stride(0);
  }
  a.out_height = images.size(1), a.out_width = images.size(2);
  a.out_line = images.stride(1), a.out_column = images.stride(2), a.out_channel = images.stride(3);
  return a;
}

void resized_crops_(Tensor image, Tensor images, int64_t row, int64_t top, int64_t left, int64_t height, int64_t width,
                    bool flip, std::optional<Tensor> images_b, int64_t row_b, int64_t top_b, int64_t left_b,
                    int64_t height_b, int64_t width_b, bool flip_b, std::optional<Tensor> table) {
  STD_TORCH_CHECK(image.dim() == 3 && image.scalar_type() == ST::Byte && image.size(0) > 0,
                  "resized_crops_: image must be uint8 (channels, height, width), got ", image.dim(), " dimensions");
  STD_TORCH_CHECK(!table || (table->dim() == 2 && table->size(0) == image.size(0) && table->size(1) == 256 &&
                             table->scalar_type() == ST::Float && table->is_contiguous()),
                  "resized_crops_: table must be contiguous float32 (channels, 256) with the image's ", image.size(0),
                  " channels");
  const CropArgs first = view(image, images, row, top, left, height, width, flip, table);
  if (!images_b) return resized_crop(first);
  const CropArgs second = view(image, *images_b, row_b, top_b, left_b, height_b, width_b, flip_b, table);
  resized_crop(first);  // only after both were checked
  resized_crop(second);
}

STABLE_TORCH_LIBRARY_IMPL(dlb_fast, CPU, m) { m.impl("resized_crops_", TORCH_BOX(&resized_crops_)); }

}  // namespace
}  // namespace dlb_fast
