// For csrc/cuda's sources under the host compiler (what the kernels compile to runs on tests/ptx): an execution model of a
// GPU, small enough to read: blocks of threads as fibers, warps of 32, barriers, shuffles,
// clusters with distributed shared memory, and global memory of which every access is checked.
//
// What it shows: a missing barrier or fence between threads (whoever may run next is drawn at random, also in the middle
// of a stretch between barriers), divergent collectives, deadlocks, reads and writes outside the registered arrays or
// against their alignment, writes into inputs, use of uninitialised shared memory (it starts as NaN), writes into the
// shared memory of a block that has left. What it does not: speed, the hardware's memory model, ex2.approx's error.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

struct Launch {
  int blocks = 1, threads = 32, cluster = 1;
  uint64_t seed = 0;
};

// Runs `body` once per thread of the grid; throws std::runtime_error with the first fault.
void run(const Launch& launch, const std::function<void()>& body);

// Global memory that kernels may touch.
void clear_memory();
void add_memory(const void* begin, size_t bytes, bool writable, const std::string& name);

struct Counters {
  uint64_t loads16 = 0, stores16 = 0, loads = 0, stores = 0, bytes_loaded = 0, bytes_stored = 0, prefetched = 0;
};
extern Counters counters;  // of global memory, since the last clear_memory()

// For the device dictionary.
struct Coordinates {
  int thread, threads, block, blocks, cluster_rank, cluster_blocks;
};
const Coordinates& here();
[[noreturn]] void fault(const std::string& what);
void check_global(const void* p, size_t bytes, size_t alignment, bool write);
void check_prefetch(const void* p, size_t bytes);  // moves nothing, but stays inside the arrays
void check_read_only(const void* p, size_t bytes);  // the launch may write none of it
void check_shared(const void* p, size_t bytes);
void maybe_yield();
void* shared_memory(size_t bytes);
void sync_block();
void sync_cluster();
// All 32 lanes call the same collective with the same argument; returns the lane's result.
float warp_exchange(int mask, float value);
float warp_broadcast(int lane, float value);
bool warp_any(bool value);
float* address_in_cluster(float* own, int rank);

}  // namespace emulator
