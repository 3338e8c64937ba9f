// The resize around its two passes: weights, layouts, and the order of the lines.
//
// The weights follow torch's in every rounding (double, then int16 with the largest precision that fits the largest
// weight), so this file must be compiled without contraction of a * b + c.
#include "resized_crop.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "batch_plan.h"
#include "isa.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace dlb_fast {

namespace portable { CropKernels crop_kernels(); }
#if defined(DLB_FAST_X86)
namespace avx2 { CropKernels crop_kernels(); }
namespace avx512 { CropKernels crop_kernels(); }
#endif

namespace {

constexpr int64_t alignment = 64;
constexpr int64_t window = 16;       // bytes a group of a packed axis is picked from
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t guard = 64;        // between the parts of the scratch, not to be touched
#else
constexpr int64_t guard = 0;
#endif
constexpr int64_t widest_step = 3;   // source pixels between neighbouring outputs, for a group to fit into its window

CropKernels kernels() {
#if defined(DLB_FAST_X86)
  if (detected_isa() == Isa::avx512) return avx512::crop_kernels();
  if (detected_isa() == Isa::avx2) return avx2::crop_kernels();
#endif
  return portable::crop_kernels();
}

int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Hands out parts of one block of memory; with no block it only counts.
struct Carver {
  char* memory = nullptr;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* part = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    const int64_t end = used + count * static_cast<int64_t>(sizeof(T));
    used = rounded_up(end + guard, alignment);
    if (memory) ASAN_POISON_MEMORY_REGION(memory + end, used - end);
    return part;
  }
};

double scale_of(int64_t in, int64_t out) { return static_cast<double>(in) / static_cast<double>(out); }
double support_of(double scale) { return scale >= 1.0 ? 1.0 * scale : 1.0; }
int64_t most_taps(int64_t in, int64_t out) {
  return static_cast<int64_t>(std::ceil(support_of(scale_of(in, out)))) * 2 + 1;
}
int64_t weight_stride(int64_t in, int64_t out) { return rounded_up(most_taps(in, out), 4); }

struct AxisMemory {
  int32_t *first, *count;
  int16_t* weights;
  double* exact;
};

AxisMemory axis_memory(Carver& carver, int64_t in, int64_t out) {
  AxisMemory m;
  m.first = carver.take<int32_t>(out);
  m.count = carver.take<int32_t>(out);
  m.weights = carver.take<int16_t>(out * weight_stride(in, out));
  m.exact = carver.take<double>(out * most_taps(in, out));
  return m;
}

// Triangle filter, widened by the scale where it shrinks. `flip`: the outputs in reverse order.
Axis make_axis(const AxisMemory& m, int64_t in, int64_t out, bool flip) {
  const double scale = scale_of(in, out), support = support_of(scale), inverse = scale >= 1.0 ? 1.0 / scale : 1.0;
  const int64_t most = most_taps(in, out);
  Axis axis;
  axis.out = out;
  axis.stride = weight_stride(in, out);
  double largest = 0;
  for (int64_t i = 0; i < out; ++i) {
    const double center = scale * (static_cast<double>(i) + 0.5);
    const int64_t first = std::max(static_cast<int64_t>(center - support + 0.5), int64_t{0});
    const int64_t end = std::min(static_cast<int64_t>(center + support + 0.5), in);
    const int64_t count = std::clamp(end - first, int64_t{0}, most);
    double* w = m.exact + i * most;
    double total = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double x = std::fabs((static_cast<double>(j + first) - center + 0.5) * inverse);
      w[j] = x < 1.0 ? 1.0 - x : 0.0;
      total += w[j];
    }
    if (total != 0.0)
      for (int64_t j = 0; j < count; ++j) largest = std::max(largest, w[j] /= total);
    const int64_t at = flip ? out - 1 - i : i;
    m.first[at] = static_cast<int32_t>(first);
    m.count[at] = static_cast<int32_t>(count);
    axis.taps = std::max(axis.taps, count);
  }
  while (axis.precision < 22 && static_cast<int>(0.5 + largest * (1 << (axis.precision + 1))) < (1 << 15))
    ++axis.precision;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t at = flip ? out - 1 - i : i;
    int16_t* w = m.weights + at * axis.stride;
    for (int64_t j = 0; j < axis.stride; ++j)
      w[j] = j < m.count[at] ? static_cast<int16_t>(0.5 + m.exact[i * most + j] * (1 << axis.precision)) : int16_t{0};
  }
  axis.first = m.first;
  axis.count = m.count;
  axis.weights = m.weights;
  return axis;
}

struct PackedMemory {
  int32_t* base;
  uint8_t* pick;
  int16_t* weights;
};

int64_t blocks_of(int64_t out) { return (3 * out + 4 * groups_per_block - 1) / (4 * groups_per_block); }

PackedMemory packed_memory(Carver& carver, int64_t in, int64_t out) {
  const int64_t blocks = blocks_of(out), pairs = (most_taps(in, out) + 1) / 2;
  PackedMemory m;
  m.base = carver.take<int32_t>(blocks * groups_per_block);
  m.pick = carver.take<uint8_t>(blocks * groups_per_block * window);
  m.weights = carver.take<int16_t>(blocks * groups_per_block * pairs * 8);
  return m;
}

bool fits_packed(const Axis& axis) {
  for (int64_t i = 1; i < axis.out; ++i)
    if (std::abs(axis.first[i] - axis.first[i - 1]) > widest_step) return false;
  return true;
}

PackedAxis make_packed(const PackedMemory& m, const Axis& axis) {
  PackedAxis packed;
  packed.blocks = blocks_of(axis.out);
  packed.pairs = (axis.taps + 1) / 2;
  const int64_t numbers = 3 * axis.out;
  std::memset(m.pick, 128, packed.blocks * groups_per_block * window);
  std::memset(m.weights, 0, packed.blocks * groups_per_block * packed.pairs * 8 * sizeof(int16_t));
  for (int64_t group = 0; group < packed.blocks * groups_per_block; ++group) {
    const int64_t block = group / groups_per_block, g = group % groups_per_block;
    const int64_t v = g % vectors_per_block, half = g / vectors_per_block;
    const int64_t begin = 4 * group, end = std::min(begin + 4, numbers);
    if (begin >= end) {
      m.base[group] = 0;
      continue;
    }
    const int64_t a = begin / 3, b = (end - 1) / 3;
    const int32_t lowest = std::min(axis.first[a], axis.first[b]);
    m.base[group] = 3 * lowest;
    uint8_t* pick = m.pick + (block * vectors_per_block + v) * 2 * window + half * window;
    int16_t* weights = m.weights + (block * packed.pairs * vectors_per_block + v) * 16 + half * 8;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t pixel = n / 3, lane = n - begin;
      const int64_t byte = 3 * (axis.first[pixel] - lowest) + n % 3;
      pick[4 * lane] = static_cast<uint8_t>(byte);
      pick[4 * lane + 2] = static_cast<uint8_t>(byte + 3);
      for (int64_t t = 0; t < packed.pairs; ++t)
        std::memcpy(weights + t * vectors_per_block * 16 + 2 * lane, axis.weights + pixel * axis.stride + 2 * t, 4);
    }
  }
  packed.base = m.base;
  packed.pick = m.pick;
  packed.weights = m.weights;
  return packed;
}

// Any number of channels, interleaved.
void plain_line(const Axis& axis, int64_t channels, const uint8_t* line, uint8_t* out) {
  for (int64_t i = 0; i < axis.out; ++i) {
    const int16_t* weights = axis.weights + i * axis.stride;
    for (int64_t c = 0; c < channels; ++c) {
      const uint8_t* from = line + axis.first[i] * channels + c;
      int32_t sum = 1 << (axis.precision - 1);
      for (int64_t j = 0; j < axis.count[i]; ++j) sum += weights[j] * from[j * channels];
      out[i * channels + c] = static_cast<uint8_t>(std::clamp(sum >> axis.precision, 0, 255));
    }
  }
}

}  // namespace

void resized_crop(const CropArgs& a) {
  const CropKernels kernel = kernels();
  const int64_t c = a.channels, line_bytes = c * a.width, out_bytes = c * a.out_width;
  const int64_t ring_size = most_taps(a.height, a.out_height), ring_line = rounded_up(out_bytes, 32) + 32;
  // Beyond its last pixel a vector may read this much of a line.
  const int64_t reach = line_bytes + 3 * weight_stride(a.width, a.out_width) + 2 * window;

  Carver carver;
  AxisMemory x_memory, y_memory;
  PackedMemory packed_parts;
  uint8_t *ring, *edge, *straight;
  const uint8_t** lines;
  for (int pass = 0; pass < 2; ++pass) {
    carver = {pass ? static_cast<char*>(thread_scratch(carver.used)) : nullptr, 0};
    x_memory = axis_memory(carver, a.width, a.out_width);
    y_memory = axis_memory(carver, a.height, a.out_height);
    packed_parts = packed_memory(carver, a.width, a.out_width);
    ring = carver.take<uint8_t>(ring_size * ring_line);
    edge = carver.take<uint8_t>(reach);
    straight = carver.take<uint8_t>(out_bytes);
    lines = carver.take<const uint8_t*>(ring_size);
  }
  const Axis x = make_axis(x_memory, a.width, a.out_width, a.flip);
  const Axis y = make_axis(y_memory, a.height, a.out_height, false);
  const bool packed = c == 3 && kernel.packed_line && fits_packed(x);
  const PackedAxis packed_x = packed ? make_packed(packed_parts, x) : PackedAxis{};

  const bool packed_in = a.image_channel == 1 && a.image_column == c && a.image_line >= 0;
  const bool packed_out = a.out_channel == 1 && a.out_column == c;
  const uint8_t* end = a.image + (a.image_height - 1) * a.image_line + a.image_width * c;  // of a packed image
  std::memset(edge, 0, reach);

  int64_t made = 0;  // lines of the crop below this one are in the ring, or no longer needed
  for (int64_t row = 0; row < a.out_height; ++row) {
    const int64_t first = y.first[row], stop = first + y.count[row];
    for (made = std::max(made, first); made < stop; ++made) {
      const uint8_t* line = a.image + (a.top + made) * a.image_line + a.left * a.image_column;
      if (!packed_in) {
        for (int64_t i = 0; i < a.width; ++i)
          for (int64_t k = 0; k < c; ++k) edge[i * c + k] = line[i * a.image_column + k * a.image_channel];
        line = edge;
      } else if (end - line < reach) {
        std::memcpy(edge, line, line_bytes);
        line = edge;
      }
      uint8_t* to = ring + (made % ring_size) * ring_line;
      if (packed)
        kernel.packed_line(packed_x, x.precision, line, to);
      else if (c == 3)
        kernel.rgb_line(x, line, to);
      else
        plain_line(x, c, line, to);
    }
    for (int64_t j = first; j < stop; ++j) lines[j - first] = ring + (j % ring_size) * ring_line;
    uint8_t* to = packed_out && !a.table ? a.out + row * a.out_line : straight;
    kernel.column(lines, y.weights + row * y.stride, y.count[row], y.precision, to, out_bytes);
    if (!a.table && packed_out) continue;
    if (a.table && packed_out && c == 3) {
      kernel.rgb_values(a.table, straight, a.out_values + row * a.out_line, a.out_width);
      continue;
    }
    for (int64_t i = 0; i < a.out_width; ++i)
      for (int64_t k = 0; k < c; ++k) {
        const int64_t at = row * a.out_line + i * a.out_column + k * a.out_channel;
        if (a.table)
          a.out_values[at] = a.table[k * 256 + straight[i * c + k]];
        else
          a.out[at] = straight[i * c + k];
      }
  }
  if (a.table) kernel.fence();
}

}  // namespace dlb_fast
