// Launching: device facts, kernel choice, launch attributes, workspaces.
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <tuple>

#include "count_kernel.cuh"
#include "device_args.cuh"
#include "last_batch_cuda.h"
#include "scale_kernel.cuh"
#include "workspaces.h"

#ifndef DLB_FAST_CUDA_ARCHS
#define DLB_FAST_CUDA_ARCHS "?"
#endif

namespace dlb_fast {
namespace {

using namespace cuda;

constexpr int max_devices = 64;

struct Known {
  bool read = false;
  Device device;
};

// While it lives, this thread may allocate and load code without ending a capture that goes on, in this thread or
// another.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// What CUDA said, as text; nullptr for success. Marked, because it is no refusal: it may be the fault of work that was
// queued before, and what this call was to write may be written in part.
const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static thread_local char text[256];
  std::snprintf(text, sizeof text,
                "%s%s (seen when dlb_fast launched; perhaps the fault of an earlier kernel: CUDA_LAUNCH_BLOCKING=1 "
                "shows where)",
                cuda_error, cudaGetErrorString(error));
  return text;
}

Kernel kernel_of(DType dtype, const LaunchPlan& plan) {
  return dtype == DType::f32 ? kernel_f32(plan) : dtype == DType::bf16 ? kernel_bf16(plan) : kernel_f16(plan);
}

// A launch of `blocks` blocks of a plan's shape, where CUDA takes it from.
struct Shape {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};
  Shape(const LaunchPlan& plan, int blocks, cudaStream_t stream = nullptr) {
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.stream = stream, config.attrs = attributes;
    if (plan.cluster == 1) return;
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster), attribute.val.clusterDim.y = 1,
    attribute.val.clusterDim.z = 1;
  }
  Shape(const Shape&) = delete;
  // Its blocks may begin while the kernel before it ends.
  void begins_early() {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
};

// How many blocks of a kernel the device holds at a time; 0 where it holds none, or no cluster. 16 blocks are the non-portable size of a cluster and have to be allowed first.
int64_t resident_blocks(const void* function, const LaunchPlan& plan, int multiprocessors) {
  int fitting = 0;
  if (plan.cluster == 1) {
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, function, plan.threads, 0) != cudaSuccess) return 0;
    return static_cast<int64_t>(fitting) * multiprocessors;
  }
  if (plan.cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return 0;
  }
  const Shape shape(plan, plan.cluster);
  if (cudaOccupancyMaxActiveClusters(&fitting, function, &shape.config) != cudaSuccess) return 0;
  return static_cast<int64_t>(fitting) * plan.cluster;
}

// The largest cluster of 512 threads a block that finds room on one group of multiprocessors: a slice of a GPU may not
// hold 8. 0 where none does.
int largest_cluster(const void* function) {
  LaunchPlan plan;
  plan.threads = 512;
  for (plan.cluster = 16; plan.cluster > 1; plan.cluster /= 2)
    if (resident_blocks(function, plan, 0) > 0) return plan.cluster;
  return 0;
}

// Read once per device, with a kernel of the first call's dtype: another one would load a module that nobody needs.
const char* current_device(DType dtype, Device& out, int& index) {
  static std::mutex mutex;
  static Known known[max_devices];
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return text_of(error);
  if (index >= max_devices) return "more than 64 CUDA devices";
  std::lock_guard<std::mutex> lock(mutex);
  Known& entry = known[index];
  if (!entry.read) {
    const RelaxedCapture relaxed;
    int can_cluster = 0, driver = 0;
    error = cudaDeviceGetAttribute(&entry.device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&can_cluster, cudaDevAttrClusterLaunch, index);
    if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
    if (error != cudaSuccess) return text_of(error);
    // PTX made for an older GPU holds no code for either.
    const void* const function = reinterpret_cast<const void*>(kernel_of(dtype, {Regime::cluster}));
    cudaFuncAttributes built = {};
    if (can_cluster && cudaFuncGetAttributes(&built, function) == cudaSuccess && built.ptxVersion >= 90) {
      entry.device.dependent_launch = driver >= 12030;  // from there on in a captured graph, too
      entry.device.largest_cluster = largest_cluster(function);
    }
    cudaGetLastError();  // a refusal here is an answer, not an error
    entry.read = true;
  }
  out = entry.device;
  return nullptr;
}

// The same of a plan's kernel, remembered, because asking takes longer than a launch.
int64_t resident_on(int index, Kernel kernel, const LaunchPlan& plan, int multiprocessors) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, int, int>, int64_t> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, fresh] = known.try_emplace({index, kernel, plan.threads, plan.cluster}, 0);
  if (fresh) {
    const RelaxedCapture relaxed;
    entry->second = resident_blocks(reinterpret_cast<const void*>(kernel), plan, multiprocessors);
    cudaGetLastError();  // the launch will say it again
  }
  return entry->second;
}

Workspaces& workspaces() {
  static Workspaces& all = *new Workspaces(sizeof(Workspace));
  return all;
}

// Zeroed on a stream of its own and waited for: whichever stream comes first, captured or not, finds zeros, and no
// graph zeroes them again. Not from torch's allocator: what it hands out during a capture belongs to the graph.
char* zeroed_slab(size_t bytes, cudaError_t& error) {
  const RelaxedCapture relaxed;
  void* memory = nullptr;
  cudaStream_t side = nullptr;
  error = cudaMalloc(&memory, bytes);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, bytes, side);
  if (error == cudaSuccess) error = cudaStreamSynchronize(side);
  if (side != nullptr) cudaStreamDestroy(side);
  if (error != cudaSuccess && memory != nullptr) cudaFree(memory);
  if (error == cudaSuccess) return static_cast<char*>(memory);
  cudaGetLastError();  // the caller reports it; the next launch must not
  return nullptr;
}

// CUDA calls back once it has let go of the graph and of all that was instantiated from it, launches on their way
// included.
void return_with(cudaGraph_t graph, LentWorkspace* lent) {
  const auto gone = [](void* p) { workspaces().give_back(static_cast<LentWorkspace*>(p)); };
  cudaUserObject_t object = nullptr;
  cudaError_t error = cudaUserObjectCreate(&object, lent, gone, 1, cudaUserObjectNoDestructorSync);
  if (error == cudaSuccess) error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (error != cudaSuccess) cudaGetLastError();  // then this one is never given back
}

const char* workspace_for(int device, cudaStream_t stream, void*& memory) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture, &graph);
  if (error != cudaSuccess) return text_of(error);
  const bool capturing = status == cudaStreamCaptureStatusActive;
  bool fresh = false;
  LentWorkspace* const lent = workspaces().take({device, stream, capturing ? capture : 0}, fresh,
                                                [&error](size_t bytes) { return zeroed_slab(bytes, error); });
  if (lent == nullptr) {
    if (capturing)
      return "no device memory for counters while a CUDA graph is captured: call the loss once before capturing";
    if (error == cudaErrorMemoryAllocation)
      return "no 2 MiB of device memory for counters: torch.cuda.empty_cache() may free some";
    return text_of(error);
  }
  if (capturing && fresh) return_with(graph, lent);
  memory = lent->memory;
  return nullptr;
}

}  // namespace

extern "C" const char* dlb_fast_cuda_build() {
#define DLB_TEXT_OF(x) #x
#define DLB_TEXT(x) DLB_TEXT_OF(x)
  return DLB_FAST_CUDA_ARCHS " " DLB_TEXT(CUDART_VERSION);
}

const char* last_batch_cuda(const LastBatchArgs& args, void* stream, int64_t most_blocks) {
  if (const char* reason = refusal(args)) return reason;
  Device device;
  int index = 0;
  if (const char* reason = current_device(args.dtype, device, index)) return reason;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  void* workspace = nullptr;
  if (const char* reason = workspace_for(index, on, workspace)) return reason;
  LaunchPlan plan = plan_launch(args, device);
  const Kernel kernel = kernel_of(args.dtype, plan);
  const int64_t resident = resident_on(index, kernel, plan, device.multiprocessors);
  fit_grid(plan, resident < most_blocks ? resident : most_blocks);
  const DeviceArgs d = device_args(args, plan, workspace);
  Shape shape(plan, plan.blocks, on);
  cudaGetLastError();  // clears the error of an earlier call, which would otherwise be taken for this launch's
  if (plan.count_blocks > 0) {
    count_kernel<<<plan.count_blocks, 256, 0, on>>>(d);
    if (device.dependent_launch) shape.begins_early();
  }
  const cudaError_t error = cudaLaunchKernelEx(&shape.config, kernel, d);
  const cudaError_t earlier = cudaGetLastError();  // of the first launch, or of a kernel before
  return text_of(error != cudaSuccess ? error : earlier);
}

const char* scale_grad_cuda(const ScaleGradArgs& args, void* stream) {
  if (args.dtype == DType::f64) return "float64 has no CUDA kernel: use impl=\"torch\"";
  if (args.batch == 0 || args.classes == 0) return nullptr;
  Device device;
  int index = 0;
  if (const char* reason = current_device(args.dtype, device, index)) return reason;
  const ScaleArgs a = {args.grad, args.batch * args.classes, args.classes, args.upstream, args.parts + part_grad_scale,
                       args.upstream_stride};
  const int64_t packets = a.elements * element_size(args.dtype) / 16 + 1, wanted = (packets + 255) / 256;
  const int64_t most = static_cast<int64_t>(device.multiprocessors) * 8;
  const unsigned blocks = static_cast<unsigned>(wanted < most ? wanted : most);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaGetLastError();
  if (args.dtype == DType::f32) scale_kernel<float><<<blocks, 256, 0, on>>>(a);
  else if (args.dtype == DType::bf16) scale_kernel<Bf16><<<blocks, 256, 0, on>>>(a);
  else scale_kernel<F16><<<blocks, 256, 0, on>>>(a);
  return text_of(cudaGetLastError());
}

}  // namespace dlb_fast
