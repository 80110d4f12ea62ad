// linear_backward_input: V, and dX where gemm_config leaves it to device/product.cuh: dX = mask o (V . A) + dY . W.
#include "device/low_rank.cuh"
#include "device/problem.cuh"
#include "kernels/kernels.h"

namespace qlora_native::QLN_CUDA {
namespace {

template <class T>
__global__ void __launch_bounds__(kProductThreads, 2)
    backward_kernel(const LinearBackwardInputArgs args, const WeightColumns<T> weight, const Matrix v,
                    const Dropout dropout) {
  const ProductPlace<T> place(args.dy.rows, args.weight.K);
  ProductSums sum = {};
  // The adapter's part comes first, so that the mask falls on nothing else.
  accumulate(sum, place, Rows<T>{{static_cast<const T*>(v.data), v.stride}},
             LoraColumns<T>{{args.lora.a, args.lora.dtype, args.weight.K, 1.0f}}, args.lora.rank);
  if (args.lora.rank > 0) {
    const Dropout mask = dropout.prepared();
    place.each(sum, [&](std::int64_t m, std::int64_t k, float& s) { s = mask.keeps(m, k) ? s : 0.0f; });
  }
  accumulate(sum, place, Rows<T>{{static_cast<const T*>(args.dy.data), args.dy.stride}}, weight, args.weight.N);
  T* const dx = static_cast<T*>(args.dx.data);
  place.each(sum, [&](std::int64_t m, std::int64_t k, float s) { dx[m * args.dx.stride + k] = from_f32<T>(s); });
}

template <class T>
void backward(const LinearBackwardInputArgs& args, const Stream& stream) {
  const LoraView& lora = args.lora;
  const std::int64_t M = args.dy.rows, N = args.weight.N;
  const Dropout dropout(lora);
  const Workspace own(low_rank_bytes(args.v, args.dy.dtype, M, lora.rank), stream);
  const Matrix v = low_rank_matrix(args.v, args.dy.dtype, M, lora.rank, own.data());
  if (lora.rank > 0) {
    const Rows<T> dy{{static_cast<const T*>(args.dy.data), args.dy.stride}};
    const LoraColumns<T> b{{lora.b, lora.dtype, lora.rank, 1.0f}};
    low_rank_product(dy, b, N, lora.scaling * dropout.scale, v, stream);
  }
  if (args.dx.data == nullptr) return;
  const GemmConfig config = config_of(args.dy, args.weight, lora, /*backward=*/true, stream);
  if (config.kernel == GemmConfig::Kernel::tensor_cores) return gemm_backward(args, read_only(v), config, stream);
  if (config.kernel == GemmConfig::Kernel::panel) return panels_backward(args, read_only(v), config, stream);
  launch<backward_kernel<T>>(product_grid<T>(M, args.weight.K), stream, args, WeightColumns<T>(args.weight), v,
                             dropout);
}

}  // namespace

void linear_backward_input(const LinearBackwardInputArgs& args, const Stream& stream) {
  with_type(args.dy.dtype, [&]<class T>() { backward<T>(args, stream); });
}

}  // namespace qlora_native::QLN_CUDA
