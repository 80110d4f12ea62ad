// lora_gradients: dA = V^T . drop(X) and dB = s * dY^T . U, which are sums over the rows (low_rank.cuh).
#include "product/low_rank.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

template <class T>
void gradients(const LoraGradientsArgs& args, const Stream& stream) {
  const std::int64_t M = args.x.rows, N = args.dy.cols, K = args.x.cols, rank = args.lora.rank;
  const std::int64_t count = args.lora.count;
  const Groups groups = groups_of_adapters(args.lora, args.groups);
  const auto columns = [](const ConstMatrix& matrix) {
    return Columns<T>{{static_cast<const T*>(matrix.data), matrix.stride}};
  };
  if (args.da != nullptr) {
    const DropoutColumns<T> x{columns(args.x), Dropout(args.lora)};
    const Matrix da{.data = args.da, .dtype = args.lora.dtype, .rows = count * rank, .cols = K, .stride = K};
    multiply(columns(args.v), x, low_rank_gradient(da, count, M, 1.0f, groups, stream), stream);
  }
  if (args.db != nullptr) {
    const Matrix db{.data = args.db, .dtype = args.lora.dtype, .rows = count * N, .cols = rank, .stride = rank};
    multiply(columns(args.dy), columns(args.u), low_rank_gradient(db, count, M, args.lora.scaling, groups, stream),
             stream);
  }
}

}  // namespace

void lora_gradients(const LoraGradientsArgs& args, const Stream& stream) {
  with_type(args.x.dtype, [&]<class T>() { gradients<T>(args, stream); });
}

}  // namespace qlora_native::QLN_CUDA
