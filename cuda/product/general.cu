// The product for any dtype, shape and alignment (general.cuh). Each operand is read through a source that knows its
// layout. The adapter's part comes first, so that the mask of backward falls on nothing else.
#include "product/general.cuh"

#include "product/product.cuh"
#include "product/sources.cuh"

namespace qlora_native::QLN_CUDA {
namespace {

template <class T, bool kPlain, bool kBackward>
using Weight = std::conditional_t<kBackward, WeightColumns<T, kPlain>, WeightRows<T, kPlain>>;
template <class T, bool kBackward>
using Lora = std::conditional_t<kBackward, LoraColumns<T>, LoraRows<T>>;

// How many blocks an SM holds at once. In fp32 the registers of two are too few for what only other scales need.
template <class T, bool kPlain>
constexpr int kGeneralBlocks = kPlain || kOnTensorCores<T> ? 2 : 1;

template <class T, bool kPlain, bool kBackward, bool kGrouped>
__global__ void __launch_bounds__(kProductThreads, kGeneralBlocks<T, kPlain>)
    general_kernel(const __grid_constant__ Product p, const Weight<T, kPlain, kBackward> weight,
                   const Lora<T, kBackward> lora) {
  const std::int64_t col_tiles = product_col_tiles(p.cols);
  const std::int64_t j0 = block_index() % col_tiles * kProductTile;
  RowTile tile = {{block_index() / col_tiles * kProductTile, p.rows}, 0};
  if constexpr (kGrouped) tile = find_row_tile<kProductTile>(p.groups, p.rows, block_index() / col_tiles).tile;
  if (kGrouped && tile.is_empty()) return;
  const ProductPosition<T> position(tile.begin, tile.end, j0, p.cols);
  const std::int64_t rank = kGrouped && tile.group < 0 ? 0 : p.u.cols;
  ProductAccumulators sum = {};
  const Rows<T> u{{static_cast<const T*>(p.u.data), p.u.stride}};
  const Rows<T> x{{static_cast<const T*>(p.x.data), p.x.stride}};
  if constexpr (kGrouped) {
    accumulate(sum, position, u, advanced(lora, p.adapter_index(tile.group) * p.lora_elements()), rank);
  } else {
    accumulate(sum, position, u, lora, rank);
  }
  if (kBackward && rank > 0) {
    const Dropout mask = p.dropout.with_seed();
    position.each(sum, [&](std::int64_t i, std::int64_t j, float& s) { s = mask.keeps(i, j) ? s : 0.0f; });
  }
  if constexpr (kGrouped) {
    accumulate(sum, position, x, advanced(weight, p.weight_index(tile.group) * p.weight_elements()), p.inner);
  } else {
    accumulate(sum, position, x, weight, p.inner);
  }
  const T* bias = kBackward ? nullptr : static_cast<const T*>(p.bias);
  if (kGrouped && bias != nullptr) bias += p.weight_index(tile.group) * p.cols;
  T* const out = static_cast<T*>(p.out.data);
  position.each(sum, [&](std::int64_t i, std::int64_t j, float s) {
    out[i * p.out.stride + j] = from_f32<T>(bias == nullptr ? s : s + to_f32(bias[j]));
  });
}

template <class T, bool kPlain, bool kBackward>
void launch_general(const Product& p, const Stream& stream) {
  const std::int64_t stride = kBackward ? p.cols : p.u.cols;
  const Weight<T, kPlain, kBackward> weight(p.weight);
  const Lora<T, kBackward> lora{{p.lora, p.lora_dtype, stride, p.scaling}};
  const LaunchShape grid = product_grid(max_row_tiles(p.rows, p.groups.total(), kProductTile), p.cols);
  if (p.groups.count > 0) {
    launch<general_kernel<T, kPlain, kBackward, true>>(grid, stream, p, weight, lora);
  } else {
    launch<general_kernel<T, kPlain, kBackward, false>>(grid, stream, p, weight, lora);
  }
}

}  // namespace

void multiply(const Product& p, const GeneralConfig&, const Stream& stream) {
  with_type(p.x.dtype, [&]<class T>() {
    const auto with_scales = [&]<bool kPlain>() {
      p.backward ? launch_general<T, kPlain, true>(p, stream) : launch_general<T, kPlain, false>(p, stream);
    };
    has_plain_scales(p.weight) ? with_scales.template operator()<true>() : with_scales.template operator()<false>();
  });
}

}  // namespace qlora_native::QLN_CUDA
