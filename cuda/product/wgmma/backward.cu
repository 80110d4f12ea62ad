// The backward product by wgmma.
#include "product/wgmma/gemm.cuh"

namespace qlora_native::QLN_CUDA {

void multiply_backward(const Product& product, const HopperConfig& config, Counters& counters, const Stream& stream) {
  hopper_gemm<HopperColumns>(product, config, counters, stream);
}

}  // namespace qlora_native::QLN_CUDA
