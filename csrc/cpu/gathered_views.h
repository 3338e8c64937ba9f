// Windows of images that are kept in memory, mirrored where wanted, as values from a table: crop, flip, cast and
// normalisation in one pass. One byte has 256 values, so a table of them holds whatever a normalisation makes, bit for bit.
#pragma once
#include <cstdint>

namespace dlb_fast {

struct GatherArgs {
  const uint8_t* images = nullptr;  // (N, height, width, channels) contiguous
  int64_t height = 0, width = 0, channels = 0;
  const int64_t *rows = nullptr, *tops = nullptr, *lefts = nullptr, *flips = nullptr;  // per view
  const void* table = nullptr;      // (channels, 256) contiguous, elements as in `out`
  void* out = nullptr;              // (n, out_height, out_width, channels), strides in elements
  int64_t out_height = 0, out_width = 0, out_view = 0, out_line = 0, out_column = 0, out_channel = 0;
};

template <typename T, int known_channels>
void gather_line(const uint8_t* from, const T* table, T* to, const GatherArgs& a, bool flip) {
  const int64_t channels = known_channels > 0 ? known_channels : a.channels;
  const int64_t column = known_channels > 0 ? known_channels : a.out_column, channel = known_channels > 0 ? 1 : a.out_channel;
  const int64_t first = flip ? (a.out_width - 1) * column : 0, step = flip ? -column : column;
  to += first;
  for (int64_t x = 0; x < a.out_width; ++x, from += channels, to += step)
    for (int64_t c = 0; c < channels; ++c) to[c * channel] = table[c * 256 + from[c]];
}

// Views [begin, end). T: an unsigned integer as wide as an element of the table.
template <typename T>
void gather_views(const GatherArgs& a, int64_t begin, int64_t end) {
  const T* table = static_cast<const T*>(a.table);
  const bool packed = a.out_channel == 1 && a.out_column == a.channels;
  for (int64_t i = begin; i < end; ++i) {
    const bool flip = a.flips[i] != 0;
    for (int64_t y = 0; y < a.out_height; ++y) {
      const uint8_t* from = a.images + ((a.rows[i] * a.height + a.tops[i] + y) * a.width + a.lefts[i]) * a.channels;
      T* to = static_cast<T*>(a.out) + i * a.out_view + y * a.out_line;
      if (packed && a.channels == 3) gather_line<T, 3>(from, table, to, a, flip);
      else if (packed && a.channels == 1) gather_line<T, 1>(from, table, to, a, flip);
      else gather_line<T, 0>(from, table, to, a, flip);
    }
  }
}

}  // namespace dlb_fast
