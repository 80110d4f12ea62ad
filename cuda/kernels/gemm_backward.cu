// linear_backward_input on tensor cores, for bf16 and fp16 over 4-bit weights: device/gemm.cuh over columns of the
// weight.
#include "device/gemm.cuh"
#include "kernels/kernels.h"

namespace qlora_native::QLN_CUDA {

void gemm_backward(const LinearBackwardInputArgs& args, const ConstMatrix& v, const GemmConfig& config,
                   const Stream& stream) {
  gemm<WeightColumnsOfTile>({.weight = args.weight,
                             .rows = args.dy.rows,
                             .cols = args.weight.K,
                             .inner = args.weight.N,
                             .left = args.dy,
                             .low_rank = v,
                             .right = args.lora.a,
                             .right_dtype = args.lora.dtype,
                             .right_factor = 1.0f,
                             .dropout = Dropout(args.lora),
                             .bias = nullptr,
                             .out = args.dx,
                             .config = config},
                            stream);
}

}  // namespace qlora_native::QLN_CUDA
