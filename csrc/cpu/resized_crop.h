// Resizes a crop of an image with antialiasing, optionally mirrored, into its row of a batch. No torch header here.
#pragma once
#include <cstdint>

namespace dlb_fast {

// uint8 pixels anywhere in memory. Strides in elements.
struct CropArgs {
  const uint8_t* image = nullptr;
  int64_t image_height = 0, image_width = 0, channels = 0;
  int64_t image_channel = 0, image_line = 0, image_column = 0;
  int64_t top = 0, left = 0, height = 0, width = 0;  // inside the image, at least one pixel
  bool flip = false;                                 // mirrored left to right
  uint8_t* out = nullptr;          // without a table: the pixels themselves
  float* out_values = nullptr;     // with one: table[channel * 256 + pixel]
  const float* table = nullptr;
  int64_t out_height = 0, out_width = 0;
  int64_t out_channel = 0, out_line = 0, out_column = 0;
};

// Bit for bit torch's antialiased bilinear resize of uint8 (`_upsample_bilinear2d_aa`): a horizontal pass rounded to
// uint8, then a vertical one, each with int16 weights of its own precision. With a table (what the normalisation makes
// of each value of a byte) every finished line is looked up while it is in the cache.
void resized_crop(const CropArgs& args);

// One axis of the resize: output i is the sum of weights[i * stride + j] * input[first[i] + j].
struct Axis {
  int64_t out = 0;
  int64_t taps = 0;    // the most inputs any output uses; the weights beyond an output's own are 0
  int64_t stride = 0;  // taps, rounded up to a multiple of four
  int precision = 0;   // of the weights, in bits
  const int32_t *first = nullptr, *count = nullptr;
  const int16_t* weights = nullptr;
};

// The horizontal pass over interleaved RGB, laid out for vectors: four outputs (a third of their pixels each) at a time
// come from 16 bytes of the line. Blocks of eight such groups; vector v of a block holds its groups v and v + 4.
constexpr int64_t groups_per_block = 8, vectors_per_block = 4;
struct PackedAxis {
  int64_t blocks = 0, pairs = 0;     // pairs of taps
  const int32_t* base = nullptr;     // (blocks, 8) first byte of each group
  const uint8_t* pick = nullptr;     // (blocks, 4, 32) byte of the group's 16 for each 16-bit factor, or 128 for none
  const int16_t* weights = nullptr;  // (blocks, pairs, 4, 16)
};

// The kernels, once per instruction set (resized_crop_rows.cpp).
struct CropKernels {
  // One line of interleaved RGB by a packed axis, or by a plain one; out has room for a multiple of 32 bytes.
  void (*packed_line)(const PackedAxis& packed, int precision, const uint8_t* line, uint8_t* out);
  void (*rgb_line)(const Axis& axis, const uint8_t* line, uint8_t* out);
  // out[i] = the weighted sum of lines[j][i], i < bytes; the lines have room for a multiple of 32 bytes.
  void (*column)(const uint8_t* const* lines, const int16_t* weights, int64_t count, int precision, uint8_t* out,
                 int64_t bytes);
  // out[i] = table[i % 3 * 256 + line[i]] for one line of interleaved RGB. The values may bypass the cache (a batch is
  // larger than it), and then other threads see them only after `fence`.
  void (*rgb_values)(const float* table, const uint8_t* line, float* out, int64_t pixels);
  void (*fence)();
};

}  // namespace dlb_fast
