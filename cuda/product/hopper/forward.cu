// The forward product by wgmma, and where it can be computed so.
#include "product/hopper/gemm.cuh"
#include "product/product.cuh"

namespace qlora_native::QLN_CUDA {
namespace {

// Tiles of `box_rows` rows by a step of a matrix's rows.
TileSource rows_of(const char* name, const ConstMatrix& matrix, std::int64_t cols, int box_rows) {
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
TileSource codes_of(const QuantizedWeightView& w) {
  return {.name = "codes",
          .data = w.codes,
          .element_bytes = 1,
          .rows = w.N,
          .cols = w.K / 2,
          .stride_bytes = w.K / 2,
          .box_rows = kGemmCols,
          .box_cols = kGemmStep / 2,
          .swizzle = Swizzle::bytes_32};
}

}  // namespace

HopperUse hopper_use(const Stream& stream) { return asked_hopper_use(is_hopper(stream)); }

void multiply(const Product& product, const HopperConfig& config, const Stream& stream) {
  if (config.runs.blocks == 0) return;
  const int rows = config.runs.tile_rows;
  HopperMaps maps{TensorMap(rows_of("x", product.left, product.inner, rows)), {}, TensorMap(codes_of(product.weight))};
  const std::int64_t rank = product.low_rank.cols;
  if (rank > 0) maps.low_rank = TensorMap(rows_of("u", product.low_rank, rank, rows));
  const SumsMemory memory(config.runs, stream);
  const GemmArgs args(product, config.runs, memory);
  const auto start = [&]<class T, int kRows>() {
    using Tile = HopperTile<kRows>;
    const LaunchShape shape = {config.runs.blocks, Tile::kThreads, HopperShared<T, Tile>::bytes()};
    launch<hopper_gemm_kernel<T, kRows>>(shape, stream, args, maps);
  };
  const auto start_tile = [&]<class T>() {
    if (rows == kGemmMiddleRows) return start.template operator()<T, kGemmMiddleRows>();
    if (rows == kGemmManyRows) return start.template operator()<T, kGemmManyRows>();
    start.template operator()<T, kGemmTallRows>();
  };
  if (product.left.dtype == DType::bf16) {
    start_tile.template operator()<Bf16>();
  } else {
    start_tile.template operator()<F16>();
  }
}

}  // namespace qlora_native::QLN_CUDA
