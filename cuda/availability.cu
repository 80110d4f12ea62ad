// Whether this machine can run the cuda backend, of a build that has it.
#include <cuda_runtime.h>

#include "qlora_native/runtime.h"

namespace qlora_native {

std::string cuda_unavailable_reason() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0) return "";
  cudaGetLastError();
  return std::string("no CUDA device can be used here: ") +
         (error == cudaSuccess ? "the driver reports none" : cudaGetErrorString(error));
}

}  // namespace qlora_native
