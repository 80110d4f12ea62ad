// Which kernel computes a product with a quantized weight, and in how many blocks: a function of the problem alone, so
// that a result has the same bits whenever it is computed on the same kind of device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>

#include "qlora_native/types.h"

namespace qlora_native {

// A block of the tensor-core GEMM computes a tile of the result, kGemmStep of the inner dimension at a time: 16, 64,
// 128 or 256 rows by kGemmCols, or 128 by kGemmWideCols.
constexpr int kGemmFewRows = 16, kGemmMiddleRows = 64, kGemmManyRows = 128, kGemmTallRows = 256;
constexpr int kGemmCols = 128, kGemmWideCols = 256;
constexpr int kGemmStep = 64;
// Blocks that a multiprocessor holds at once, where there is shared memory for them: 256 threads of 128 registers, or
// of 255.
constexpr int gemm_blocks(int tile_rows) { return tile_rows <= kGemmMiddleRows ? 2 : 1; }
// Steps of the left operand, and of codes, that are in shared memory at once. Few rows wait for nothing but memory.
constexpr int gemm_stages(int tile_rows) { return tile_rows == kGemmFewRows ? 4 : 2; }
// A run over less of the inner dimension is mostly the start of its pipeline and the exchange of its sums.
constexpr std::int64_t kLeastInner = 256;
// The table of codes and the decoded weights must begin at a certain address: the device may keep so much before it.
constexpr std::size_t kGemmMostReservedSmem = 1024;
// Bytes of shared memory: rows of the table with two steps of decoded weights between them, 16-bit elements of the left
// operand and codes for each stage, the scales' levels.
constexpr std::size_t gemm_smem_bytes(int tile_rows, int tile_cols) {
  constexpr int kRowBytes = 256, kLevelBytes = 1024 + 128;
  const int table = 2 * tile_cols * kRowBytes;
  const int stage = kGemmStep * (2 * tile_rows + tile_cols / 2);
  return kGemmMostReservedSmem + static_cast<std::size_t>(table + gemm_stages(tile_rows) * stage + kLevelBytes);
}
// The forward product of up to kGemmMiddleRows rows whose decoded weight stays in registers (thin.cuh): tiles of 16, 32
// or 64 rows by kGemmCols, and longer steps, in as many stages as 48 KB hold, so that two blocks fit an A100 as well.
// Bytes of shared memory: a table of codes and of levels, and for each stage the left operand and codes.
constexpr int kThinRows = 32, kThinStep = 128;
constexpr int thin_stage_bytes(int tile_rows) { return kThinStep * (2 * tile_rows + kGemmCols / 2); }
constexpr int thin_stages(int tile_rows) { return 48 * 1024 / thin_stage_bytes(tile_rows); }
constexpr std::size_t thin_smem_bytes(int tile_rows) {
  constexpr int kTableBytes = 256 * 128, kLevelBytes = 1024;
  return static_cast<std::size_t>(kTableBytes + kLevelBytes + thin_stages(tile_rows) * thin_stage_bytes(tile_rows));
}
// The forward product by wgmma (hopper/): tiles of 64, 128 or 256 rows by kGemmCols. A block has a multiprocessor to
// itself, so that stages fill its shared memory. Bytes: rows of a table of codes; of each stage the left operand, codes
// and scales, from a multiple of 1024 to the next; levels, barriers and a place in the run, up to such a multiple.
constexpr int hopper_stages(int tile_rows) {
  return tile_rows == kGemmTallRows ? 4 : tile_rows == kGemmManyRows ? 6 : 8;
}
constexpr std::size_t hopper_smem_bytes(int tile_rows) {
  constexpr int kTableBytes = 256 * 256, kEndBytes = 2048;
  const int stage = (kGemmStep * (2 * tile_rows + kGemmCols / 2) + 4 * kGemmCols + 1023) / 1024 * 1024;
  return kGemmMostReservedSmem + static_cast<std::size_t>(kTableBytes + hopper_stages(tile_rows) * stage + kEndBytes);
}
// The kernel for few rows takes as many at most, and so many columns of the result a block at a time: both are mma's.
constexpr int kGemvRows = 8;
constexpr int kGemvCols = 16;

// So many rows at most are left to the kernels that decode on the way, more to panels of decoded weight, which the host
// program's dense product multiplies (panels.cu). To decode takes as long as 331 rows of an H100's dense
// product, so that M rows reach M / (M + 331) of its rate where nothing hides it: 70 % at 768. The best published
// kernel that decodes on the way reaches 73 %, from 1024 on.
constexpr std::int64_t kFusedRows = 768;
// Bytes of a panel, about as many as that and at most: the smaller ones stay in the cache and leave less to decode
// before the first product, the larger are for products that would else be too small for the device. A panel has a
// multiple of so many of out's columns, the width of cuBLAS's tiles.
constexpr std::int64_t kPanelBytes = std::int64_t{8} << 20, kPanelMostBytes = std::int64_t{32} << 20;
constexpr std::int64_t kPanelCols = 128;
// Elements: rows of a panel are multiples of it, so that each begins at a multiple of 16 bytes.
constexpr std::int64_t kPanelAlignment = 8;
// Where there is an adapter, rows of the left operand that are copied beside its own at once.
constexpr std::int64_t kPanelCopiedRows = 8192;

// How many tiles of rows there are at most, where rows are in so many groups and no tile has rows of two: a group that
// has rows has one tile that is not full, of one row at least.
constexpr std::int64_t most_row_tiles(std::int64_t rows, std::int64_t groups, std::int64_t tile_rows) {
  return (rows + std::min(groups, rows) * (tile_rows - 1)) / tile_rows;
}

// Whether hopper/ may compute a product: this build has its code (sm_90a), and the device can run that. Else none.
enum class HopperUse : std::uint8_t { none, where_it_wins, wherever_it_can };

// What is known of a product beforehand: out[rows, cols] = left[rows, inner] times the weight, by its rows (forward) or
// by its columns (backward).
struct ProductShape {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t inner = 0;
  DType dtype = DType::f32;
  int bits = 4;
  bool backward = false;      // by columns of the weight
  bool aligned = false;       // rows of the left operand and of the weight are whole 16-byte vectors
  bool aligned_64 = false;    // and so are 64 codes that begin at a multiple of 64: in one row, with one scale
  bool small_blocks = false;  // of fewer than the 32 elements that a chunk (weight_chunk.cuh) has one scale for, or two
  std::int64_t rank = 0;      // of the adapter
  std::int64_t groups = 0;    // of rows; 0: they share all
  bool own_weights = false;   // of the groups: no tile has rows of two
  bool masks = false;         // dropout falls on the adapter's part alone, within the sums: backward
  bool dense_gemm = false;    // the host program has one (runtime.h)
  HopperUse hopper = HopperUse::none;
  bool tiles = false;  // TMA can load tiles of the left operand and of U or V
  int multiprocessors = 1;
  std::size_t smem_bytes = 0;           // of shared memory, that a block may have
  std::size_t reserved_smem_bytes = 0;  // that the device keeps of it before
};

// The ways that a product can take, each with what its kernels need to know.

// general.cu: any dtype, shape and alignment.
struct GeneralConfig {
  bool operator==(const GeneralConfig&) const = default;
};

// gemv.cu: up to kGemvRows rows.
struct GemvConfig {
  bool aligned = false;  // the product's
  int blocks = 0;
  bool operator==(const GemvConfig&) const = default;
};

// gemm/: on tensor cores. The blocks share all steps of all tiles evenly, each a run of them: `share`, and the first
// `rest` blocks one more.
struct GemmConfig {
  bool aligned = false;  // the product's
  bool thin = false;     // by thin.cuh
  bool grouped = false;  // how many tiles there are is known on the device: `row_tiles` or fewer
  int tile_rows = 0, tile_cols = 0;
  std::int64_t row_tiles = 0;
  std::int64_t tiles = 0;  // those of the first columns, then those of the next
  int steps = 0;           // of a tile
  int blocks = 0;
  int rest = 0;
  std::int64_t share = 0;

  // Of as many tiles of rows, in no more blocks.
  constexpr GemmConfig with_row_tiles(std::int64_t count) const {
    GemmConfig config = *this;
    const std::int64_t of_run = kLeastInner / (thin ? kThinStep : kGemmStep);
    config.row_tiles = count;
    config.tiles = row_tiles == 0 ? 0 : tiles / row_tiles * count;
    const std::int64_t all = config.tiles * steps, most = (all + of_run - 1) / of_run;
    config.blocks = most < blocks ? static_cast<int>(most) : blocks;
    config.share = config.blocks == 0 ? 0 : all / config.blocks;
    config.rest = config.blocks == 0 ? 0 : static_cast<int>(all % config.blocks);
    return config;
  }
  // Where the run of block `i` begins: a number of steps, tile after tile.
  constexpr std::int64_t begin_of(int i) const { return i * share + (i < rest ? i : rest); }
  // In whose run a step is.
  constexpr int run_of(std::int64_t step) const {
    const std::int64_t of_longer = rest * (share + 1);
    return static_cast<int>(step < of_longer ? step / (share + 1) : rest + (step - of_longer) / share);
  }
  // Whether the end of a run is not the end of a tile.
  constexpr bool splits_a_tile() const { return steps > 1 && (rest > 0 || share % steps != 0); }
  bool operator==(const GemmConfig&) const = default;
};

// hopper/: by wgmma, whose blocks share tiles as those of gemm/ do.
struct HopperConfig {
  GemmConfig runs;
  bool operator==(const HopperConfig&) const = default;
};

// panels.cu: panels of decoded weight for the host program's dense product.
struct PanelsConfig {
  std::int64_t cols = 0, rows = 0;  // of out: the columns of a panel, and the rows at once
  bool operator==(const PanelsConfig&) const = default;
};

using ProductConfig = std::variant<GeneralConfig, GemvConfig, GemmConfig, HopperConfig, PanelsConfig>;
ProductConfig product_config(const ProductShape& shape);
// Of a device that could run hopper/: by its model where it wins; QLN_FORCE_HOPPER=1 wherever it can, =0 never.
HopperUse asked_hopper_use(bool is_hopper);

// Elements that a panel takes for each column of out: the weight's, the adapter's, zeros.
constexpr std::int64_t column_of_panel(std::int64_t inner, std::int64_t rank) {
  return (inner + rank + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;
}

// The adapter's U, V, dA and dB are long sums for few results: several blocks share the k of a tile, `length` each,
// whole steps of a kernel.
struct LowRankSplit {
  int parts;
  std::int64_t length;
};
LowRankSplit low_rank_split(std::int64_t tiles, std::int64_t inner, int multiprocessors);
// The length of one of `parts` parts, which are whole steps.
constexpr std::int64_t low_rank_length(std::int64_t inner, std::int64_t parts) {
  return (((inner + parts - 1) / parts + kGemmStep - 1) / kGemmStep) * kGemmStep;
}

// For people: QLN_PRINT_CONFIG=1 prints it for each product.
std::string text_of(const ProductShape& shape, const ProductConfig& config);
void print_if_asked(const ProductShape& shape, const ProductConfig& config);

}  // namespace qlora_native
