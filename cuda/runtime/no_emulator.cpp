// In a build without the emulator (QLN_CUDA_EMULATED=OFF) this file defines the symbol of the emulated backend.cu.
#include "backend.h"
#include "qlora_native/error.h"

namespace qlora_native::cuda_emulated {

const Backend& backend() { throw Unavailable("QLN_BACKEND: this build has no backend cuda_emulated"); }

}  // namespace qlora_native::cuda_emulated
