// linear_forward on tensor cores, for bf16 and fp16 over 4-bit weights: device/gemm.cuh over rows of the weight.
#include "device/gemm.cuh"
#include "kernels/kernels.h"

namespace qlora_native::QLN_CUDA {

void gemm_forward(const LinearForwardArgs& args, const ConstMatrix& u, const GemmConfig& config, const Stream& stream) {
  gemm<WeightRowsOfTile>({.weight = args.weight,
                          .rows = args.x.rows,
                          .cols = args.weight.N,
                          .inner = args.weight.K,
                          .left = args.x,
                          .low_rank = u,
                          .right = args.lora.b,
                          .right_dtype = args.lora.dtype,
                          .right_factor = args.lora.scaling,
                          .dropout = Dropout(args.lora),
                          .bias = args.bias,
                          .out = args.y,
                          .config = config},
                         stream);
}

}  // namespace qlora_native::QLN_CUDA
