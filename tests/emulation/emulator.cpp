#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"

namespace emulator {

Counters counters;

namespace {

constexpr int warp_size = 32;
constexpr int resident_threads = 2048;  // of several blocks at a time, so that blocks meet blocks
constexpr size_t shared_limit = 48 * 1024;

struct Range {
  uintptr_t begin, end;
  bool writable;
  std::string name;
};
std::vector<Range> memory;

struct Thread;
struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
};
// A collective in flight. Results are read after the release, while faster lanes may deposit for the next one: two sets.
struct Warp {
  Barrier barrier;
  int kind = 0, argument = 0;
  float value[2][warp_size];
  uint64_t generation = 0;
};
struct Block {
  Barrier barrier;
  Barrier* cluster_barrier = nullptr;
  std::vector<std::unique_ptr<Block>>* cluster = nullptr;
  std::vector<Warp> warps;
  alignas(16) unsigned char shared[shared_limit];
  size_t shared_used = 0;
  int running = 0;
};
struct Thread {
  Fiber* fiber;
  Block* block;
  Coordinates at;
  bool finished = false;
};

Thread* current = nullptr;
std::vector<Thread*> runnable;
std::string first_fault;
std::mt19937_64 random_bits;
const std::function<void()>* current_body = nullptr;
std::vector<std::unique_ptr<Fiber>> idle_fibers;

void entry() {
  current->fiber->entered();
  (*current_body)();
  current->finished = true;
  current->fiber->suspend(true);
}

// Waits until everybody expected has arrived.
void arrive(Barrier& barrier) {
  if (++barrier.arrived < barrier.expected) {
    barrier.waiting.push_back(current);
    current->fiber->suspend();
    return;
  }
  barrier.arrived = 0;
  for (Thread* thread : barrier.waiting) runnable.push_back(thread);
  barrier.waiting.clear();
  maybe_yield();  // the last to arrive need not be the first to go on
}

Warp& my_warp() { return current->block->warps[static_cast<size_t>(current->at.thread / warp_size)]; }

// Deposits, waits for all lanes, returns which set of values to read.
int collective(int kind, int argument, float value) {
  Warp& warp = my_warp();
  if (warp.barrier.arrived == 0) {
    warp.kind = kind, warp.argument = argument;
  } else if (warp.kind != kind || warp.argument != argument) {
    fault("the lanes of a warp have met in different collectives");
  }
  const int set = static_cast<int>(warp.generation & 1);
  warp.value[set][current->at.thread % warp_size] = value;
  if (warp.barrier.arrived + 1 == warp.barrier.expected) ++warp.generation;
  arrive(warp.barrier);
  return set;
}

struct Resident {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier cluster_barrier;
  std::vector<std::unique_ptr<Thread>> threads;
};

std::unique_ptr<Resident> start_cluster(const Launch& launch, int index) {
  auto resident = std::make_unique<Resident>();
  for (int rank = 0; rank < launch.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    std::memset(block->shared, 0xff, sizeof block->shared);  // NaN
    block->barrier.expected = block->running = launch.threads;
    block->warps.resize(static_cast<size_t>((launch.threads + warp_size - 1) / warp_size));
    for (size_t w = 0; w < block->warps.size(); ++w)
      block->warps[w].barrier.expected = std::min(warp_size, launch.threads - static_cast<int>(w) * warp_size);
    block->cluster_barrier = &resident->cluster_barrier;
    block->cluster = &resident->blocks;
    for (int t = 0; t < launch.threads; ++t) {
      auto thread = std::make_unique<Thread>();
      if (idle_fibers.empty()) idle_fibers.push_back(std::make_unique<Fiber>());
      thread->fiber = idle_fibers.back().release();
      idle_fibers.pop_back();
      thread->fiber->start(&entry);
      thread->block = block.get();
      thread->at = {t, launch.threads, index * launch.cluster + rank, launch.blocks, rank, launch.cluster};
      runnable.push_back(thread.get());
      resident->threads.push_back(std::move(thread));
    }
    resident->blocks.push_back(std::move(block));
  }
  resident->cluster_barrier.expected = launch.cluster * launch.threads;
  return resident;
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& body) {
  if (launch.blocks % launch.cluster != 0) throw std::runtime_error("grid is not a multiple of the cluster");
  random_bits.seed(launch.seed);
  current_body = &body;
  first_fault.clear();
  runnable.clear();
  std::vector<int> order(static_cast<size_t>(launch.blocks / launch.cluster));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::shuffle(order.begin(), order.end(), random_bits);
  const size_t per_wave = static_cast<size_t>(std::max(1, resident_threads / (launch.threads * launch.cluster)));
  for (size_t begin = 0; begin < order.size() && first_fault.empty(); begin += per_wave) {
    std::vector<std::unique_ptr<Resident>> wave;
    size_t unfinished = 0;
    for (size_t i = begin; i < std::min(order.size(), begin + per_wave); ++i) {
      wave.push_back(start_cluster(launch, order[i]));
      unfinished += wave.back()->threads.size();
    }
    while (!runnable.empty() && first_fault.empty()) {
      std::swap(runnable[random_bits() % runnable.size()], runnable.back());
      current = runnable.back();
      runnable.pop_back();
      current->fiber->resume();
      if (current->finished) {
        --unfinished;
        --current->block->running;
      }
    }
    if (unfinished > 0 && first_fault.empty())
      first_fault = "deadlock: " + std::to_string(unfinished) + " threads wait for others that have left or wait elsewhere";
    for (auto& resident : wave) {
      for (auto& thread : resident->threads) idle_fibers.emplace_back(thread->fiber);
    }
  }
  current = nullptr;
  runnable.clear();
  if (!first_fault.empty()) throw std::runtime_error(first_fault);
}

void clear_memory() {
  memory.clear();
  counters = Counters();
}
void add_memory(const void* begin, size_t bytes, bool writable, const std::string& name) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  memory.push_back({first, first + bytes, writable, name});
}

const Coordinates& here() { return current->at; }

void fault(const std::string& what) {
  if (first_fault.empty())
    first_fault = what + " (block " + std::to_string(current->at.block) + ", thread " + std::to_string(current->at.thread) + ")";
  current->fiber->suspend();  // the scheduler stops at the first fault and never comes back
  std::abort();
}

void check_global(const void* p, size_t bytes, size_t alignment, bool write) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const char* verb = write ? "write" : "read";
  if (at % alignment != 0) fault(std::string("misaligned ") + verb + " of " + std::to_string(bytes) + " bytes");
  for (const Range& range : memory) {
    if (at < range.begin || at + bytes > range.end) continue;
    if (write && !range.writable) continue;
    (write ? (bytes == 16 ? counters.stores16 : counters.stores) : (bytes == 16 ? counters.loads16 : counters.loads)) += 1;
    (write ? counters.bytes_stored : counters.bytes_loaded) += bytes;
    return;
  }
  for (const Range& range : memory) {
    if (write && at >= range.begin && at + bytes <= range.end) fault("write into the input " + range.name);
    if (at + 4096 >= range.begin && at < range.end + 4096) {
      const long long offset = static_cast<long long>(at) - static_cast<long long>(range.begin);
      fault(std::string("out of bounds ") + verb + " at byte " + std::to_string(offset) + " of " + range.name + " (" +
            std::to_string(range.end - range.begin) + " bytes)");
    }
  }
  fault(std::string("out of bounds ") + verb + ", far from every array");
}

void check_prefetch(const void* p, size_t bytes) {
  const Counters before = counters;
  check_global(p, bytes, 1, false);
  counters = before;
  counters.prefetched += bytes;
}

void check_read_only(const void* p, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  for (const Range& range : memory) {
    if (range.writable && at < range.end && at + bytes > range.begin)
      fault("load through the read-only path from " + range.name + ", which the launch writes");
  }
}

void check_shared(const void* p, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < current->block->shared || at + bytes > current->block->shared + current->block->shared_used)
    fault("access outside the block's shared memory");
}

void maybe_yield() {
  if (random_bits() % 8 != 0) return;
  runnable.push_back(current);
  current->fiber->suspend();
}

void* shared_memory(size_t bytes) {
  if (bytes > shared_limit) fault("more than 48 KB of static shared memory");
  current->block->shared_used = bytes;
  return current->block->shared;
}

void sync_block() { arrive(current->block->barrier); }
void sync_cluster() { arrive(*current->block->cluster_barrier); }

float warp_exchange(int mask, float value) {
  const int set = collective(1, mask, value);
  return my_warp().value[set][(current->at.thread % warp_size) ^ mask];
}
float warp_broadcast(int lane, float value) {
  const int set = collective(3, 0, value);
  return my_warp().value[set][lane];
}
bool warp_any(bool value) {
  const int set = collective(2, 0, value ? 1.0f : 0.0f);
  const Warp& warp = my_warp();
  return std::any_of(warp.value[set], warp.value[set] + warp.barrier.expected, [](float v) { return v != 0.0f; });
}

float* address_in_cluster(float* own, int rank) {
  check_shared(own, sizeof(float));
  auto& blocks = *current->block->cluster;
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) fault("no such block in the cluster");
  Block& other = *blocks[static_cast<size_t>(rank)];
  if (other.running < current->at.threads) fault("write into the shared memory of a block that is leaving");
  const ptrdiff_t offset = reinterpret_cast<unsigned char*>(own) - current->block->shared;
  return reinterpret_cast<float*>(other.shared + offset);
}

}  // namespace emulator
