// The forward product of up to 64 rows on tensor cores.
#include "product/gemm/small_m.cuh"

namespace qlora_native::QLN_CUDA {

void multiply_small_m(const Product& product, const GemmConfig& config, const StreamKMemory& memory,
                      const Stream& stream) {
  if (config.blocks == 0) return;
  const GemmArgs args(product, config, memory);
  const auto launch_for = [&]<class T, int kRows>() {
    const LaunchShape shape = {.blocks = config.blocks,
                               .threads = kGemmThreads,
                               .smem_bytes = SmallMShared<T, SmallMTile<kRows>>::bytes(),
                               .programmatic_launch = args.follows_low_rank()};
    if constexpr (kRows <= 32) {  // with more rows in groups it would have too few registers
      if (config.grouped) return launch<small_m_gemm_kernel<T, kRows, true>>(shape, stream, args);
    }
    launch<small_m_gemm_kernel<T, kRows, false>>(shape, stream, args);
  };
  const auto launch_tile = [&]<class T>() {
    switch (config.tile_rows) {
      case 16:
        return launch_for.template operator()<T, 16>();
      case 32:
        return launch_for.template operator()<T, 32>();
      case 64:
        return launch_for.template operator()<T, 64>();
    }
  };
  if (args.x.dtype == DType::bf16) {
    launch_tile.template operator()<Bf16>();
  } else {
    launch_tile.template operator()<F16>();
  }
}

}  // namespace qlora_native::QLN_CUDA
