// Chooses the kernel that computes a product with a quantized weight, and its number of blocks. The choice depends on
// the problem alone, so that a result has the same bits whenever it is computed on the same kind of device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "qlora_native/types.h"

namespace qlora_native {

// A block of the tensor-core GEMM computes a tile of the result, in steps of kGemmStep along the inner dimension. A
// tile has 16, 64, 128 or 256 rows by kGemmCols columns, or 128 rows by kGemmWideCols columns.
constexpr int kGemmFewRows = 16, kGemmMiddleRows = 64, kGemmManyRows = 128, kGemmTallRows = 256;
constexpr int kGemmCols = 128, kGemmWideCols = 256;
constexpr int kGemmStep = 64;
// How many blocks an SM holds at once where shared memory has room for them. A block has 256 threads, each
// with 128 registers (two blocks) or 255 (one).
constexpr int gemm_blocks(int tile_rows) { return tile_rows <= kGemmMiddleRows ? 2 : 1; }
// How many steps of the left operand, and of codes, are in shared memory at once. The tile of the fewest rows waits for
// nothing but memory, so it has more.
constexpr int gemm_stages(int tile_rows) { return tile_rows == kGemmFewRows ? 4 : 2; }
// A run over less of the inner dimension than this would mostly start its pipeline and exchange its sums.
constexpr std::int64_t kLeastInner = 256;
// The table of codes and the decoded weights must begin at a certain address. The device may reserve at most this many
// bytes before it.
constexpr std::size_t kGemmMostReservedSmem = 1024;
// Bytes of shared memory: the rows of the table, with two steps of decoded weights between them; for each stage the
// left operand in 16 bits, and codes; and the levels of the scales.
constexpr std::size_t gemm_smem_bytes(int tile_rows, int tile_cols) {
  constexpr int kRowBytes = 256, kLevelBytes = 1024 + 128;
  const int table = 2 * tile_cols * kRowBytes;
  const int stage = kGemmStep * (2 * tile_rows + tile_cols / 2);
  return kGemmMostReservedSmem + static_cast<std::size_t>(table + gemm_stages(tile_rows) * stage + kLevelBytes);
}
// The forward product of up to kGemmMiddleRows rows, whose decoded weight stays in registers (small_m.cuh). Its tiles
// have 16, 32 or 64 rows by kGemmCols columns, and its steps are longer. It has as many stages as 48 KB hold, so that
// two blocks fit an A100 as well. Bytes of shared memory: a table of codes and one of levels, and for each stage the
// left operand and codes.
constexpr int kThinRows = 32, kThinStep = 128;
constexpr int thin_stage_bytes(int tile_rows) { return kThinStep * (2 * tile_rows + kGemmCols / 2); }
constexpr int thin_stages(int tile_rows) { return 48 * 1024 / thin_stage_bytes(tile_rows); }
constexpr std::size_t thin_smem_bytes(int tile_rows) {
  constexpr int kTableBytes = 256 * 128, kLevelBytes = 1024;
  return static_cast<std::size_t>(kTableBytes + kLevelBytes + thin_stages(tile_rows) * thin_stage_bytes(tile_rows));
}
// The product by wgmma (wgmma/). Its tiles have 16, 32, 64, 128 or 256 rows by kGemmCols columns. A block has a
// SM to itself, so its stages fill the shared memory; eight are enough, whose steps take longer than memory
// to answer. Bytes: the rows of the table of codes; for each stage the left operand, codes and scales, rounded up to a
// multiple of 1024; and, also rounded up, the levels, the barriers and the number of the run.
constexpr int hopper_stages(int tile_rows) {
  return tile_rows == kGemmTallRows ? 4 : tile_rows == kGemmManyRows ? 6 : 8;
}
constexpr std::size_t hopper_smem_bytes(int tile_rows) {
  constexpr int kTableBytes = 256 * 256, kEndBytes = 2048;
  const int stage = (kGemmStep * (2 * tile_rows + kGemmCols / 2) + 4 * kGemmCols + 1023) / 1024 * 1024;
  return kGemmMostReservedSmem + static_cast<std::size_t>(kTableBytes + hopper_stages(tile_rows) * stage + kEndBytes);
}
// The most blocks that every device with clusters runs as one.
constexpr int kHopperMostCluster = 8;
// In how many turns the blocks of a cluster exchange the sums of a tile, so that a block adds those of one turn while
// the next ones come. A thread has a vector of four sums for each eight rows, and a block adds an equal part of them.
constexpr int kHopperMostTurns = 4;
constexpr int hopper_turns(int tile_rows, int cluster) {
  return std::clamp(tile_rows / 8 / cluster, 1, kHopperMostTurns);
}
// Whether the two warpgroups of a tile of dX share each step. They have columns of their own where a lane has not
// registers enough for the sums of all (wgmma/tile.cuh).
constexpr bool hopper_shares_steps(int tile_rows) { return tile_rows < kGemmTallRows; }
// The kernel for few rows takes kGemvRows rows at most, and a block takes kGemvCols columns of the result at a time.
// Both are sizes of mma.
constexpr int kGemvRows = 8;
constexpr int kGemvCols = 16;

// Products of up to this many rows go to the kernels that decode on the way. Products of more rows go to panels of
// decoded weight, which the host program's dense product multiplies (panels.cu). Decoding takes as long as 331 rows of
// an H100's dense product. Where nothing hides it, M rows therefore reach M / (M + 331) of that product's rate: 70 % at
// 768. The best published kernel that decodes on the way reaches 73 %, from 1024 rows on.
constexpr std::int64_t kFusedRows = 768;
// A panel has about kPanelBytes, and at most kPanelMostBytes. Smaller panels stay in the cache and leave less to decode
// before the first product; larger ones are for products that would otherwise be too small for the device. A panel has
// a multiple of kPanelCols columns of out, the width of cuBLAS's tiles.
constexpr std::int64_t kPanelBytes = std::int64_t{8} << 20, kPanelMostBytes = std::int64_t{32} << 20;
constexpr std::int64_t kPanelCols = 128;
// The number of elements in a row of a panel is a multiple of this, so that each row begins at a multiple of 16 bytes.
constexpr std::int64_t kPanelAlignment = 8;
// With an adapter, the left operand is copied beside U or V, at most this many rows at once.
constexpr std::int64_t kPanelCopiedRows = 8192;

// How many tiles of rows there are at most, if rows are in `groups` groups and no tile has rows of two. A group that
// has rows has at most one tile that is not full, and this tile has at least one row.
constexpr std::int64_t most_row_tiles(std::int64_t rows, std::int64_t groups, std::int64_t tile_rows) {
  return (rows + std::min(groups, rows) * (tile_rows - 1)) / tile_rows;
}

// Whether wgmma/ may compute a product. This is `none` unless the build has its code (sm_90a) and the device can run
// it.
enum class HopperUse : std::uint8_t { none, where_it_wins, wherever_it_can };

// What is known of a product beforehand: out[rows, cols] = left[rows, inner] times the weight, taken by its rows
// (forward) or by its columns (backward).
struct ProductShape {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t inner = 0;
  DType dtype = DType::f32;
  int bits = 4;
  bool backward = false;      // by columns of the weight
  bool aligned = false;       // rows of the left operand and of the weight are whole 16-byte vectors
  bool aligned_64 = false;    // and any 64 codes that begin at a multiple of 64 lie in one row and share a scale
  bool small_blocks = false;  // blocks of the weight have fewer than the 32 elements of a chunk (weight_chunk.cuh)
  std::int64_t rank = 0;      // of the adapter
  std::int64_t groups = 0;    // of rows; 0: all rows share the weight and the adapter
  bool own_weights = false;   // each group has its own weight, so that no tile has rows of two groups
  bool masked = false;        // backward: dropout masks the adapter's part within the sums
  bool dense_gemm = false;    // the host program has a dense product (runtime.h)
  HopperUse hopper = HopperUse::none;
  int hopper_rows = 0;  // of a tile of wgmma/, where a test asks for some; 0: those that are done first
  // Whether pairs of blocks of wgmma/ share rows, where a test asks; it cannot have them on one SM.
  std::optional<bool> hopper_pairs;
  bool tma_can_load = false;  // TMA can load tiles of the left operand and of U or V
  int num_sms = 1;
  std::size_t smem_bytes = 0;           // of shared memory that a block may have
  std::size_t reserved_smem_bytes = 0;  // of shared memory that the device keeps before them
};

// The ways that a product can take, each with what its kernels need to know.

// general.cu: any dtype, shape and alignment.
struct GeneralConfig {
  bool operator==(const GeneralConfig&) const = default;
};

// gemv.cu: up to kGemvRows rows.
struct GemvConfig {
  bool aligned = false;  // as ProductShape has it
  int blocks = 0;
  bool operator==(const GemvConfig&) const = default;
};

// gemm/: products on tensor cores. The blocks share all steps of all tiles evenly: each has a run of `share` steps, and
// the first `rest` blocks have one more.
struct GemmConfig {
  bool aligned = false;  // as ProductShape has it
  bool thin = false;     // computed by small_m.cuh
  bool grouped = false;  // only the device knows how many tiles there are: `row_tiles` or fewer
  int tile_rows = 0, tile_cols = 0;
  std::int64_t row_tiles = 0;
  std::int64_t tiles = 0;  // all tiles of the first columns, then all of the next
  int steps = 0;           // of a tile
  int blocks = 0;
  int rest = 0;
  std::int64_t share = 0;

  // The same product with `count` tiles of rows, in no more blocks than now.
  constexpr GemmConfig with_row_tiles(std::int64_t count) const {
    GemmConfig config = *this;
    const std::int64_t least_steps = kLeastInner / (thin ? kThinStep : kGemmStep);
    config.row_tiles = count;
    config.tiles = row_tiles == 0 ? 0 : tiles / row_tiles * count;
    const std::int64_t all = config.tiles * steps, most = (all + least_steps - 1) / least_steps;
    config.blocks = most < blocks ? static_cast<int>(most) : blocks;
    config.share = config.blocks == 0 ? 0 : all / config.blocks;
    config.rest = config.blocks == 0 ? 0 : static_cast<int>(all % config.blocks);
    return config;
  }
  // The step with which a run begins; steps are counted tile after tile.
  constexpr std::int64_t first_step(int run) const { return run * share + (run < rest ? run : rest); }
  // The run that has a step.
  constexpr int run_of(std::int64_t step) const {
    const std::int64_t longer_steps = rest * (share + 1);
    return static_cast<int>(step < longer_steps ? step / (share + 1) : rest + (step - longer_steps) / share);
  }
  // Whether a run may end before the end of a tile.
  constexpr bool splits_a_tile() const { return steps > 1 && (rest > 0 || share % steps != 0); }
  // How many flags and tickets the blocks share (stream_k.cuh).
  constexpr std::int64_t counters() const { return grouped || splits_a_tile() ? blocks + 1 : 0; }
  bool operator==(const GemmConfig&) const = default;
};

// wgmma/: products by wgmma. With `cluster` == 0 its blocks share tiles as those of gemm/ do. Otherwise there are no
// runs, and `share` and `rest` are 0: with 1 a block has whole tiles, and with 2, 4 or 8 so many blocks, which run at
// the same time as a cluster, share the steps of one tile evenly.
//
// With `pairs` two blocks load the left operand's rows together, each one half for both: they have the same steps of
// two tiles with the same rows and neighbouring columns. A cluster then has the blocks of both tiles, up to 8. There
// are no runs, and `tiles` counts one more tile of columns, which has none, if their number is odd.
struct HopperConfig {
  GemmConfig gemm;
  int cluster = 0;
  bool pairs = false;
  // How many blocks the device runs together; 1: each by itself.
  constexpr int blocks_of_cluster() const { return (cluster > 1 ? cluster : 1) * (pairs ? 2 : 1); }
  bool operator==(const HopperConfig&) const = default;
};

// panels.cu: the weight is decoded in panels for the host program's dense product.
struct PanelsConfig {
  std::int64_t cols = 0, rows = 0;  // columns of out in a panel, and rows of out at once
  bool operator==(const PanelsConfig&) const = default;
};

using ProductConfig = std::variant<GeneralConfig, GemvConfig, GemmConfig, HopperConfig, PanelsConfig>;
ProductConfig product_config(const ProductShape& shape);
// How a device uses wgmma/. If it can run wgmma/, the default is where its model says that it wins;
// QLN_FORCE_HOPPER=1 uses it wherever it can be, and =0 never. The rows of a tile in place of 1 also choose the tile,
// and ",pairs" or ",alone" behind them whether pairs of blocks share its rows.
HopperUse asked_hopper_use(bool is_hopper);
int asked_hopper_rows();
std::optional<bool> asked_hopper_pairs();

// How many elements of a panel a column of out takes: those of the weight, those of the adapter, and zeros.
constexpr std::int64_t panel_column_elements(std::int64_t inner, std::int64_t rank) {
  return (inner + rank + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;
}

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

// The text that QLN_PRINT_CONFIG=1 prints of each product, for people.
std::string text_of(const ProductShape& shape, const ProductConfig& config);
void print_if_asked(const ProductShape& shape, const ProductConfig& config);

}  // namespace qlora_native
