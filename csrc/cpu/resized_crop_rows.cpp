// The two passes of the resize. Compiled once per instruction set, with DLB_FAST_ISA naming the namespace.
//
// All sums are of int32, exact, so every form below gives the same bits. Vectors multiply pairs of 16-bit pixels and
// weights (madd), and clamp by saturating twice on the way down to 8 bits.
#include <cstdint>
#include <cstring>

#include "resized_crop.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dlb_fast {
namespace DLB_FAST_ISA {
namespace {

inline uint8_t rounded(int32_t sum, int precision) {
  const int32_t v = sum >> precision;
  return static_cast<uint8_t>(v < 0 ? 0 : v > 255 ? 255 : v);
}

#if defined(__AVX2__)

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i two(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

inline __m256i both(const int16_t* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return _mm256_set1_epi32(bits);
}

// Four vectors of sums to 32 bytes.
inline __m256i narrowed(const __m256i* sums, __m128i shift) {
  const __m256i low = _mm256_packs_epi32(_mm256_sra_epi32(sums[0], shift), _mm256_sra_epi32(sums[1], shift));
  const __m256i high = _mm256_packs_epi32(_mm256_sra_epi32(sums[2], shift), _mm256_sra_epi32(sums[3], shift));
  return _mm256_packus_epi16(low, high);
}

template <int known>  // pairs of taps, where the compiler shall know them
void packed_pairs(const PackedAxis& packed, int precision, const uint8_t* line, uint8_t* out) {
  const int64_t pairs = known ? known : packed.pairs;
  const __m128i shift = _mm_cvtsi32_si128(precision);
  const __m256i half = _mm256_set1_epi32(1 << (precision - 1));
  const int16_t* weights = packed.weights;
  for (int64_t block = 0; block < packed.blocks; ++block) {
    const int32_t* base = packed.base + groups_per_block * block;
    const uint8_t* pick = packed.pick + 32 * vectors_per_block * block;
    __m256i sums[4] = {half, half, half, half};
    for (int64_t t = 0; t < pairs; ++t, weights += 64) {
      for (int v = 0; v < 4; ++v) {
        const __m256i source = two(line + base[v] + 6 * t, line + base[v + 4] + 6 * t);
        const __m256i pixels = _mm256_shuffle_epi8(source, load(pick + 32 * v));
        sums[v] = _mm256_add_epi32(sums[v], _mm256_madd_epi16(pixels, load(weights + 16 * v)));
      }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * block), narrowed(sums, shift));
  }
}

void packed_line(const PackedAxis& packed, int precision, const uint8_t* line, uint8_t* out) {
  switch (packed.pairs) {
    case 1: return packed_pairs<1>(packed, precision, line, out);
    case 2: return packed_pairs<2>(packed, precision, line, out);
    case 3: return packed_pairs<3>(packed, precision, line, out);
    default: return packed_pairs<0>(packed, precision, line, out);
  }
}

void rgb_line(const Axis& axis, const uint8_t* line, uint8_t* out) {
  const __m128i shift = _mm_cvtsi32_si128(axis.precision), half = _mm_set1_epi32(1 << (axis.precision - 1));
  const __m128i low = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
  const __m128i high = _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  for (int64_t i = 0; i < axis.out; ++i) {
    const uint8_t* from = line + 3 * axis.first[i];
    const int16_t* weights = axis.weights + i * axis.stride;
    __m128i sum = half;
    for (int64_t t = 0; t < axis.count[i]; t += 4) {
      const __m128i source = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 3 * t));
      const __m128i w = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(weights + t));
      sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_shuffle_epi8(source, low), _mm_shuffle_epi32(w, 0x00)));
      sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_shuffle_epi8(source, high), _mm_shuffle_epi32(w, 0x55)));
    }
    const __m128i words = _mm_packs_epi32(_mm_sra_epi32(sum, shift), sum);
    const int32_t pixel = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    std::memcpy(out + 3 * i, &pixel, 4);  // the fourth byte is the next pixel's, or room
  }
}

void column(const uint8_t* const* lines, const int16_t* weights, int64_t count, int precision, uint8_t* out,
            int64_t bytes) {
  const __m128i shift = _mm_cvtsi32_si128(precision);
  const __m256i half = _mm256_set1_epi32(1 << (precision - 1)), zero = _mm256_setzero_si256();
  for (int64_t at = 0; at < bytes; at += 32) {
    __m256i sums[4] = {half, half, half, half};
    for (int64_t j = 0; j < count; j += 2) {
      const __m256i a = load(lines[j] + at), b = j + 1 < count ? load(lines[j + 1] + at) : zero;
      const __m256i w = both(weights + j), low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), w));
      sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), w));
      sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), w));
      sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), w));
    }
    const __m256i done = narrowed(sums, shift);
    if (at + 32 <= bytes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), done);
    } else {
      uint8_t last[32];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(last), done);
      std::memcpy(out + at, last, bytes - at);
    }
  }
}

#else

void rgb_line(const Axis& axis, const uint8_t* line, uint8_t* out) {
  const int32_t half = 1 << (axis.precision - 1);
  for (int64_t i = 0; i < axis.out; ++i) {
    const uint8_t* from = line + 3 * axis.first[i];
    const int16_t* weights = axis.weights + i * axis.stride;
    int32_t r = half, g = half, b = half;
    for (int64_t j = 0; j < axis.count[i]; ++j, from += 3) {
      const int32_t w = weights[j];
      r += w * from[0];
      g += w * from[1];
      b += w * from[2];
    }
    out[3 * i] = rounded(r, axis.precision);
    out[3 * i + 1] = rounded(g, axis.precision);
    out[3 * i + 2] = rounded(b, axis.precision);
  }
}

void column(const uint8_t* const* lines, const int16_t* weights, int64_t count, int precision, uint8_t* out,
            int64_t bytes) {
  constexpr int64_t piece = 256;
  for (int64_t at = 0; at < bytes; at += piece) {
    const int64_t n = bytes - at < piece ? bytes - at : piece;
    int32_t sums[piece];
    for (int64_t i = 0; i < n; ++i) sums[i] = 1 << (precision - 1);
    for (int64_t j = 0; j < count; ++j) {
      const uint8_t* from = lines[j] + at;
      const int32_t w = weights[j];
      for (int64_t i = 0; i < n; ++i) sums[i] += w * from[i];
    }
    for (int64_t i = 0; i < n; ++i) out[at + i] = rounded(sums[i], precision);
  }
}

#endif

void rgb_values(const float* table, const uint8_t* line, float* out, int64_t pixels) {
  const int64_t count = 3 * pixels;
  int64_t i = 0;
#if defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(out) % 32 == 0) {
    const __m256i first = _mm256_setr_epi32(0, 256, 512, 0, 256, 512, 0, 256);  // where a channel's part begins
    const __m256i second = _mm256_setr_epi32(512, 0, 256, 512, 0, 256, 512, 0);
    const __m256i third = _mm256_setr_epi32(256, 512, 0, 256, 512, 0, 256, 512);
    for (; i + 24 <= count; i += 24) {
      for (int part = 0; part < 3; ++part) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(line + i + 8 * part));
        const __m256i channel = part == 0 ? first : part == 1 ? second : third;
        const __m256i index = _mm256_add_epi32(_mm256_cvtepu8_epi32(bytes), channel);
        _mm256_stream_ps(out + i + 8 * part, _mm256_i32gather_ps(table, index, 4));
      }
    }
  }
#endif
  for (; i < count; i += 3) {
    out[i] = table[line[i]];
    out[i + 1] = table[256 + line[i + 1]];
    out[i + 2] = table[512 + line[i + 2]];
  }
}

void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace

CropKernels crop_kernels() {
#if defined(__AVX2__)
  return {packed_line, rgb_line, column, rgb_values, fence};
#else
  return {nullptr, rgb_line, column, rgb_values, fence};
#endif
}

}  // namespace DLB_FAST_ISA
}  // namespace dlb_fast
