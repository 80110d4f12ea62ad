// The product for any dtype, shape and alignment (general.cuh). Each operand is read through a source that knows its
// layout. The adapter's part comes first, so that the mask of backward falls on nothing else.
#include "product/general.cuh"

#include "product/product.cuh"
#include "product/sources.cuh"

namespace qlora_native::QLN_CUDA {
namespace {

template <class T, bool kBackward>
using Weight = std::conditional_t<kBackward, WeightColumns<T>, WeightRows<T>>;
template <class T, bool kBackward>
using Right = std::conditional_t<kBackward, LoraColumns<T>, LoraRows<T>>;

template <class T, bool kBackward, bool kGrouped>
__global__ void __launch_bounds__(kProductThreads, 2)
    general_kernel(const __grid_constant__ Product p, const Weight<T, kBackward> weight,
                   const Right<T, kBackward> right) {
  const std::int64_t col_tiles = product_col_tiles(p.cols);
  const std::int64_t j0 = block_index() % col_tiles * kProductTile;
  RowTile tile = {{block_index() / col_tiles * kProductTile, p.rows}, 0};
  if constexpr (kGrouped) tile = find_row_tile<kProductTile>(p.groups, p.rows, block_index() / col_tiles).tile;
  if (kGrouped && tile.is_empty()) return;
  const ProductPosition<T> position(tile.begin, tile.end, j0, p.cols);
  const std::int64_t rank = kGrouped && tile.group < 0 ? 0 : p.low_rank.cols;
  ProductSums sum = {};
  const Rows<T> low_rank{{static_cast<const T*>(p.low_rank.data), p.low_rank.stride}};
  const Rows<T> left{{static_cast<const T*>(p.left.data), p.left.stride}};
  if constexpr (kGrouped) {
    accumulate(sum, position, low_rank, advanced(right, p.adapter_index(tile.group) * p.right_elements()), rank);
  } else {
    accumulate(sum, position, low_rank, right, rank);
  }
  if (kBackward && rank > 0) {
    const Dropout mask = p.dropout.with_seed();
    position.each(sum, [&](std::int64_t i, std::int64_t j, float& s) { s = mask.keeps(i, j) ? s : 0.0f; });
  }
  if constexpr (kGrouped) {
    accumulate(sum, position, left, advanced(weight, p.weight_index(tile.group) * p.weight_elements()), p.inner);
  } else {
    accumulate(sum, position, left, weight, p.inner);
  }
  const T* bias = kBackward ? nullptr : static_cast<const T*>(p.bias);
  if (kGrouped && bias != nullptr) bias += p.weight_index(tile.group) * p.cols;
  T* const out = static_cast<T*>(p.out.data);
  position.each(sum, [&](std::int64_t i, std::int64_t j, float s) {
    out[i * p.out.stride + j] = from_f32<T>(bias == nullptr ? s : s + to_f32(bias[j]));
  });
}

template <class T, bool kBackward>
void launch_general(const Product& p, const Stream& stream) {
  const std::int64_t stride = kBackward ? p.cols : p.low_rank.cols;
  const Weight<T, kBackward> weight(p.weight);
  const Right<T, kBackward> right{{p.right, p.right_dtype, stride, p.right_factor}};
  const LaunchShape grid = product_grid(most_row_tiles(p.rows, p.groups.total(), kProductTile), p.cols);
  if (p.groups.count > 0) {
    launch<general_kernel<T, kBackward, true>>(grid, stream, p, weight, right);
  } else {
    launch<general_kernel<T, kBackward, false>>(grid, stream, p, weight, right);
  }
}

}  // namespace

void multiply(const Product& p, const GeneralConfig&, const Stream& stream) {
  with_type(p.left.dtype,
            [&]<class T>() { p.backward ? launch_general<T, true>(p, stream) : launch_general<T, false>(p, stream); });
}

}  // namespace qlora_native::QLN_CUDA
