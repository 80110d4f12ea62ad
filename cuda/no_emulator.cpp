// The backend "cuda_emulated" of a build without it (QLN_CUDA_EMULATED=OFF): the symbol of backend.cu.
#include "backend.h"
#include "qlora_native/error.h"

namespace qlora_native::cuda_emulated {

const Backend& backend() { throw Unavailable("QLN_BACKEND: this build has no backend cuda_emulated"); }

}  // namespace qlora_native::cuda_emulated
