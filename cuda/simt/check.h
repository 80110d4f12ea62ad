// Calls of the CUDA runtime, checked: a failure is an exception that says which call, where and why. Device builds
// only.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace qlora_native::cuda {

// What a message adds that the runtime does not say; empty for most errors (availability.cu).
std::string remedy_for(cudaError_t error);

inline void check_call(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report this one
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + call + ": " +
                           cudaGetErrorString(error) + remedy_for(error));
}

}  // namespace qlora_native::cuda

#define QLN_CHECK_CUDA(call) ::qlora_native::cuda::check_call((call), #call, __FILE__, __LINE__)

namespace qlora_native::cuda {

// Makes a device current for as long as it lives. What was current before becomes so again only where it was another:
// to make a device current is to make a context on it, if the process has none there yet.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : device_(device) {
    QLN_CHECK_CUDA(cudaGetDevice(&before_));
    if (device_ != before_) QLN_CHECK_CUDA(cudaSetDevice(device_));
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }

 private:
  const int device_;
  int before_ = 0;
};

// Bytes of a kernel's parameters. More of them, up to 32,764, are taken by drivers from R530 on, which is CUDA 12.1's;
// but a runtime of any CUDA 12 starts on R525, whose launch would fail without saying why.
constexpr std::size_t kParametersOfAnyDriver = 4096;
inline void check_driver_takes_large_parameters() {
  constexpr int kCuda121 = 12010;
  int version = 0;
  QLN_CHECK_CUDA(cudaDriverGetVersion(&version));
  if (version >= kCuda121) return;
  throw std::runtime_error("the NVIDIA driver is of CUDA " + std::to_string(version / 1000) + "." +
                           std::to_string(version % 1000 / 10) + ": expected R530, which is of CUDA 12.1, or later");
}

}  // namespace qlora_native::cuda
