// Launches the product on tensor cores (gemm.cuh); on the host.
#pragma once

#include "product/gemm/gemm.cuh"

namespace qlora_native::QLN_CUDA {

template <template <class> class Weights>
void gemm(const Product& product, const GemmConfig& config, const StreamKMemory& memory, const Stream& stream) {
  if (config.blocks == 0) return;
  const GemmArgs args(product, config, memory);
  const auto launch_for = [&]<class T, int kRows, int kCols, bool kAligned>() {
    using Tile = GemmTile<kRows, kCols, kAligned>;
    const LaunchShape shape = {.blocks = config.blocks,
                               .threads = kGemmThreads,
                               .smem_bytes = GemmShared<T, Weights<Tile>, Tile>::bytes(),
                               .programmatic_launch = args.follows_low_rank()};
    if constexpr (kAligned && kCols == kTileCols) {
      if (config.grouped) return launch<gemm_kernel<T, Weights, Tile, true>>(shape, stream, args);
    }
    launch<gemm_kernel<T, Weights, Tile, false>>(shape, stream, args);
  };
  // The tiles that choose_product() chooses among.
  const auto launch_tile = [&]<class T>() {
    if (config.tile_cols == 256) return launch_for.template operator()<T, 128, 256, true>();
    switch (config.tile_rows) {
      case 256:
        return launch_for.template operator()<T, 256, kTileCols, true>();
      case 128:
        return launch_for.template operator()<T, 128, kTileCols, true>();
      case 64:
        if (config.aligned) return launch_for.template operator()<T, 64, kTileCols, true>();
        return launch_for.template operator()<T, 64, kTileCols, false>();
      case 16:
        if (config.aligned) return launch_for.template operator()<T, 16, kTileCols, true>();
        return launch_for.template operator()<T, 16, kTileCols, false>();
    }
  };
  if (args.x.dtype == DType::bf16) {
    launch_tile.template operator()<Bf16>();
  } else {
    launch_tile.template operator()<F16>();
  }
}

}  // namespace qlora_native::QLN_CUDA
