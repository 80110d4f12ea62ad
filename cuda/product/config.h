// Chooses the kernel that computes a product with a quantized weight, and its number of blocks. The choice depends on
// the shape alone, so that a result has the same bits whenever it is computed on the same kind of device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "qlora_native/types.h"

namespace qlora_native {

// ---- sizes of the kernels -------------------------------------------------------------------------------------------

// gemm/ and wgmma/ compute tiles of the result, in steps of kGemmStep along the inner dimension. A tile of gemm.cuh has
// 16, 64, 128 or 256 rows by kTileCols columns, or 128 rows by kMaxTileCols; one of wgmma/ has 16, 32, 64, 128 or 256
// rows by kTileCols columns.
constexpr int kMaxTileRows = 256;
constexpr int kTileCols = 128, kMaxTileCols = 256;
constexpr int kGemmStep = 64;
// The table of codes and the decoded weights must begin at a certain address. The device may reserve at most this many
// bytes before it.
constexpr std::size_t kMaxReservedSmem = 1024;
// A block with less of the inner dimension than this would mostly fill its pipeline and exchange its partial sums.
constexpr std::int64_t kMinInnerPerBlock = 256;

// How many blocks of gemm/ an SM holds at once where shared memory has room for them. A block has 256 threads, each
// with 128 registers (two blocks) or 255 (one).
constexpr int gemm_blocks_per_sm(int tile_rows) { return tile_rows <= 64 ? 2 : 1; }
// How many steps of X, and of codes, are in shared memory at once. The tile of 16 rows waits for nothing but memory, so
// it has more.
constexpr int gemm_stages(int tile_rows) { return tile_rows == 16 ? 4 : 2; }
// Bytes of shared memory: the rows of the table, with two steps of decoded weights between them; for each stage X in 16
// bits, and codes; and the levels of the scales.
constexpr std::size_t gemm_smem_bytes(int tile_rows, int tile_cols) {
  constexpr int kRowBytes = 256, kLevelBytes = 1024 + 128;
  const int table = 2 * tile_cols * kRowBytes;
  const int stage = kGemmStep * (2 * tile_rows + tile_cols / 2);
  return kMaxReservedSmem + static_cast<std::size_t>(table + gemm_stages(tile_rows) * stage + kLevelBytes);
}

// gemm/small_m.cuh: the forward product of up to kMaxSmallM rows, whose decoded weight stays in registers. Its tiles
// have 16, 32 or 64 rows, and its steps are longer. It has as many stages as 48 KB hold, so that two blocks fit an A100
// as well. Bytes of shared memory: a table of codes and one of levels, and for each stage X and codes.
constexpr int kMaxSmallM = 64, kSmallMStep = 128;
constexpr int small_m_stage_bytes(int tile_rows) { return kSmallMStep * (2 * tile_rows + kTileCols / 2); }
constexpr int small_m_stages(int tile_rows) { return 48 * 1024 / small_m_stage_bytes(tile_rows); }
constexpr std::size_t small_m_smem_bytes(int tile_rows) {
  constexpr int kTableBytes = 256 * 128, kLevelBytes = 1024;
  return static_cast<std::size_t>(kTableBytes + kLevelBytes +
                                  small_m_stages(tile_rows) * small_m_stage_bytes(tile_rows));
}

// wgmma/: a block has an SM to itself, so its stages fill the shared memory; eight are enough, whose steps take longer
// than memory to answer. Bytes: the rows of the table of codes; for each stage X, codes and scales, rounded up to a
// multiple of 1024; and, also rounded up, the levels, the barriers and the block's run.
constexpr int wgmma_stages(int tile_rows) { return tile_rows == 256 ? 4 : tile_rows == 128 ? 6 : 8; }
constexpr std::size_t wgmma_smem_bytes(int tile_rows) {
  constexpr int kTableBytes = 256 * 256, kEndBytes = 2048;
  const int stage = (kGemmStep * (2 * tile_rows + kTileCols / 2) + 4 * kTileCols + 1023) / 1024 * 1024;
  return kMaxReservedSmem + static_cast<std::size_t>(kTableBytes + wgmma_stages(tile_rows) * stage + kEndBytes);
}
// The largest cluster that every device with clusters runs.
constexpr int kMaxCluster = 8;
// In how many rounds the blocks of a cluster exchange the partial sums of a tile, so that a block adds those of one
// round while the next ones arrive. A thread has a vector of four for each eight rows, and a block adds an equal part.
constexpr int kMaxReduceRounds = 4;
constexpr int reduce_rounds(int tile_rows, int cluster) {
  return std::clamp(tile_rows / 8 / cluster, 1, kMaxReduceRounds);
}
// Whether the two warpgroups of a tile of dX split each step. Otherwise they split its columns, because a lane has not
// registers enough for the accumulators of all (wgmma/tile.cuh).
constexpr bool wgmma_splits_steps(int tile_rows) { return tile_rows < 256; }

// gemv/: at most kGemvRows rows, and kGemvCols columns of the result at a time. Both are sizes of mma.
constexpr int kGemvRows = 8;
constexpr int kGemvCols = 16;

// panels.cu: a panel has about kPanelBytes, and at most kMaxPanelBytes. Smaller panels stay in the cache and leave less
// to decode before the first product; larger ones are for products that would otherwise be too small for the device. A
// panel has a multiple of kPanelCols columns of out, the width of cuBLAS's tiles.
constexpr std::int64_t kPanelBytes = std::int64_t{8} << 20, kMaxPanelBytes = std::int64_t{32} << 20;
constexpr std::int64_t kPanelCols = 128;
// The number of elements in a row of a panel is a multiple of this, so that each row begins at a multiple of 16 bytes.
constexpr std::int64_t kPanelAlignment = 8;
// With an adapter, X or dY is copied beside U or V, at most this many rows at once.
constexpr std::int64_t kMaxConcatenatedRows = 8192;
// How many elements of a panel a column of out takes: those of the weight, those of the adapter, and zeros.
constexpr std::int64_t panel_column_elements(std::int64_t inner, std::int64_t rank) {
  return (inner + rank + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;
}

// How many tiles of rows there are at most, if rows are in `groups` groups and no tile has rows of two. A group that
// has rows has at most one tile that is not full, and this tile has at least one row.
constexpr std::int64_t max_row_tiles(std::int64_t rows, std::int64_t groups, std::int64_t tile_rows) {
  return (rows + std::min(groups, rows) * (tile_rows - 1)) / tile_rows;
}

// ---- the product ----------------------------------------------------------------------------------------------------

// What is known of a product beforehand: out[rows, cols] = x[rows, inner] times the weight, taken by its rows (forward)
// or by its columns (backward, where x is dY).
struct ProductShape {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t inner = 0;
  DType dtype = DType::f32;
  int bits = 4;
  bool backward = false;        // by columns of the weight
  bool aligned = false;         // rows of x and of the weight are whole 16-byte vectors
  bool aligned_64 = false;      // and any 64 codes that begin at a multiple of 64 lie in one row and share a scale
  bool small_blocks = false;    // blocks of the weight have fewer than the 32 elements of a chunk (weight_chunk.cuh)
  bool plain_scales = true;     // of the weight: has_plain_scales() (weight_chunk.cuh)
  std::int64_t rank = 0;        // of the adapter
  std::int64_t groups = 0;      // of rows; 0: all rows share the weight and the adapter
  bool group_weights = false;   // each group has its own weight, so that no tile has rows of two groups
  bool masked = false;          // backward: dropout masks the adapter's part within the accumulators
  int compute_capability = 0;   // of the device, 90 for 9.0; 0: of the emulator
  bool has_dense_gemm = false;  // the application has a dense product (runtime.h)
  bool has_wgmma = false;       // the build has wgmma/, and the device is of compute capability 9.0
  bool tma_can_load = false;    // TMA can load tiles of x and of U or V
  unsigned disabled = 0;        // kernels that the application does without on this device (hooks.h)
  int num_sms = 1;
  std::size_t smem_bytes = 0;           // of shared memory that a block may have
  std::size_t reserved_smem_bytes = 0;  // of shared memory that the device keeps before them
};

// ---- the choice -----------------------------------------------------------------------------------------------------

// general.cu: any dtype, shape and alignment.
struct GeneralConfig {
  bool operator==(const GeneralConfig&) const = default;
};

// gemv/: up to kGemvRows rows.
struct GemvConfig {
  bool aligned = false;  // as ProductShape has it
  int blocks = 0;
  bool operator==(const GemvConfig&) const = default;
};

// gemm/: products on tensor cores. The blocks share all steps of all tiles evenly (stream_k.cuh): each has a run of
// `steps_per_block` steps, and the first `extra_steps` blocks have one more.
struct GemmConfig {
  bool aligned = false;  // as ProductShape has it
  bool small_m = false;  // computed by small_m.cuh
  bool grouped = false;  // only the device knows how many tiles there are: `row_tiles` or fewer
  int tile_rows = 0, tile_cols = 0;
  std::int64_t row_tiles = 0;
  std::int64_t tiles = 0;  // all tiles of the first columns, then all of the next
  int steps = 0;           // of a tile
  int blocks = 0;
  int extra_steps = 0;
  std::int64_t steps_per_block = 0;

  // The same product with `count` tiles of rows, in no more blocks than now.
  constexpr GemmConfig with_row_tiles(std::int64_t count) const {
    GemmConfig config = *this;
    const std::int64_t min_steps = kMinInnerPerBlock / (small_m ? kSmallMStep : kGemmStep);
    config.row_tiles = count;
    config.tiles = row_tiles == 0 ? 0 : tiles / row_tiles * count;
    const std::int64_t all = config.tiles * steps, max_blocks = (all + min_steps - 1) / min_steps;
    config.blocks = max_blocks < blocks ? static_cast<int>(max_blocks) : blocks;
    config.steps_per_block = config.blocks == 0 ? 0 : all / config.blocks;
    config.extra_steps = config.blocks == 0 ? 0 : static_cast<int>(all % config.blocks);
    return config;
  }
  // The step with which a run begins; steps are counted tile after tile.
  constexpr std::int64_t first_step(int run) const {
    return run * steps_per_block + (run < extra_steps ? run : extra_steps);
  }
  // The run that has a step.
  constexpr int run_of(std::int64_t step) const {
    const std::int64_t longer_steps = extra_steps * (steps_per_block + 1);
    return static_cast<int>(step < longer_steps ? step / (steps_per_block + 1)
                                                : extra_steps + (step - longer_steps) / steps_per_block);
  }
  // Whether a run may end before the end of a tile.
  constexpr bool splits_a_tile() const { return steps > 1 && (extra_steps > 0 || steps_per_block % steps != 0); }
  // How many flags and tickets the blocks share (stream_k.cuh).
  constexpr std::int64_t counters() const { return grouped || splits_a_tile() ? blocks + 1 : 0; }
  bool operator==(const GemmConfig&) const = default;
};

// wgmma/: products by wgmma. With `cluster` == 0 its blocks share tiles by stream-K, as those of gemm/ do. Otherwise
// there are no runs, and `steps_per_block` and `extra_steps` are 0: with 1 a block has whole tiles, and with 2, 4 or 8
// so many blocks, which run at the same time as a cluster, share the steps of one tile evenly.
//
// With `pairs` two blocks load x together, each one half of its rows for both: they have the same steps of two tiles
// with the same rows and adjacent columns. A cluster then has the blocks of both tiles, up to 8. There are no runs, and
// `tiles` counts one more tile of columns, which has none, if their number is odd.
struct WgmmaConfig {
  GemmConfig gemm;
  int cluster = 0;
  bool pairs = false;
  // How many blocks the device runs together; 1: each by itself.
  constexpr int blocks_per_cluster() const { return (cluster > 1 ? cluster : 1) * (pairs ? 2 : 1); }
  bool operator==(const WgmmaConfig&) const = default;
};

// panels.cu: the weight is decoded in panels for the application's dense product.
struct PanelsConfig {
  std::int64_t cols = 0, rows = 0;  // columns of out in a panel, and rows of out at once
  bool operator==(const PanelsConfig&) const = default;
};

using ProductConfig = std::variant<GeneralConfig, GemvConfig, GemmConfig, WgmmaConfig, PanelsConfig>;

// Whether a kernel computes the product. general.cu computes every one.
bool supports_gemv(const ProductShape& shape);
bool supports_gemm(const ProductShape& shape);
bool supports_wgmma(const ProductShape& shape);
bool supports_panels(const ProductShape& shape);

// A kernel in place of the one that is faster, for tests and measurements.
struct KernelOverride {
  enum class Kernel : std::uint8_t { general, gemv, gemm, wgmma, panels } kernel;
  int tile_rows = 0;          // wgmma: of its tiles; 0: those that take the least time
  std::optional<bool> pairs;  // wgmma: whether pairs of blocks share rows; they cannot on one SM
  bool operator==(const KernelOverride&) const = default;
};
// The one of a name: general, gemv, gemm, wgmma[:ROWS][,pairs|,alone] or panels.
std::optional<KernelOverride> kernel_of_name(std::string_view name);
// The one that QLN_FORCE_KERNEL names.
std::optional<KernelOverride> forced_kernel();

// The kernel of `forced` if it supports the shape; or else the one that was measured to be the fastest (measured.h), if
// it does; or else the one that takes the least time by estimates.
ProductConfig choose_product(const ProductShape& shape, const std::optional<KernelOverride>& forced = std::nullopt);

// The text that QLN_PRINT_CONFIG=1 prints of each product, for people.
std::string describe(const ProductShape& shape, const ProductConfig& config);
void log_product(const ProductShape& shape, const ProductConfig& config);

// The adapter's U, V, dA and dB are long sums for few results, so several blocks share the k of a tile. Each of `parts`
// parts has `length` of k, which are whole steps of a kernel.
struct LowRankSplit {
  int parts;
  std::int64_t length;
};
LowRankSplit low_rank_split(std::int64_t tiles, std::int64_t inner, int num_sms);
// The length of each of `parts` parts, in whole steps.
constexpr std::int64_t low_rank_length(std::int64_t inner, std::int64_t parts) {
  return (((inner + parts - 1) / parts + kGemmStep - 1) / kGemmStep) * kGemmStep;
}

}  // namespace qlora_native
