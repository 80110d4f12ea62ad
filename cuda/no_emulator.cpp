// The backend "cuda_emulated" of a build without it (QLN_CUDA_EMULATED=OFF): the symbols of backend.cu.
#include "unavailable.h"

namespace qlora_native::cuda_emulated {
namespace {
const char* reason() { return "QLN_BACKEND: this build has no backend cuda_emulated"; }
}  // namespace

const Backend& backend() { return kUnavailableBackend<reason>; }

}  // namespace qlora_native::cuda_emulated
