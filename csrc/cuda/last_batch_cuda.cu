// Launching: device facts, kernel choice, launch attributes. Enqueues only.
#include <cuda_runtime.h>

#include <mutex>

#include "count_kernel.cuh"
#include "device_args.cuh"
#include "last_batch_cuda.h"
#include "scale_kernel.cuh"

namespace dlb_fast {
namespace {

using namespace cuda;

constexpr int max_devices = 64;

struct Known {
  bool read = false;
  Device device;
};

// Read once per device; calls inside a graph capture then ask nothing of the runtime.
const char* current_device(Device& out) {
  static std::mutex mutex;
  static Known known[max_devices];
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (index >= max_devices) return "more than 64 CUDA devices";
  std::lock_guard<std::mutex> lock(mutex);
  Known& entry = known[index];
  if (!entry.read) {
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
      if (cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
          cudaOccupancyMaxActiveClusters(&fitting, reinterpret_cast<const void*>(kernel), &config) == cudaSuccess && fitting > 0)
        entry.device.largest_cluster = 16;
      cudaGetLastError();  // a refusal here is an answer, not an error
    }
    entry.read = true;
  }
  out = entry.device;
  return nullptr;
}

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

size_t last_batch_cuda_workspace() { return (sizeof(Workspace) + 15) / 16 * 16; }

const char* last_batch_cuda(const LastBatchArgs& args, void* stream, void* workspace, size_t workspace_bytes) {
  if (const char* reason = refusal(args)) return reason;
  if (workspace == nullptr || workspace_bytes < sizeof(Workspace)) return "workspace smaller than last_batch_cuda_workspace()";
  Device device;
  if (const char* reason = current_device(device)) return reason;
  const LaunchPlan plan = plan_launch(args, device);
  const DeviceArgs d = device_args(args, plan, workspace);
  const Kernel kernel = args.dtype == DType::f32    ? kernel_f32(plan, args.kind)
                        : args.dtype == DType::bf16 ? kernel_bf16(plan, args.kind)
                                                    : kernel_f16(plan, args.kind);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
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
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster), attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks)), config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.stream = on, config.attrs = &attribute, config.numAttrs = 1;
  return text_of(cudaLaunchKernelEx(&config, kernel, d));
}

const char* scale_grad_cuda(const ScaleGradArgs& args, void* stream) {
  if (args.dtype == DType::f64) return "float64 has no CUDA kernel: use impl=\"torch\"";
  if (args.batch == 0 || args.classes == 0) return nullptr;
  Device device;
  if (const char* reason = current_device(device)) return reason;
  const ScaleArgs a = {args.grad, args.batch * args.classes, args.classes, args.upstream, args.parts + part_grad_scale,
                       args.upstream_stride};
  const int64_t packets = a.elements * element_size(args.dtype) / 16 + 1, wanted = (packets + 255) / 256;
  const int64_t most = static_cast<int64_t>(device.multiprocessors) * 8;
  const unsigned blocks = static_cast<unsigned>(wanted < most ? wanted : most);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::f32) scale_kernel<float><<<blocks, 256, 0, on>>>(a);
  else if (args.dtype == DType::bf16) scale_kernel<Bf16><<<blocks, 256, 0, on>>>(a);
  else scale_kernel<F16><<<blocks, 256, 0, on>>>(a);
  return text_of(cudaGetLastError());
}

}  // namespace dlb_fast
