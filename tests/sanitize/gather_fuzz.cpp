// Gathers seeded random windows under AddressSanitizer and UBSan; images, table and batch are heap blocks of exactly the
// size the op has checked. Every value is compared. Prints the number of batches.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "../../csrc/cpu/gathered_views.h"

using namespace dlb_fast;

namespace {

std::mt19937_64 rng;
int64_t draw(int64_t high) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(high)); }

template <typename T>
void one() {
  GatherArgs a;
  const int64_t count = 1 + draw(4), views = 1 + draw(5);
  a.channels = draw(2) ? 3 : 1 + draw(4), a.height = 1 + draw(9), a.width = 1 + draw(9);
  a.out_height = 1 + draw(a.height), a.out_width = 1 + draw(a.width);
  const int64_t pixels = a.out_height * a.out_width, c = a.channels;
  if (draw(2)) {
    a.out_channel = 1, a.out_column = c, a.out_line = c * a.out_width;
  } else {
    a.out_column = 1, a.out_line = a.out_width, a.out_channel = pixels;
  }
  a.out_view = c * pixels;
  const std::unique_ptr<uint8_t[]> images(new uint8_t[count * a.height * a.width * c]);
  const std::unique_ptr<T[]> table(new T[c * 256]), out(new T[views * c * pixels]);
  const std::unique_ptr<int64_t[]> places(new int64_t[4 * views]);
  for (int64_t i = 0; i < count * a.height * a.width * c; ++i) images[i] = static_cast<uint8_t>(draw(256));
  for (int64_t i = 0; i < c * 256; ++i) table[i] = static_cast<T>(rng());
  for (int64_t i = 0; i < views; ++i) {
    places[i] = draw(count), places[views + i] = draw(a.height - a.out_height + 1);
    places[2 * views + i] = draw(a.width - a.out_width + 1), places[3 * views + i] = draw(2);
  }
  a.images = images.get(), a.table = table.get(), a.out = out.get();
  a.rows = places.get(), a.tops = a.rows + views, a.lefts = a.tops + views, a.flips = a.lefts + views;
  gather_views<T>(a, 0, views);
  for (int64_t i = 0; i < views; ++i)
    for (int64_t y = 0; y < a.out_height; ++y)
      for (int64_t x = 0; x < a.out_width; ++x)
        for (int64_t k = 0; k < c; ++k) {
          const int64_t column = a.lefts[i] + (a.flips[i] ? a.out_width - 1 - x : x);
          const uint8_t pixel = images[((a.rows[i] * a.height + a.tops[i] + y) * a.width + column) * c + k];
          const int64_t at = i * a.out_view + y * a.out_line + x * a.out_column + k * a.out_channel;
          if (out[at] != table[k * 256 + pixel]) std::printf("another value\n"), std::exit(1);
        }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t batches = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 500;
  for (uint64_t seed = 0; seed < batches; ++seed) {
    rng.seed(seed);
    switch (draw(4)) {
      case 0: one<uint8_t>(); break;
      case 1: one<uint16_t>(); break;
      case 2: one<uint32_t>(); break;
      default: one<uint64_t>();
    }
  }
  std::printf("%llu batches\n", static_cast<unsigned long long>(batches));
}
