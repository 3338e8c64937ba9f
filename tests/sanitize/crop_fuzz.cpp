// Runs the resize, to bytes and through a table to floats, on seeded random crops under AddressSanitizer and UBSan, with
// the instruction set of DLB_FAST_CPU_ISA. Image, rows, table and scratch are heap blocks of exactly the size the op
// promises to touch. Prints the instruction set and the number of crops.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/resized_crop.h"

namespace dlb_fast {

// In place of last_batch_cpu.cpp's, which rounds up and keeps its memory.
void* thread_scratch(int64_t bytes) {
  static void* memory = nullptr;
  std::free(memory);
  return memory = std::malloc(bytes);
}

}  // namespace dlb_fast

using namespace dlb_fast;

namespace {

std::mt19937_64 rng;
int64_t draw(int64_t high) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(high)); }
int64_t side(int64_t most) { return draw(5) ? 1 + draw(most) : 1 + draw(2); }

void one(uint64_t seed) {
  rng.seed(seed);
  CropArgs a;
  a.channels = draw(3) ? 3 : 1 + draw(5);
  a.image_height = side(60), a.image_width = side(draw(4) ? 90 : 900);
  a.out_height = side(40), a.out_width = side(draw(4) ? 40 : 300);
  const int64_t c = a.channels, gap = draw(2) * draw(9);
  int64_t image_bytes = 0, out_bytes = 0;
  if (draw(3)) {  // interleaved, the lines perhaps apart
    a.image_channel = 1, a.image_column = c, a.image_line = c * a.image_width + gap;
    image_bytes = (a.image_height - 1) * a.image_line + a.image_width * c;
  } else {
    a.image_column = 1, a.image_line = a.image_width, a.image_channel = a.image_width * a.image_height;
    image_bytes = c * a.image_channel;
  }
  if (draw(3)) {
    a.out_channel = 1, a.out_column = c, a.out_line = c * a.out_width;
  } else {
    a.out_column = 1, a.out_line = a.out_width, a.out_channel = a.out_width * a.out_height;
  }
  out_bytes = c * a.out_width * a.out_height;
  a.height = draw(2) ? a.image_height : 1 + draw(a.image_height), a.top = draw(a.image_height - a.height + 1);
  a.width = draw(2) ? a.image_width : 1 + draw(a.image_width), a.left = draw(a.image_width - a.width + 1);
  a.flip = draw(2);
  const std::unique_ptr<uint8_t[]> image(new uint8_t[image_bytes]), out(new uint8_t[out_bytes]);
  for (int64_t i = 0; i < image_bytes; ++i) image[i] = static_cast<uint8_t>(draw(256));
  a.image = image.get();
  a.out = out.get();
  resized_crop(a);
  const std::unique_ptr<float[]> table(new float[c * 256]), values(new float[out_bytes]);
  for (int64_t i = 0; i < c * 256; ++i) table[i] = static_cast<float>(i);
  a.table = table.get(), a.out_values = values.get();
  resized_crop(a);
  for (int64_t i = 0; i < a.out_width * a.out_height; ++i)
    for (int64_t k = 0; k < c; ++k) {
      const int64_t at = i / a.out_width * a.out_line + i % a.out_width * a.out_column + k * a.out_channel;
      if (values[at] != table[k * 256 + out[at]]) std::printf("another value\n"), std::exit(1);
    }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t crops = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 500;
  for (uint64_t seed = 0; seed < crops; ++seed) one(seed);
  std::printf("%s %llu crops\n", instruction_set(), static_cast<unsigned long long>(crops));
}
