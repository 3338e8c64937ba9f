// The threads that work on one row together, and their reductions. Every reduction returns the same bits to every
// thread, adds in an order fixed by the launch shape, and is a barrier among the group's threads.
#pragma once
#include "device.cuh"

namespace dlb_fast {
namespace cuda {

constexpr int warp_lanes = 32, max_block_threads = 512, max_block_warps = max_block_threads / warp_lanes;
constexpr int max_cluster = 16, max_sums = 8, max_resident_sums = 5;

struct Max {
  DLB_DEVICE static float identity() { return -infinity(); }
  DLB_DEVICE static float combine(float a, float b) { return maximum(a, b); }
};
struct Sum {
  DLB_DEVICE static float identity() { return 0.0f; }
  DLB_DEVICE static float combine(float a, float b) { return a + b; }
};

template <typename Op, int N>
DLB_DEVICE void reduce_lanes(float (&v)[N], int lanes) {
  DLB_UNROLL for (int mask = warp_lanes / 2; mask > 0; mask >>= 1) {
    if (mask < lanes) {
      DLB_UNROLL for (int i = 0; i < N; ++i) v[i] = Op::combine(v[i], shuffle_xor(v[i], mask));
    }
  }
}

// Several sums over a warp at once. At every step half of them go to the other half of the lanes, until each lane holds
// one sum: N - 1 exchanges for that, where a sum at a time takes five each. Lane l then holds number slot_of<N>(l).
template <int N>
constexpr int slots = N <= 1 ? 1 : N <= 2 ? 2 : N <= 4 ? 4 : 8;
template <int N>
DLB_DEVICE int slot_of(int lane) {
  return ((lane >> 4 & 1) | (lane >> 2 & 2) | (lane & 4)) % slots<N>;
}
DLB_DEVICE int lane_of(int slot) { return (slot & 1) << 4 | (slot & 2) << 2 | (slot & 4); }

template <typename Op, int N>
DLB_DEVICE float spread_over_lanes(float (&v)[N]) {
  static_assert(N <= max_sums, "lanes");
  const int lane = computed_here(thread_index() % warp_lanes);
  DLB_UNROLL for (int step = 0; step < 5; ++step) {
    const int mask = 16 >> step, left = (N + (1 << step) - 1) >> step;  // so many sums, before this step
    DLB_UNROLL for (int i = 0; i < left; i += 2) {
      if (i + 1 < left) {
        const bool upper = (lane & mask) != 0;
        const float kept = upper ? v[i + 1] : v[i], sent = upper ? v[i] : v[i + 1];
        v[i / 2] = Op::combine(kept, shuffle_xor(sent, mask));
      } else {
        v[i / 2] = Op::combine(v[i], shuffle_xor(v[i], mask));
      }
    }
  }
  return v[0];
}

// The same sums for every lane.
template <typename Op, int N>
DLB_DEVICE void reduce_warp(float (&v)[N]) {
  const float mine = spread_over_lanes<Op>(v);
  if constexpr (N > 1) {
    DLB_UNROLL for (int i = 0; i < N; ++i) v[i] = shuffle(mine, lane_of(i));
  }
}

// Adds the partials of `warps` warps, slots<N> of each in a row, in every warp.
template <typename Op, int N>
DLB_DEVICE void reduce_partials(const float* partial, int warps, float (&v)[N]) {
  constexpr int width = slots<N>, together = warp_lanes / width;
  const int lane = computed_here(thread_index() % warp_lanes), slot = lane % width;
  float mine = Op::identity();
  DLB_NO_UNROLL for (int w = slot < N ? lane / width : warps; w < warps; w += together)
    mine = Op::combine(mine, shared_load(partial + w * width + slot));
  DLB_UNROLL for (int mask = warp_lanes / 2; mask >= width; mask >>= 1)
    mine = Op::combine(mine, shuffle_xor(mine, mask));
  DLB_UNROLL for (int i = 0; i < N; ++i) v[i] = shuffle(mine, i);
}

// Sums over the block, the same bits for every thread. `partial` is free again after the next barrier of the block.
constexpr int block_scratch = max_block_warps * max_sums;
template <typename Op, int N>
DLB_DEVICE void reduce_block(float (&v)[N], float* partial) {
  const float mine = spread_over_lanes<Op>(v);
  const int here = computed_here(thread_index()), lane = here % warp_lanes, warp = here / warp_lanes;
  const int slot = slot_of<N>(lane);
  if (lane % (warp_lanes / slots<N>) == 0 && slot < N) shared_store(partial + warp * slots<N> + slot, mine);
  sync_block();
  reduce_partials<Op>(partial, block_threads() / warp_lanes, v);
}

// `lanes` neighbours in a warp: several rows per warp, no shared memory and no block barrier.
template <int lanes>
struct LaneGroup {
  // Neighbours that ask for a row's cache lines, each for one: five hold the longest row that 8 lanes hold.
  static constexpr bool by_line = lanes < warp_lanes;
  static constexpr int launch_threads = 128, min_blocks = lanes < warp_lanes ? 5 : 4;
  struct Shared {};
  int rank, index;
  DLB_DEVICE explicit LaneGroup(Shared&) : rank(thread_index() % lanes), index(thread_index() / lanes) {}
  DLB_DEVICE int size() const { return lanes; }
  DLB_DEVICE static int groups_in_grid() { return grid_blocks() * (block_threads() / lanes); }
  DLB_DEVICE int first() const { return block_index() * (block_threads() / lanes); }  // first group of this block
  DLB_DEVICE static int part() { return 0; }  // of a row that this block's first thread prefetches
  DLB_DEVICE static int parts() { return 1; }
  DLB_DEVICE bool prefetches() const { return rank == 0; }
  DLB_DEVICE static void meet() {}
  // The warp's rows go the same way through every shuffle: what one of them needs, all of them execute.
  DLB_DEVICE static bool any(bool value) { return lanes == warp_lanes ? value : warp_any(value); }
  template <typename Op, int buffer, int N>
  DLB_DEVICE void reduce(float (&v)[N]) {
    if constexpr (lanes == warp_lanes)
      reduce_warp<Op>(v);
    else
      reduce_lanes<Op>(v, lanes);
  }
};

// The block. A row's reductions go through one scratch buffer each: a buffer is written again only after the barrier of
// another one, which every reader of it has passed; so one barrier per reduction suffices.
template <int threads_at_most, int blocks_at_least>
struct BlockGroup {
  static constexpr bool by_line = false;
  static constexpr int launch_threads = threads_at_most, min_blocks = blocks_at_least;
  struct Shared {
    float partial[3][block_scratch];
  };
  Shared& shared;
  int rank;
  static constexpr int index = 0;
  DLB_DEVICE explicit BlockGroup(Shared& s) : shared(s), rank(thread_index()) {}
  DLB_DEVICE int size() const { return block_threads(); }
  DLB_DEVICE static int groups_in_grid() { return grid_blocks(); }
  DLB_DEVICE int first() const { return block_index(); }
  DLB_DEVICE static int part() { return 0; }
  DLB_DEVICE static int parts() { return 1; }
  DLB_DEVICE bool prefetches() const { return rank == 0; }
  DLB_DEVICE static void meet() {}
  DLB_DEVICE static bool any(bool value) { return value; }
  template <typename Op, int buffer, int N>
  DLB_DEVICE void reduce(float (&v)[N]) {
    reduce_block<Op>(v, shared.partial[buffer]);
  }
};

// A thread-block cluster. Each warp writes its partial into every block's shared memory; one cluster barrier later
// every block holds all of them. Nothing is read remotely and nothing is written after the last barrier, so a block may
// leave.
struct ClusterGroup {
  static constexpr bool by_line = false;
  static constexpr int launch_threads = max_block_threads, min_blocks = 1;
  struct Shared {
    float partial[2][max_cluster * block_scratch];
  };
  Shared& shared;
  int rank;
  static constexpr int index = 0;
  DLB_DEVICE explicit ClusterGroup(Shared& s) : shared(s), rank(cluster_rank() * block_threads() + thread_index()) {
    arrive_in_cluster();
  }
  DLB_DEVICE static void meet() { wait_for_cluster(); }  // before the first reduction
  DLB_DEVICE int size() const { return cluster_blocks() * block_threads(); }
  DLB_DEVICE int groups_in_grid() const { return clusters_in_grid(); }
  DLB_DEVICE int first() const { return cluster_index(); }
  DLB_DEVICE static int part() { return cluster_rank(); }
  DLB_DEVICE static int parts() { return cluster_blocks(); }
  DLB_DEVICE static bool prefetches() { return thread_index() == 0; }
  DLB_DEVICE static bool any(bool value) { return value; }
  template <typename Op, int buffer, int N>
  DLB_DEVICE void reduce(float (&v)[N]) {
    reduce_warp<Op>(v);
    const int here = computed_here(rank), lane = here % warp_lanes, mine = here / warp_lanes;
    if (lane < cluster_blocks()) cluster_store(shared.partial[buffer] + mine * slots<N>, lane, v);
    sync_cluster();
    reduce_partials<Op>(shared.partial[buffer], size() / warp_lanes, v);
  }
};

}  // namespace cuda
}  // namespace dlb_fast
