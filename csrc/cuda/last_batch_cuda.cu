// Launching: device facts, kernel choice, launch attributes, workspaces.
#include <cuda_runtime.h>

#include <mutex>

#include "count_kernel.cuh"
#include "device_args.cuh"
#include "last_batch_cuda.h"
#include "scale_kernel.cuh"
#include "workspaces.h"

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

// Read once per device.
const char* current_device(Device& out, int& index) {
  static std::mutex mutex;
  static Known known[max_devices];
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (index >= max_devices) return "more than 64 CUDA devices";
  std::lock_guard<std::mutex> lock(mutex);
  Known& entry = known[index];
  if (!entry.read) {
    const RelaxedCapture relaxed;
    int major = 0, can_cluster = 0;
    error = cudaDeviceGetAttribute(&entry.device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&can_cluster, cudaDevAttrClusterLaunch, index);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    entry.device.largest_cluster = major >= 9 && can_cluster ? 8 : 0;
    if (entry.device.largest_cluster > 0) {
      // 16 blocks of 512 threads must find room on one cluster of processors, which not every part of every chip has.
      const Kernel kernel = kernel_bf16({Regime::cluster}, TeacherKind::logits);
      cudaLaunchConfig_t config = {};
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = 16, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
      config.gridDim = dim3(16), config.blockDim = dim3(512);
      config.attrs = &attribute, config.numAttrs = 1;
      int fitting = 0;
      if (cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed,
                               1) == cudaSuccess &&
          cudaOccupancyMaxActiveClusters(&fitting, reinterpret_cast<const void*>(kernel), &config) == cudaSuccess &&
          fitting > 0)
        entry.device.largest_cluster = 16;
      cudaGetLastError();  // a refusal here is an answer, not an error
    }
    entry.read = true;
  }
  out = entry.device;
  return nullptr;
}

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

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
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const bool capturing = status == cudaStreamCaptureStatusActive;
  bool fresh = false;
  LentWorkspace* const lent = workspaces().take({device, stream, capturing ? capture : 0}, fresh,
                                                [&error](size_t bytes) { return zeroed_slab(bytes, error); });
  if (lent == nullptr) {
    if (capturing)
      return "no device memory for counters while a CUDA graph is captured: call the loss once before capturing";
    if (error == cudaErrorMemoryAllocation)
      return "no 2 MiB of device memory for counters: torch.cuda.empty_cache() may free some";
    return cudaGetErrorString(error);
  }
  if (capturing && fresh) return_with(graph, lent);
  memory = lent->memory;
  return nullptr;
}

}  // namespace

const char* last_batch_cuda(const LastBatchArgs& args, void* stream) {
  if (const char* reason = refusal(args)) return reason;
  Device device;
  int index = 0;
  if (const char* reason = current_device(device, index)) return reason;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  void* workspace = nullptr;
  if (const char* reason = workspace_for(index, on, workspace)) return reason;
  const LaunchPlan plan = plan_launch(args, device);
  const DeviceArgs d = device_args(args, plan, workspace);
  const Kernel kernel = args.dtype == DType::f32    ? kernel_f32(plan, args.kind)
                        : args.dtype == DType::bf16 ? kernel_bf16(plan, args.kind)
                                                    : kernel_f16(plan, args.kind);
  cudaGetLastError();  // clears the error of an earlier call, which would otherwise be taken for this launch's
  if (plan.count_blocks > 0) count_kernel<<<plan.count_blocks, 256, 0, on>>>(d);
  if (plan.cluster == 1) {
    kernel<<<plan.blocks, plan.threads, 0, on>>>(d);
    return text_of(cudaGetLastError());
  }
  if (plan.cluster > 8) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster), attribute.val.clusterDim.y = 1,
  attribute.val.clusterDim.z = 1;
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks)),
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.stream = on, config.attrs = &attribute, config.numAttrs = 1;
  return text_of(cudaLaunchKernelEx(&config, kernel, d));
}

const char* scale_grad_cuda(const ScaleGradArgs& args, void* stream) {
  if (args.dtype == DType::f64) return "float64 has no CUDA kernel: use impl=\"torch\"";
  if (args.batch == 0 || args.classes == 0) return nullptr;
  Device device;
  int index = 0;
  if (const char* reason = current_device(device, index)) return reason;
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
