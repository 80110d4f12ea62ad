// Calls of the CUDA runtime, checked: a failure is an exception that says which call, where and why. Device builds
// only.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace qlora_native::cuda {

inline void check_call(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report this one
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + call + ": " +
                           cudaGetErrorString(error));
}

}  // namespace qlora_native::cuda

#define QLN_CHECK_CUDA(call) ::qlora_native::cuda::check_call((call), #call, __FILE__, __LINE__)
