// The forward product by wgmma, and whether the device has it.
#include "product/wgmma/gemm.cuh"

namespace qlora_native::QLN_CUDA {

HopperUse hopper_use(const Stream& stream) { return asked_hopper_use(is_hopper(stream)); }

void multiply_forward(const Product& product, const HopperConfig& config, Counters& counters, const Stream& stream) {
  hopper_gemm<HopperRows>(product, config, counters, stream);
}

}  // namespace qlora_native::QLN_CUDA
