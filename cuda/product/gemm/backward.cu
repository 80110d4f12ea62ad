// The backward product on tensor cores, over columns of the weight.
#include "product/gemm/launch.cuh"

namespace qlora_native::QLN_CUDA {

void multiply_backward(const Product& product, const GemmConfig& config, const StreamKMemory& memory,
                       const Stream& stream) {
  gemm<DecodedColumns>(product, config, memory, stream);
}

}  // namespace qlora_native::QLN_CUDA
