// In a build without CUDA this file defines the symbols of backend.cu and availability.cu.
#include "backend.h"
#include "qlora_native/error.h"
#include "qlora_native/runtime.h"

namespace qlora_native {

std::string cuda_unavailable_reason() { return "this build has no CUDA backend: move the tensors to the CPU"; }

namespace cuda {
const Backend& backend() { throw Unavailable(cuda_unavailable_reason()); }
}  // namespace cuda

}  // namespace qlora_native
