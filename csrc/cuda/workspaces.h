// Which workspace a launch gets. No CUDA header and no torch here: a test walks through it on any machine.
//
// Launches that can run at the same time must not share one. Eager launches of a stream run in order and share. A
// captured graph may be replayed on any stream beside any other graph (but not beside itself: who makes two executables
// of one graph keeps them in order), so a capture has its own, one per stream that it forks into; its launches on one
// stream run in order there too. When the graph is gone it is given back: what a process holds grows with the graphs
// that live at a time, 65 KiB each, not with those it ever captured.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace dlb_fast {
namespace cuda {

struct WorkspaceUser {
  int32_t device = 0;
  const void* stream = nullptr;
  uint64_t capture = 0;  // CUDA's id of the capture, unique in a process; 0: launched at once
  bool operator<(const WorkspaceUser& other) const {
    return std::tie(device, stream, capture) < std::tie(other.device, other.stream, other.capture);
  }
};

struct LentWorkspace {
  char* memory = nullptr;
  WorkspaceUser user;
  LentWorkspace* next = nullptr;
};

class Workspaces {
 public:
  // What cudaMalloc hands out at least.
  static constexpr size_t slab_bytes = size_t(2) << 20;

  explicit Workspaces(size_t bytes) : bytes_((bytes + 127) / 128 * 128) {}
  Workspaces(const Workspaces&) = delete;

  // The workspace of `user`, and whether it has just become so; null where `allocate` returned null. allocate(bytes),
  // called when a device has no spare one, returns memory of that device that any stream finds zeroed. Slabs are never
  // freed: at exit CUDA may be gone.
  template <typename Allocate>
  LentWorkspace* take(const WorkspaceUser& user, bool& fresh, const Allocate& allocate) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = lent_.find(user);
    fresh = found == lent_.end();
    if (!fresh) return found->second;
    collect();
    std::vector<LentWorkspace*>& spare = spare_[user.device];
    if (spare.empty()) {
      const size_t count = slab_bytes / bytes_ > 0 ? slab_bytes / bytes_ : 1;
      char* slab = allocate(count * bytes_);
      if (slab == nullptr) return nullptr;
      for (size_t i = count; i-- > 0;) {
        spare.push_back(new LentWorkspace);
        spare.back()->memory = slab + i * bytes_;
      }
    }
    LentWorkspace* const mine = spare.back();
    spare.pop_back();
    mine->user = user;
    return lent_[user] = mine;
  }

  // From the user's last launch on, from any thread. It waits for no lock: CUDA calls it while somebody may hold ours
  // and wait for CUDA.
  void give_back(LentWorkspace* lent) {
    lent->next = returned_.load();
    while (!returned_.compare_exchange_weak(lent->next, lent)) {
    }
  }

 private:
  void collect() {
    for (LentWorkspace* lent = returned_.exchange(nullptr); lent != nullptr;) {
      LentWorkspace* const next = lent->next;
      lent_.erase(lent->user);
      spare_[lent->user.device].push_back(lent);
      lent = next;
    }
  }

  const size_t bytes_;
  std::mutex mutex_;
  std::map<WorkspaceUser, LentWorkspace*> lent_;
  std::map<int32_t, std::vector<LentWorkspace*>> spare_;
  std::atomic<LentWorkspace*> returned_{nullptr};
};

}  // namespace cuda
}  // namespace dlb_fast
