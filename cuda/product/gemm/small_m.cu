// The forward product of few rows on tensor cores.
#include "product/gemm/small_m.cuh"

namespace qlora_native::QLN_CUDA {

void multiply_thin(const Product& product, const GemmConfig& config, Counters& counters, const Stream& stream) {
  if (config.blocks == 0) return;
  const StreamKWorkspace workspace(config, counters, stream);
  const GemmArgs args(product, config, workspace);
  const auto launch_for = [&]<class T, int kRows>() {
    const LaunchShape shape = {.blocks = config.blocks,
                               .threads = kGemmThreads,
                               .smem_bytes = ThinShared<T, ThinTile<kRows>>::bytes(),
                               .programmatic_launch = args.follows_low_rank()};
    if constexpr (kRows <= kThinRows) {  // with more rows in groups it would have too few registers
      if (config.grouped) return launch<thin_gemm_kernel<T, kRows, true>>(shape, stream, args);
    }
    launch<thin_gemm_kernel<T, kRows, false>>(shape, stream, args);
  };
  const auto launch_tile = [&]<class T>() {
    switch (config.tile_rows) {
      case kGemmFewRows:
        return launch_for.template operator()<T, kGemmFewRows>();
      case kThinRows:
        return launch_for.template operator()<T, kThinRows>();
      case kGemmMiddleRows:
        return launch_for.template operator()<T, kGemmMiddleRows>();
    }
  };
  if (args.left.dtype == DType::bf16) {
    launch_tile.template operator()<Bf16>();
  } else {
    launch_tile.template operator()<F16>();
  }
}

}  // namespace qlora_native::QLN_CUDA
