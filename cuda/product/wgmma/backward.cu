// The backward product by wgmma.
#include "product/wgmma/launch.cuh"

namespace qlora_native::QLN_CUDA {

void multiply_backward(const Product& product, const WgmmaConfig& config, Counters& counters, const Stream& stream) {
  wgmma_gemm<WgmmaColumns>(product, config, counters, stream);
}

}  // namespace qlora_native::QLN_CUDA
