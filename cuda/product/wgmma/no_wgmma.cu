// Takes the place of forward.cu and backward.cu in a build without code for sm_90a, with the same symbols.
#include <stdexcept>

#include "product/product.cuh"

namespace qlora_native::QLN_CUDA {

bool has_wgmma(const Stream&) { return false; }

void multiply_forward(const Product&, const WgmmaConfig&, const StreamKMemory&, const Stream&) {
  throw std::logic_error("this build has no code for sm_90a");
}
void multiply_backward(const Product&, const WgmmaConfig&, const StreamKMemory&, const Stream&) {
  throw std::logic_error("this build has no code for sm_90a");
}

}  // namespace qlora_native::QLN_CUDA
