// linear_forward: U, and Y where gemm_config leaves it to device/product.cuh: Y = [X | U] . [W | s*B]^T + bias.
#include "device/low_rank.cuh"
#include "device/problem.cuh"
#include "kernels/kernels.h"

namespace qlora_native::QLN_CUDA {
namespace {

template <class T>
__global__ void __launch_bounds__(kProductThreads, 2)
    forward_kernel(const LinearForwardArgs args, const WeightRows<T> weight, const Matrix u) {
  const ProductPlace<T> place(args.x.rows, args.weight.N);
  ProductSums sum = {};
  accumulate(sum, place, Rows<T>{{static_cast<const T*>(args.x.data), args.x.stride}}, weight, args.weight.K);
  accumulate(sum, place, Rows<T>{{static_cast<const T*>(u.data), u.stride}},
             LoraRows<T>{{args.lora.b, args.lora.dtype, args.lora.rank, args.lora.scaling}}, args.lora.rank);
  const T* const bias = static_cast<const T*>(args.bias);
  T* const y = static_cast<T*>(args.y.data);
  place.each(sum, [&](std::int64_t m, std::int64_t n, float s) {
    y[m * args.y.stride + n] = from_f32<T>(bias == nullptr ? s : s + to_f32(bias[n]));
  });
}

template <class T>
void forward(const LinearForwardArgs& args, const Stream& stream) {
  const LoraView& lora = args.lora;
  const std::int64_t M = args.x.rows, K = args.weight.K;
  const Workspace own(low_rank_bytes(args.u, args.x.dtype, M, lora.rank), stream);
  const Matrix u = low_rank_matrix(args.u, args.x.dtype, M, lora.rank, own.data());
  if (lora.rank > 0) {
    const Dropout dropout(lora);
    const KeptRows<T> x{{{static_cast<const T*>(args.x.data), args.x.stride}}, dropout};
    const LoraRows<T> a{{lora.a, lora.dtype, K, 1.0f}};
    low_rank_product(x, a, K, dropout.scale, u, stream);
  }
  const GemmConfig config = config_of(args.x, args.weight, lora, /*backward=*/false, stream);
  switch (config.kernel) {
    case GemmConfig::Kernel::gemv:
      return gemv_forward(args, read_only(u), config, stream);
    case GemmConfig::Kernel::tensor_cores:
      return gemm_forward(args, read_only(u), config, stream);
    case GemmConfig::Kernel::panel:
      return panels_forward(args, read_only(u), config, stream);
    case GemmConfig::Kernel::general:
      return launch<forward_kernel<T>>(product_grid<T>(M, args.weight.N), stream, args, WeightRows<T>(args.weight), u);
  }
}

}  // namespace

void linear_forward(const LinearForwardArgs& args, const Stream& stream) {
  with_type(args.x.dtype, [&]<class T>() { forward<T>(args, stream); });
}

}  // namespace qlora_native::QLN_CUDA
