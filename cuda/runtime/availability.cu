// Queries the CUDA runtime whether this machine can run the backend "cuda". Only builds with that backend have this
// file.
#include "runtime/availability.h"

#include <cuda_runtime.h>

#include "backend.h"
#include "runtime/check.h"

namespace qlora_native {
namespace {

bool read(CudaMachine::Gpu& gpu, int device) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return false;
  gpu = {properties.name, properties.major, properties.minor};
  return true;
}

}  // namespace

namespace cuda {

std::string unavailable_reason() {
  CudaMachine machine{.runtime_version = CUDART_VERSION};
  cudaDriverGetVersion(&machine.driver_version);
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess && error != cudaErrorNoDevice) machine.error = cudaGetErrorString(error);
  for (int device = 0; device < devices; ++device) {
    if (CudaMachine::Gpu gpu; read(gpu, device)) machine.gpus.push_back(gpu);
  }
  cudaGetLastError();  // so that the next call does not report an error of these queries
  return qlora_native::unavailable_reason(machine);
}

std::string remedy_for(cudaError_t error) {
  // Which of them says that a kernel has no code for the device depends on the call and on the driver.
  const bool is_missing_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
                               error == cudaErrorInvalidDeviceFunction;
  if (!is_missing_code) return "";
  int device = 0;
  CudaMachine::Gpu gpu;
  if (cudaGetDevice(&device) != cudaSuccess || !read(gpu, device)) return "";
  return ": " + no_code_for(gpu);
}

}  // namespace cuda
}  // namespace qlora_native
