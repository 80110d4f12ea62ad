// Checks calls of the CUDA runtime: a failed call becomes an exception that says which call, where and why. Only device
// builds include this file.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace qlora_native::cuda {

// Says what the user can do about an error if the runtime's text does not (availability.cu). Empty for most errors.
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

// Makes a device current while this object lives, then restores the one before. Where both are the same, it never
// calls cudaSetDevice, which would create a context on the device if the process has none there yet.
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

// Every driver takes kernel parameters of up to 4096 bytes. Drivers from R530 (CUDA 12.1) on take up to 32,764 bytes.
// Any CUDA 12 runtime also starts on R525, where the launch of a larger kernel would fail without saying why.
constexpr std::size_t kPortableParameterBytes = 4096;
constexpr int kCuda121 = 12010, kCuda123 = 12030;
inline int driver_version() {
  int version = 0;
  QLN_CHECK_CUDA(cudaDriverGetVersion(&version));
  return version;
}
inline void check_driver_takes_large_parameters() {
  const int version = driver_version();
  if (version >= kCuda121) return;
  throw std::runtime_error("the NVIDIA driver is of CUDA " + std::to_string(version / 1000) + "." +
                           std::to_string(version % 1000 / 10) + ": expected R530, which is of CUDA 12.1, or later");
}

}  // namespace qlora_native::cuda
