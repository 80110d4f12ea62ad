// The forward product by wgmma, and whether the device has it.
#include "product/wgmma/launch.cuh"

namespace qlora_native::QLN_CUDA {

bool has_wgmma(const Stream& stream) { return is_hopper(stream); }

void multiply_forward(const Product& product, const WgmmaConfig& config, const StreamKMemory& memory,
                      const Stream& stream) {
  wgmma_gemm<WgmmaRows>(product, config, memory, stream);
}

}  // namespace qlora_native::QLN_CUDA
