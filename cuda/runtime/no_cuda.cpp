// In a build without CUDA this file defines the symbols of backend.cu and availability.cu.
#include "backend.h"
#include "qlora_native/error.h"

namespace qlora_native::cuda {

std::string unavailable_reason() {
  return "this build has no CUDA backend: move the tensors to the CPU, or build qlora_native with nvcc and QLN_CUDA=ON";
}

const Backend& backend() { throw Unavailable(unavailable_reason()); }

}  // namespace qlora_native::cuda
