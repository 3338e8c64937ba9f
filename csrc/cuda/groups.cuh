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

// `lanes` neighbours in a warp: several rows per warp, no shared memory and no block barrier.
template <int lanes>
struct LaneGroup {
  static constexpr int launch_threads = 128, min_blocks = 4;
  struct Shared {};
  int rank, index;
  DLB_DEVICE explicit LaneGroup(Shared&) : rank(thread_index() % lanes), index(thread_index() / lanes) {}
  DLB_DEVICE int size() const { return lanes; }
  DLB_DEVICE static int groups_in_grid() { return grid_blocks() * (block_threads() / lanes); }
  DLB_DEVICE int first() const { return block_index() * (block_threads() / lanes); }  // first group of this block
  DLB_DEVICE static int part() { return 0; }  // of a row that this block's first thread prefetches
  DLB_DEVICE static int parts() { return 1; }
  DLB_DEVICE bool prefetches() const { return rank == 0; }
  // The warp's rows go the same way through every shuffle: what one of them needs, all of them execute.
  DLB_DEVICE static bool any(bool value) { return lanes == warp_lanes ? value : warp_any(value); }
  template <typename Op, int buffer, int N>
  DLB_DEVICE void reduce(float (&v)[N]) {
    reduce_lanes<Op>(v, lanes);
  }
};

// The block. A row's reductions go through one scratch buffer each: a buffer is written again only after the barrier of
// another one, which every reader of it has passed; so one barrier per reduction suffices.
template <int threads_at_most, int blocks_at_least>
struct BlockGroup {
  static constexpr int launch_threads = threads_at_most, min_blocks = blocks_at_least;
  struct Shared {
    float partial[3][max_sums][max_block_warps];
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
  DLB_DEVICE static bool any(bool value) { return value; }
  template <typename Op, int buffer, int N>
  DLB_DEVICE void reduce(float (&v)[N]) {
    static_assert(N <= max_sums, "scratch");
    reduce_lanes<Op>(v, warp_lanes);
    const int here = computed_here(rank), lane = here % warp_lanes, warp = here / warp_lanes;
    if (lane == 0) {
      DLB_UNROLL for (int i = 0; i < N; ++i) shared_store(&shared.partial[buffer][i][warp], v[i]);
    }
    sync_block();
    const int other = lane % max_block_warps;
    const bool used = other < block_threads() / warp_lanes;
    DLB_UNROLL for (int i = 0; i < N; ++i) v[i] =
        used ? shared_load(&shared.partial[buffer][i][other]) : Op::identity();
    reduce_lanes<Op>(v, max_block_warps);
  }
};

// A thread-block cluster. Each warp writes its partial into every block's shared memory; one cluster barrier later
// every block holds all of them. Nothing is read remotely and nothing is written after the last barrier, so a block may
// leave.
struct ClusterGroup {
  static constexpr int launch_threads = max_block_threads, min_blocks = 1;
  struct Shared {
    float partial[2][max_cluster * max_block_warps][max_resident_sums];  // an odd stride: no bank conflicts
  };
  Shared& shared;
  int rank;
  static constexpr int index = 0;
  DLB_DEVICE explicit ClusterGroup(Shared& s) : shared(s), rank(cluster_rank() * block_threads() + thread_index()) {
    sync_cluster();  // every block of the cluster runs before anybody writes into its memory
  }
  DLB_DEVICE int size() const { return cluster_blocks() * block_threads(); }
  DLB_DEVICE int groups_in_grid() const { return clusters_in_grid(); }
  DLB_DEVICE int first() const { return cluster_index(); }
  DLB_DEVICE static int part() { return cluster_rank(); }
  DLB_DEVICE static int parts() { return cluster_blocks(); }
  DLB_DEVICE static bool prefetches() { return thread_index() == 0; }
  DLB_DEVICE static bool any(bool value) { return value; }
  template <typename Op, int buffer, int N>
  DLB_DEVICE void reduce(float (&v)[N]) {
    static_assert(N <= max_resident_sums, "scratch");
    reduce_lanes<Op>(v, warp_lanes);
    const int here = computed_here(rank), lane = here % warp_lanes, mine = here / warp_lanes;
    if (lane < cluster_blocks()) cluster_store(shared.partial[buffer][mine], lane, v);
    sync_cluster();
    const int warps = size() / warp_lanes;
    DLB_UNROLL for (int i = 0; i < N; ++i) v[i] = Op::identity();
    DLB_NO_UNROLL for (int w = lane; w < warps; w += warp_lanes) {
      DLB_UNROLL for (int i = 0; i < N; ++i) v[i] = Op::combine(v[i], shared_load(&shared.partial[buffer][w][i]));
    }
    reduce_lanes<Op>(v, warp_lanes);
  }
};

}  // namespace cuda
}  // namespace dlb_fast
