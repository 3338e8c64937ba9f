// Host code of csrc/cuda for Python: which kernel a call gets and what is handed to it, pointers as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <unordered_map>

#include "device_args.cuh"
#include "workspaces.h"

namespace py = pybind11;
using namespace dlb_fast;
using namespace dlb_fast::cuda;

namespace {

template <typename P>
P pointer(const py::dict& d, const char* name) {
  return d.contains(name) ? reinterpret_cast<P>(d[name].cast<uintptr_t>()) : nullptr;
}
template <typename X>
void number(const py::dict& d, const char* name, X& out) {
  if (!d.contains(name)) return;
  if constexpr (std::is_enum_v<X>) out = static_cast<X>(d[name].cast<int32_t>());
  else out = d[name].cast<X>();
}

LastBatchArgs arguments(const py::dict& d) {
  LastBatchArgs a;
  number(d, "batch", a.batch), number(d, "classes", a.classes), number(d, "dtype", a.dtype);
  a.logits = pointer<const void*>(d, "logits"), number(d, "logits_stride", a.logits_stride);
  a.target = pointer<const int64_t*>(d, "target"), number(d, "target_stride", a.target_stride);
  a.target_b = pointer<const int64_t*>(d, "target_b"), number(d, "target_b_stride", a.target_b_stride);
  a.lam = pointer<const void*>(d, "lam"), number(d, "lam_stride", a.lam_stride);
  a.dense = pointer<const void*>(d, "dense"), number(d, "dense_stride", a.dense_stride);
  a.weight = pointer<const void*>(d, "weight");
  number(d, "kind", a.kind), number(d, "teacher_dtype", a.teacher_dtype);
  a.teacher = pointer<const void*>(d, "teacher"), number(d, "teacher_stride", a.teacher_stride);
  number(d, "teacher_rows", a.teacher_rows);
  a.rows = pointer<void*>(d, "rows"), number(d, "rows_stride", a.rows_stride), number(d, "capacity", a.capacity);
  a.slots = pointer<int64_t*>(d, "slots"), a.ids = pointer<const int64_t*>(d, "ids"), number(d, "num_old", a.num_old);
  number(d, "again", a.again);
  a.kd_mask = pointer<const bool*>(d, "kd_mask"), number(d, "kd_mask_rows", a.kd_mask_rows);
  a.alpha_ptr = pointer<const void*>(d, "alpha_ptr"), a.temperature_ptr = pointer<const void*>(d, "temperature_ptr");
#define DLB_NUMBER(name, initial) number(d, #name, a.name);
#define DLB_INTEGER(name, type, initial) number(d, #name, a.name);
  DLB_NUMBER_OPTIONS(DLB_NUMBER)
  DLB_INTEGER_OPTIONS(DLB_INTEGER)
  a.loss = pointer<void*>(d, "loss"), a.parts = pointer<void*>(d, "parts"), a.grad = pointer<void*>(d, "grad");
  return a;
}

const char* name_of(Regime regime) {
  constexpr const char* names[] = {"lanes", "warp", "block", "cluster", "two_pass_warp", "two_pass_block"};
  return names[static_cast<int>(regime)];
}

py::dict described(const LaunchPlan& plan) {
  py::dict d;
  d["regime"] = name_of(plan.regime), d["general"] = plan.general, d["whole"] = plan.whole;
  d["threads"] = plan.threads, d["blocks"] = plan.blocks;
  d["cluster"] = plan.cluster, d["count_blocks"] = plan.count_blocks;
  return d;
}

// As on a device whose multiprocessors hold 512 threads: 128 registers each.
LaunchPlan planned(const LastBatchArgs& a, int multiprocessors, int largest_cluster) {
  LaunchPlan plan = plan_launch(a, {multiprocessors, true, largest_cluster});
  fit_grid(plan, multiprocessors * (512 / plan.threads));
  return plan;
}

py::object plan_of(const py::dict& d, int multiprocessors, int largest_cluster) {
  const LastBatchArgs a = arguments(d);
  if (const char* reason = refusal(a)) return py::str(reason);
  return described(planned(a, multiprocessors, largest_cluster));
}

// The plan, and the bytes of the kernel's parameter.
py::tuple launch_of(const py::dict& d, uintptr_t workspace, int multiprocessors, int largest_cluster) {
  const LastBatchArgs a = arguments(d);
  if (const char* reason = refusal(a)) throw py::value_error(reason);
  const LaunchPlan plan = planned(a, multiprocessors, largest_cluster);
  const DeviceArgs on_device = device_args(a, plan, reinterpret_cast<void*>(workspace));
  return py::make_tuple(described(plan), py::bytes(reinterpret_cast<const char*>(&on_device), sizeof on_device));
}

// The launcher's bookkeeping of workspaces with an allocator of Python's; memory as an integer.
class PyWorkspaces {
 public:
  explicit PyWorkspaces(size_t bytes) : all_(bytes) {}
  std::pair<uintptr_t, bool> take(int32_t device, uintptr_t stream, uint64_t capture, const py::function& allocate) {
    bool fresh = false;
    LentWorkspace* const lent = all_.take({device, reinterpret_cast<void*>(stream), capture}, fresh, [&](size_t bytes) {
      return reinterpret_cast<char*>(allocate(device, bytes).cast<uintptr_t>());
    });
    if (lent == nullptr) return {0, fresh};
    const uintptr_t memory = reinterpret_cast<uintptr_t>(lent->memory);
    known_[memory] = lent;
    return {memory, fresh};
  }
  void give_back(uintptr_t memory) { all_.give_back(known_.at(memory)); }

 private:
  Workspaces all_;
  std::unordered_map<uintptr_t, LentWorkspace*> known_;
};

}  // namespace

PYBIND11_MODULE(dlb_fast_host, m) {
  m.def("plan", &plan_of);
  m.def("launch", &launch_of);
  py::class_<PyWorkspaces>(m, "Workspaces")
      .def(py::init<size_t>())
      .def("take", &PyWorkspaces::take)
      .def("give_back", &PyWorkspaces::give_back);
  m.attr("workspace_bytes") = sizeof(Workspace);
}
