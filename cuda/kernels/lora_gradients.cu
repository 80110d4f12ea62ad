// lora_gradients on CUDA cores, for every dtype: dA = V^T . drop(X) and dB = s * dY^T . U, sums over the rows.
#include "device/product.cuh"
#include "device/sources.cuh"
#include "kernels/kernels.h"

namespace qlora_native::QLN_CUDA {
namespace {

template <class Left, class Right>
__global__ void __launch_bounds__(kProductThreads)
    gradient_kernel(const Left left, const Right right, std::int64_t rows, std::int64_t cols, std::int64_t M,
                    float scale, void* out, DType dtype) {
  const ProductPlace place(rows, cols);
  float sum[kProductOwn][kProductOwn] = {};
  accumulate(sum, place, prepared(left), prepared(right), M);
  place.each(sum,
             [&](std::int64_t i, std::int64_t j, float s) { store_from_f32(out, dtype, i * cols + j, s * scale); });
}

template <class T>
void gradients(const LoraGradientsArgs& args, const Stream& stream) {
  const std::int64_t M = args.x.rows, N = args.dy.cols, K = args.x.cols, rank = args.lora.rank;
  const auto columns = [](const ConstMatrix& matrix) {
    return Columns<T>{static_cast<const T*>(matrix.data), matrix.stride};
  };
  if (args.da != nullptr) {
    const KeptColumns<T> x{columns(args.x), Dropout(args.lora)};
    launch<gradient_kernel<Columns<T>, KeptColumns<T>>>(product_grid(rank, K), stream, columns(args.v), x, rank, K, M,
                                                        1.0f, args.da, args.lora.dtype);
  }
  if (args.db != nullptr) {
    launch<gradient_kernel<Columns<T>, Columns<T>>>(product_grid(N, rank), stream, columns(args.dy), columns(args.u), N,
                                                    rank, M, args.lora.scaling, args.db, args.lora.dtype);
  }
}

}  // namespace

void lora_gradients(const LoraGradientsArgs& args, const Stream& stream) {
  with_type(args.x.dtype, [&]<class T>() { gradients<T>(args, stream); });
}

}  // namespace qlora_native::QLN_CUDA
