// The forward product on tensor cores, over rows of the weight.
#include "product/gemm/launch.cuh"

namespace qlora_native::QLN_CUDA {

void multiply_forward(const Product& product, const GemmConfig& config, const StreamKMemory& memory,
                      const Stream& stream) {
  gemm<DecodedRows>(product, config, memory, stream);
}

}  // namespace qlora_native::QLN_CUDA
