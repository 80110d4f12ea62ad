// Implements launch.h by the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

#include "runtime/capture.h"
#include "runtime/check.h"

namespace qlora_native::cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(const Stream& stream) : current_(stream.index) {}

 private:
  CurrentDevice current_;
};

inline cudaStream_t handle_of(const Stream& stream) { return static_cast<cudaStream_t>(stream.handle); }

// The shared memory of a block where the kernel's limit was not raised.
constexpr std::size_t kDefaultMaxSmemBytes = 48 * 1024;

// Raises the kernel's limit of shared memory on this device, unless an earlier launch has raised it as far.
template <auto kKernel>
void raise_smem_limit(std::size_t bytes, int device) {
  constexpr int kDevices = 64;  // for a device beyond them, every launch raises the limit
  static std::atomic<std::size_t> limits[kDevices];
  const bool is_remembered = device >= 0 && device < kDevices;
  if (is_remembered && limits[device].load(std::memory_order_relaxed) >= bytes) return;
  const RelaxedCapture relaxed;  // the call may load the kernel's code
  QLN_CHECK_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  if (is_remembered) limits[device].store(bytes, std::memory_order_relaxed);
}

// The virtual architecture, 80, 90, 100, ..., of the PTX that became the code which this device runs, whether nvcc or
// the driver has compiled it. (The attribute's binaryVersion is the device's where the driver has.)
template <auto kKernel>
int ptx_version(const Stream& stream) {
  constexpr int kDevices = 64;  // as in raise_smem_limit()
  static std::atomic<int> versions[kDevices];
  const bool is_remembered = stream.index >= 0 && stream.index < kDevices;
  if (is_remembered) {
    if (const int version = versions[stream.index].load(std::memory_order_relaxed); version != 0) return version;
  }
  cudaFuncAttributes attributes{};
  const RelaxedCapture relaxed;  // the call may load the kernel's code
  QLN_CHECK_CUDA(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)));
  if (is_remembered) versions[stream.index].store(attributes.ptxVersion, std::memory_order_relaxed);
  return attributes.ptxVersion;
}
// CUDA graphs have such launches from CUDA 12.3 on, and any launch may be captured into a graph.
inline bool supports_programmatic_launch() { return driver_version() >= kCuda123; }

template <class... Parameters>
void launch_function(void (*kernel)(Parameters...), const LaunchShape& shape, const Stream& stream,
                     std::type_identity_t<Parameters>... arguments) {
  if constexpr ((sizeof(Parameters) + ... + 0) > kPortableParameterBytes) check_driver_takes_large_parameters();
  const auto* function = reinterpret_cast<const void*>(kernel);
  void* pointers[] = {&arguments...};
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {.gridDim = dim3(static_cast<unsigned>(shape.blocks)),
                               .blockDim = dim3(static_cast<unsigned>(shape.threads)),
                               .dynamicSmemBytes = shape.smem_bytes,
                               .stream = handle_of(stream),
                               .attrs = attributes,
                               .numAttrs = 0};
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.programmatic_launch && supports_programmatic_launch()) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  QLN_CHECK_CUDA(cudaLaunchKernelExC(&config, function, pointers));
}
template <auto kKernel, class... Args>
void launch_kernel(const LaunchShape& shape, const Stream& stream, const Args&... args) {
  if (shape.blocks == 0) return;
  if (shape.smem_bytes > kDefaultMaxSmemBytes) raise_smem_limit<kKernel>(shape.smem_bytes, stream.index);
  launch_function(kKernel, shape, stream, args...);
}

// Calls of the driver's own functions need a context that is current in the calling thread. In a thread whose first
// call this is, none is (pytorch/pytorch#195256), even if the device is the right one. Many functions of the runtime
// make the device's primary context current where there is none; cudaFree(nullptr) is the one that does nothing else.
inline void bind_context(const Stream&) {
  thread_local bool is_bound = false;
  if (is_bound) return;
  const RelaxedCapture relaxed;
  QLN_CHECK_CUDA(cudaFree(nullptr));
  is_bound = true;
}

// A Workspace takes this memory if the application gives none (memory.cu).
DeviceMemory allocate_workspace(std::size_t bytes, const Stream& stream);
void release_workspace(const DeviceMemory& memory, const Stream& stream);
// Only the emulator needs these (launch_emulated.h); on a device they do nothing.
inline void make_reachable(const DeviceMemory&, std::size_t) {}
inline void make_unreachable(const DeviceMemory&) {}
inline void poison(void*, std::size_t) {}
struct DeviceWork {
  DeviceWork() {}
};

inline void fill_bytes(void* data, int byte, std::size_t bytes, const Stream& stream) {
  QLN_CHECK_CUDA(cudaMemsetAsync(data, byte, bytes, handle_of(stream)));
}

inline int num_sms(const Stream& stream) {
  int count = 0;
  QLN_CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stream.index));
  return count;
}

// The largest shared memory of a block.
inline std::size_t max_smem_bytes(const Stream& stream) {
  int bytes = 0;
  QLN_CHECK_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.index));
  return static_cast<std::size_t>(bytes);
}
// The shared memory of each block that the device reserves. dynamic_smem() begins behind it, or at address 0.
inline std::size_t reserved_smem_bytes(const Stream& stream) {
  int bytes = 0;
  QLN_CHECK_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrReservedSharedMemoryPerBlock, stream.index));
  return static_cast<std::size_t>(bytes);
}

inline int compute_capability(const Stream& stream) {
  int major = 0, minor = 0;
  QLN_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, stream.index));
  QLN_CHECK_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, stream.index));
  return 10 * major + minor;
}
// No other device, not even a later one, runs code for sm_90a.
inline bool is_hopper(const Stream& stream) { return compute_capability(stream) == 90; }

}  // namespace qlora_native::cuda
