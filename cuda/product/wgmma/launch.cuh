// Launches the product by wgmma (gemm.cuh); on the host.
#pragma once

#include "product/wgmma/gemm.cuh"

namespace qlora_native::QLN_CUDA {

// A matrix as TMA loads it: in tiles of `box_rows` rows by a step of its columns.
inline TileSource tiles_of(const char* name, const ConstMatrix& matrix, std::int64_t cols, int box_rows) {
  const auto bytes = static_cast<int>(size_of(matrix.dtype));
  return {.name = name,
          .data = matrix.data,
          .element_bytes = bytes,
          .rows = matrix.rows,
          .cols = cols,
          .stride_bytes = (matrix.rows > 1 ? matrix.stride : cols) * bytes,
          .box_rows = box_rows,
          .box_cols = kGemmStep,
          .swizzle = Swizzle::bytes_128};
}
template <class Weights>
TileSource tiles_of_codes(const QuantizedWeightView& w) {
  return {.name = "codes",
          .data = w.codes,
          .element_bytes = 1,
          .rows = w.N,
          .cols = w.K / 2,
          .stride_bytes = w.K / 2,
          .box_rows = Weights::kTileRows,
          .box_cols = Weights::kTileRowBytes,
          .swizzle = Weights::kSwizzle};
}

template <class Weights>
void wgmma_gemm(const Product& product, const WgmmaConfig& wgmma, const StreamKMemory& memory, const Stream& stream) {
  const GemmConfig& config = wgmma.gemm;
  if (config.blocks == 0) return;
  constexpr bool kForward = Weights::kForward;
  const std::int64_t rank = product.u.cols;
  const int box_rows = config.tile_rows / (wgmma.pairs ? 2 : 1);
  bind_context(stream);  // for the driver, which makes the maps
  WgmmaMaps maps{TensorMap(tiles_of(kForward ? "x" : "dy", product.x, product.inner, box_rows)),
                 {},
                 TensorMap(tiles_of_codes<Weights>(product.weight))};
  if (rank > 0) maps.u = TensorMap(tiles_of(kForward ? "u" : "v", product.u, rank, box_rows));
  const WgmmaArgs args(product, wgmma, memory);
  const auto launch_for = [&]<class T, int kRows>() {
    using Tile = WgmmaTile<kRows, kForward>;
    const LaunchShape shape = {.blocks = config.blocks,
                               .threads = Tile::kThreads,
                               .smem_bytes = WgmmaShared<T, Tile>::bytes(),
                               .cluster = wgmma.blocks_per_cluster(),
                               .programmatic_launch = args.follows_low_rank()};
    launch<wgmma_gemm_kernel<T, Weights, kRows>>(shape, stream, args, maps);
  };
  const auto launch_tile = [&]<class T>() {
    if (config.tile_rows == 16) return launch_for.template operator()<T, 16>();
    if (config.tile_rows == 32) return launch_for.template operator()<T, 32>();
    if (config.tile_rows == 64) return launch_for.template operator()<T, 64>();
    if (config.tile_rows == 128) return launch_for.template operator()<T, 128>();
    launch_for.template operator()<T, 256>();
  };
  product.x.dtype == DType::bf16 ? launch_tile.template operator()<Bf16>() : launch_tile.template operator()<F16>();
}

}  // namespace qlora_native::QLN_CUDA
