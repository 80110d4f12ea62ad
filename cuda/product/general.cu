// The product of any dtype, shape and alignment, by general.cuh: each operand is read through a source that knows its
// layout. The adapter's part comes first, so that backward's mask falls on nothing else.
#include "product/general.cuh"

#include "product/product.cuh"
#include "product/sources.cuh"

namespace qlora_native::QLN_CUDA {
namespace {

template <class T, bool kBackward>
using Weight = std::conditional_t<kBackward, WeightColumns<T>, WeightRows<T>>;
template <class T, bool kBackward>
using Right = std::conditional_t<kBackward, LoraColumns<T>, LoraRows<T>>;

template <class T, bool kBackward>
__global__ void __launch_bounds__(kProductThreads, 2)
    general_kernel(const __grid_constant__ Product p, const Weight<T, kBackward> weight,
                   const Right<T, kBackward> right) {
  const ProductPlace<T> place(p.rows, p.cols);
  const std::int64_t rank = p.low_rank.cols;
  ProductSums sum = {};
  accumulate(sum, place, Rows<T>{{static_cast<const T*>(p.low_rank.data), p.low_rank.stride}}, right, rank);
  if (kBackward && rank > 0) {
    const Dropout mask = p.dropout.prepared();
    place.each(sum, [&](std::int64_t i, std::int64_t j, float& s) { s = mask.keeps(i, j) ? s : 0.0f; });
  }
  accumulate(sum, place, Rows<T>{{static_cast<const T*>(p.left.data), p.left.stride}}, weight, p.inner);
  const T* const bias = kBackward ? nullptr : static_cast<const T*>(p.bias);
  T* const out = static_cast<T*>(p.out.data);
  place.each(sum, [&](std::int64_t i, std::int64_t j, float s) {
    out[i * p.out.stride + j] = from_f32<T>(bias == nullptr ? s : s + to_f32(bias[j]));
  });
}

template <class T, bool kBackward>
void launch_general(const Product& p, const Stream& stream) {
  const std::int64_t stride = kBackward ? p.cols : p.low_rank.cols;
  const Right<T, kBackward> right{{p.right, p.right_dtype, stride, p.right_factor}};
  launch<general_kernel<T, kBackward>>(product_grid<T>(p.rows, p.cols), stream, p, Weight<T, kBackward>(p.weight),
                                       right);
}

}  // namespace

void multiply(const Product& p, const GeneralConfig&, const Stream& stream) {
  with_type(p.left.dtype,
            [&]<class T>() { p.backward ? launch_general<T, true>(p, stream) : launch_general<T, false>(p, stream); });
}

}  // namespace qlora_native::QLN_CUDA
