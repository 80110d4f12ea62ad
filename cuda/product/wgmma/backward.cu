// The backward product by wgmma.
#include "product/wgmma/launch.cuh"

namespace qlora_native::QLN_CUDA {

void multiply_backward(const Product& product, const WgmmaConfig& config, const StreamKMemory& memory,
                       const Stream& stream) {
  wgmma_gemm<WgmmaColumns>(product, config, memory, stream);
}

}  // namespace qlora_native::QLN_CUDA
