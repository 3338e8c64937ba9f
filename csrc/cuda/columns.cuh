// How the columns of a row lie on 16-byte packets, and moving them between memory and registers.
//
// Packets are aligned in memory, not in the row: packet v of a row covers columns [v * V - shift, v * V - shift + V),
// where shift is how far the row's first element lies past a packet boundary (odd C shifts every row differently).
// Only the first and last packet can stick out; they go element by element, all others as one 16-byte access. A second
// array (gradient, teacher, buffer) uses the same columns per thread; if its rows are shifted otherwise, it goes
// element by element too, which is correct and slower, and does not happen for contiguous tensors.
#pragma once
#include "device.cuh"

namespace dlb_fast {
namespace cuda {

template <typename T>
constexpr int packet_columns = 16 / static_cast<int>(sizeof(T));

// Columns of a row per thread access, for logits of type T.
template <int V, typename X>
DLB_DEVICE int shift_of(const X* row) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(row) / sizeof(X)) % V);
}

// V columns of type X at p, which is aligned to V * sizeof(X) bytes.
template <typename X, int V>
DLB_DEVICE void load_aligned(const X* p, float* out, bool once) {
  constexpr int per_word = 4 / static_cast<int>(sizeof(X)), words = V / per_word;
  if constexpr (words >= 4) {
    DLB_UNROLL for (int w = 0; w < words; w += 4) {
      const Packet packet = load_packet(p + w * per_word, once);
      DLB_UNROLL for (int i = 0; i < 4; ++i) unpack<X>(packet.word[i], out + (w + i) * per_word);
    }
  } else {  // a 16-bit teacher of float32 logits
    const uint64_t both = load(reinterpret_cast<const uint64_t*>(p));
    unpack<X>(static_cast<uint32_t>(both), out);
    unpack<X>(static_cast<uint32_t>(both >> 32), out + per_word);
  }
}

// -inf in every element of a word.
template <typename X>
DLB_DEVICE uint32_t lowest_word() {
  const float lowest[2] = {-infinity(), -infinity()};
  return pack<X>(lowest);
}
template <typename X, int V>
DLB_DEVICE void unpack_packet(const Packet& packet, float* out) {
  DLB_UNROLL for (int i = 0; i < 4; ++i) unpack<X>(packet.word[i], out + i * (V / 4));
}

template <typename X, int V>
DLB_DEVICE Packet packed(const float* in) {
  Packet packet;
  DLB_UNROLL for (int i = 0; i < 4; ++i) packet.word[i] = pack<X>(in + i * (V / 4));
  return packet;
}

template <typename X, int V>
DLB_DEVICE void store_aligned(X* p, const float* in) {
  constexpr int per_word = 4 / static_cast<int>(sizeof(X)), words = V / per_word;
  if constexpr (words >= 4) {
    DLB_UNROLL for (int w = 0; w < words; w += 4) {
      Packet packet;
      DLB_UNROLL for (int i = 0; i < 4; ++i) packet.word[i] = pack<X>(in + (w + i) * per_word);
      store_packet(p + w * per_word, packet);
    }
  } else {
    const uint64_t both = pack<X>(in) | static_cast<uint64_t>(pack<X>(in + per_word)) << 32;
    store(reinterpret_cast<uint64_t*>(p), both);
  }
}

// Columns [first, first + V) of a row, element by element; outside the row, `fill` is loaded and nothing is stored.
template <typename X, int V>
DLB_DEVICE void load_edge(const X* row, int first, int classes, float* out, float fill) {
  DLB_UNROLL for (int e = 0; e < V; ++e) {
    const int c = first + e;
    out[e] = c >= 0 && c < classes ? to_float(load(row + c)) : fill;
  }
}
template <typename X, int V>
DLB_DEVICE void load_edge(const X* row, int first, int classes, float* out) {
  load_edge<X, V>(row, first, classes, out, -infinity());
}
template <typename X, int V>
DLB_DEVICE void store_edge(X* row, int first, int classes, const float* in) {
  DLB_UNROLL for (int e = 0; e < V; ++e) {
    const int c = first + e;
    if (c >= 0 && c < classes) {
      X value;
      from_float(in[e], value);
      store(row + c, value);
    }
  }
}

// The same, from packed words: half the registers for 16-bit elements that have to wait for their store.
template <typename X, int V>
DLB_DEVICE void pack_columns(const float* in, uint32_t* words) {
  constexpr int per_word = 4 / static_cast<int>(sizeof(X));
  DLB_UNROLL for (int w = 0; w < V / per_word; ++w) words[w] = pack<X>(in + w * per_word);
}
template <typename X, int V>
DLB_DEVICE void store_packed_edge(X* row, int first, int classes, const uint32_t* words) {
  DLB_UNROLL for (int e = 0; e < V; ++e) {
    const int c = first + e;
    if (c >= 0 && c < classes) {
      if constexpr (sizeof(X) == 4)
        store(reinterpret_cast<uint32_t*>(row + c), words[e]);
      else
        store(&row[c].bits, static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16)));
    }
  }
}

// The same columns, as one access where `aligned` (whole packets of the row are) and all of them lie inside.
template <typename X, int V>
DLB_DEVICE void load_columns(const X* row, int first, int classes, bool aligned, float fill, float* out,
                             bool once = false) {
  if (aligned && first >= 0 && first + V <= classes)
    load_aligned<X, V>(row + first, out, once);
  else
    load_edge<X, V>(row, first, classes, out, fill);
}
template <typename X, int V>
DLB_DEVICE void store_columns(X* row, int first, int classes, bool aligned, const float* in) {
  if (aligned && first >= 0 && first + V <= classes)
    store_aligned<X, V>(row + first, in);
  else
    store_edge<X, V>(row, first, classes, in);
}

}  // namespace cuda
}  // namespace dlb_fast
