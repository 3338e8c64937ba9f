// A CUDA runtime without a GPU under the compiled launcher (csrc/cuda/last_batch_cuda.cu): it answers as it is told and
// writes down what it was asked. The kernels are stubs; nothing is computed.
#include <cuda_runtime.h>

#include <cstring>
#include <string>

#include "last_batch_cuda.h"
#include "plan.h"

static std::string written;
static int major_ = 9, fitting = 16, ptx = 90, driver = 13000;
static cudaError_t pending = cudaSuccess;
alignas(128) static char memory[1 << 22];

static int launches = 0, allocations = 0, waits = 0;

static void stub() { ++launches, written += "launch\n"; }

namespace dlb_fast {
namespace cuda {
struct DeviceArgs;
using Kernel = void (*)(DeviceArgs);
static Kernel named(const char* name) { return written += name, reinterpret_cast<Kernel>(&stub); }
Kernel kernel_f32(const LaunchPlan&) { return named("f32\n"); }
Kernel kernel_bf16(const LaunchPlan&) { return named("bf16\n"); }
Kernel kernel_f16(const LaunchPlan&) { return named("f16\n"); }
}  // namespace cuda
}  // namespace dlb_fast

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? 132 : major_ >= 9;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* built, const void*) {
  return built->ptxVersion = ptx, cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = driver, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int threads, size_t) {
  written += "room for " + std::to_string(threads) + "\n";
  return *count = 512 / threads, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* config) {
  const int size = static_cast<int>(config->attrs[0].val.clusterDim.x);
  written += "fits " + std::to_string(size) + "\n";
  *count = size <= fitting ? 1 : 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return pending; }  // as after a fault: it stays
const char* cudaGetErrorString(cudaError_t) { return "an illegal memory access was encountered"; }
cudaError_t cudaMalloc(void** p, size_t) { return ++allocations, *p = memory, cudaSuccess; }
cudaError_t cudaFree(void*) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return ++waits, cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaUserObjectCreate(cudaUserObject_t*, void*, cudaHostFn_t, unsigned, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  ++launches;
  int cluster = 1, early = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = static_cast<int>(attribute.val.clusterDim.x);
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      early = attribute.val.programmaticStreamSerializationAllowed;
  }
  written += cluster > 1 ? "cluster " + std::to_string(cluster) : std::to_string(config->gridDim.x) + " blocks";
  written += " of " + std::to_string(config->blockDim.x) + (early ? ", early\n" : "\n");
  return pending;
}
// What nvcc's code calls around <<<>>>; the stub then runs as a host function.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(void**, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return ++launches, written += "small launch\n", pending;
}
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}

// One call on a device of this compute capability, whose clusters hold `fits` blocks, with a fault pending or not.
__attribute__((visibility("default"))) const char* pretend(int major, int ptx_version, int fits, int fault, int dtype,
                                                           int64_t classes, int64_t rows, int driver_version,
                                                           int calls) {
  major_ = major, ptx = ptx_version, fitting = fits, driver = driver_version;
  pending = fault ? cudaErrorIllegalAddress : cudaSuccess;
  dlb_fast::LastBatchArgs args;
  args.batch = rows, args.classes = args.logits_stride = classes;
  args.dtype = args.teacher_dtype = static_cast<dlb_fast::DType>(dtype);
  const char* said = nullptr;
  for (int i = 0; i < calls; ++i) said = dlb_fast::last_batch_cuda(args, nullptr);
  written += said == nullptr ? "fine" : said;
  return written.c_str();
}

// Launches, allocations and waits of two losses and of two factors of their gradient, a line for each call.
__attribute__((visibility("default"))) const char* count(int64_t batch, int64_t classes) {
  dlb_fast::LastBatchArgs args;
  args.batch = batch, args.classes = args.logits_stride = classes;
  dlb_fast::ScaleGradArgs scale;
  scale.batch = batch, scale.classes = classes;
  written.clear();
  std::string lines;
  for (int call = 0; call < 4; ++call) {
    launches = allocations = waits = 0;
    if (call < 2 ? dlb_fast::last_batch_cuda(args, nullptr) : dlb_fast::scale_grad_cuda(scale, nullptr)) return "refused";
    for (int value : {launches, allocations, waits}) lines += std::to_string(value) + " ";
    lines += "\n";
  }
  return (written = lines).c_str();
}
}
