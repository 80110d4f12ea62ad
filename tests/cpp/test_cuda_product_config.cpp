// Guards choose_product(), for any shape and device: it chooses the right kernel for a product, and on tensor cores the
// blocks do each step of every tile exactly once.
#include "product/config.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>

#include "common/layout.h"
#include "expect.h"
#include "hooks.h"
#include "product/measured.h"
#include "qlora_native/error.h"

namespace qlora_native {
namespace {

constexpr std::int64_t kRows[] = {0, 1, 8, 9, 16, 17, 64, 65, 128, 129, 256, 257, 384, 4096, 100000};
constexpr std::int64_t kSizes[] = {1, 63, 64, 65, 128, 129, 256, 300, 4096, 14336};
constexpr std::size_t kMinSmem = 99 * 1024, kAmpereSmem = 163 * 1024, kHopperSmem = 227 * 1024;
constexpr int kNumSms[] = {1, 3, 108, 132};

template <class F>
void for_each_shape(const F& f) {
  for (const std::int64_t rows : kRows)
    for (const std::int64_t cols : kSizes)
      for (const std::int64_t inner : kSizes)
        for (const int num_sms : kNumSms)
          for (const int flags : {0, 1, 2, 3, 5, 7, 13, 15, 21, 23}) {
            f(ProductShape{.rows = rows,
                           .cols = cols,
                           .inner = inner,
                           .dtype = DType::bf16,
                           .backward = flags / 2 % 2 == 1,
                           .aligned = flags % 2 == 1,
                           .aligned_64 = flags / 4 % 2 == 1,
                           .num_sms = num_sms,
                           .smem_bytes = flags >= 16  ? kAmpereSmem
                                         : flags >= 8 ? kHopperSmem
                                                      : kMinSmem});
          }
}

template <class Config>
bool takes(const ProductShape& shape) {
  return std::holds_alternative<Config>(choose_product(shape));
}
PanelsConfig panels_of(const ProductShape& shape) { return std::get<PanelsConfig>(choose_product(shape)); }

template <class F>
void for_each_gemm(const F& f) {
  for_each_shape([&](const ProductShape& shape) {
    if (!supports_gemv(shape)) f(shape, std::get<GemmConfig>(choose_product(shape)));
  });
}

void expect_each_step_once(const GemmConfig& config) {
  if (config.blocks == 0) return;
  EXPECT(config.first_step(0) == 0 && config.first_step(config.blocks) == config.tiles * config.steps);
  bool splits = false;
  for (int i = 0; i < config.blocks; ++i) {
    EXPECT(config.first_step(i) < config.first_step(i + 1));
    EXPECT(config.run_of(config.first_step(i)) == i && config.run_of(config.first_step(i + 1) - 1) == i);
    splits |= config.first_step(i + 1) % config.steps != 0;
  }
  EXPECT(splits == config.splits_a_tile());
}

TEST(tiles_cover_the_result_and_every_step_is_done_once) {
  for_each_gemm([](const ProductShape& shape, const GemmConfig& config) {
    EXPECT((config.blocks == 0) == (shape.rows == 0));
    expect_each_step_once(config);
    const std::int64_t col_tiles = config.row_tiles == 0 ? 0 : config.tiles / config.row_tiles;
    EXPECT(config.row_tiles * config.tile_rows >= shape.rows);
    EXPECT(shape.rows == 0 || col_tiles * config.tile_cols >= shape.cols);
    EXPECT(std::int64_t{config.steps} * (config.small_m ? kSmallMStep : kGemmStep) >= shape.inner);
    const bool two =
        config.small_m ? shape.smem_bytes > kMinSmem : config.tile_rows <= 64 && shape.smem_bytes == kHopperSmem;
    EXPECT(config.blocks <= (two ? 2 : 1) * shape.num_sms);  // so that the device holds all blocks at once
  });
}

TEST(tile_is_one_that_was_compiled_and_fits) {
  for_each_gemm([](const ProductShape& shape, const GemmConfig& config) {
    const int rows = config.tile_rows, cols = config.tile_cols;
    EXPECT(config.small_m == (shape.aligned_64 && !shape.backward && shape.rows > 0 && shape.rows <= 64));
    if (config.small_m) {
      EXPECT(cols == kTileCols && (rows == 16 || rows == 32 || rows == 64));
      EXPECT(rows >= shape.rows && (rows == 16 || rows < 2 * shape.rows));
      EXPECT(small_m_smem_bytes(rows) <= kMinSmem && 2 * (small_m_smem_bytes(rows) + 1024) <= kAmpereSmem + 1024);
      return;
    }
    if (cols == 256) {
      EXPECT(rows == 128 && shape.aligned_64);
    } else {
      EXPECT(cols == kTileCols);
      EXPECT(rows == 16 || rows == 64 || (shape.aligned && (rows == 128 || rows == 256)));
    }
    EXPECT((rows == 16) == (shape.rows <= 16));
    EXPECT(rows <= 64 || shape.rows > 64);
    EXPECT(gemm_smem_bytes(rows, cols) <= shape.smem_bytes);
  });
}

struct Tile {
  int rows, cols;
  bool operator==(const Tile&) const = default;
};
constexpr Tile kTile64 = {64, kTileCols}, kTile128 = {128, kTileCols};
constexpr Tile kTile128x256 = {128, 256}, kTile256 = {256, kTileCols};

// The tile has as many rows as fit the memory, unless more than an eighth of them would be zeros that a smaller tile
// avoids.
TEST(large_tile_has_the_fewest_empty_rows) {
  ProductShape shape = {
      .cols = 4096, .inner = 4096, .dtype = DType::bf16, .aligned = true, .aligned_64 = true, .num_sms = 132};
  const auto tile_of = [&](std::int64_t rows, std::size_t smem_bytes) {
    shape.rows = rows;
    shape.smem_bytes = smem_bytes;
    const auto config = std::get<GemmConfig>(choose_product(shape));
    return Tile{config.tile_rows, config.tile_cols};
  };
  for (const bool backward : {false, true}) {
    shape.backward = backward;
    for (const std::int64_t rows : {129, 255, 256, 385, 512, 641, 768, 4096}) {
      EXPECT(tile_of(rows, kHopperSmem) == kTile256 && tile_of(rows, kAmpereSmem) == kTile256);
      EXPECT(tile_of(rows, kMinSmem) == kTile64);
    }
    for (const std::int64_t rows : {65, 128, 257, 384, 513, 640}) {
      EXPECT(tile_of(rows, kHopperSmem) == kTile128x256 && tile_of(rows, kAmpereSmem) == kTile128);
      EXPECT(tile_of(rows, kMinSmem) == kTile64);
    }
    EXPECT(tile_of(64, kHopperSmem) == kTile64);
  }
  for (const std::int64_t cols : {128, 300, 384}) {  // a wide tile would waste too many columns
    shape.cols = cols;
    EXPECT(tile_of(128, kHopperSmem) == kTile128 && tile_of(129, kHopperSmem) == kTile256);
  }
  for (const std::int64_t cols : {129, 256, 512, 960, 1100, 14336}) {
    shape.cols = cols;
    EXPECT(tile_of(128, kHopperSmem) == kTile128x256);
  }
  shape.aligned_64 = false;  // a block of the quantization may end inside a step
  EXPECT(tile_of(128, kHopperSmem) == kTile128 && tile_of(129, kHopperSmem) == kTile256);
  shape.aligned = false;
  EXPECT(tile_of(128, kHopperSmem) == kTile64 && tile_of(129, kHopperSmem) == kTile64);
}

// The blocks of this kernel loop over the columns, so any number of blocks except 0 is right.
TEST(up_to_eight_rows_get_gemv) {
  for_each_shape([](ProductShape shape) {
    if (!supports_gemv(shape)) return;
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (const int bits : {4, 8}) {
        shape.dtype = dtype;
        shape.bits = bits;
        const auto config = std::get<GemvConfig>(choose_product(shape));
        EXPECT(config.aligned == shape.aligned);
        EXPECT((config.blocks == 0) == (shape.rows == 0));
        EXPECT(config.blocks * kGemvCols < shape.cols + kGemvCols);
      }
  });
}

TEST(shape_that_no_other_kernel_supports_takes_the_general_one) {
  const auto takes_general = [](const auto& change) {
    ProductShape shape = {.rows = 64, .cols = 64, .inner = 64, .dtype = DType::f16, .aligned = true};
    shape.smem_bytes = kHopperSmem, shape.reserved_smem_bytes = 1024;
    EXPECT(takes<GemmConfig>(shape));
    change(shape);
    return takes<GeneralConfig>(shape);
  };
  EXPECT(takes_general([](ProductShape& shape) { shape.dtype = DType::f32; }));
  EXPECT(takes_general([](ProductShape& shape) { shape.bits = 8; }));
  EXPECT(takes_general([](ProductShape& shape) { shape.reserved_smem_bytes = 1025; }));  // of a future device
  for_each_shape([](ProductShape shape) {
    shape.small_blocks = true;  // the other kernels look up at most two scales for a chunk of 32 codes
    EXPECT(takes<GeneralConfig>(shape));
  });
}

// Only gemv, the general kernel and panels know blocks with a minimum, and scales in 16 bits. Where there is a dense
// product, none but few rows, groups and dropout's mask are left to the general kernel, which decodes W for each 64
// rows.
TEST(weight_without_plain_scales_takes_a_kernel_that_knows_it) {
  for_each_shape([](ProductShape shape) {
    shape.plain_scales = false;
    shape.has_wgmma = shape.tma_can_load = true;
    for (const bool small_blocks : {false, true})
      for (const std::int64_t groups : {0, 4})
        for (const bool has_dense_gemm : {false, true})
          for (const bool masked : {false, true}) {
            shape.small_blocks = small_blocks;
            shape.groups = groups;
            shape.has_dense_gemm = has_dense_gemm;
            shape.masked = masked;
            EXPECT(!supports_gemm(shape) && !supports_wgmma(shape));
            const ProductConfig config = choose_product(shape);
            if (supports_gemv(shape)) {
              EXPECT(std::holds_alternative<GemvConfig>(config) == (shape.rows <= kGemvRows));
              EXPECT(shape.aligned && !small_blocks);
            } else if (has_dense_gemm && !masked && groups == 0 && shape.rows > 0) {
              EXPECT(std::holds_alternative<PanelsConfig>(config));
            } else {
              EXPECT(std::holds_alternative<GeneralConfig>(config));
            }
          }
  });
}

ProductShape dense_shape(std::int64_t rows, std::int64_t cols = 4096, std::int64_t inner = 4096) {
  return {.rows = rows,
          .cols = cols,
          .inner = inner,
          .dtype = DType::bf16,
          .aligned = true,
          .aligned_64 = true,
          .has_dense_gemm = true,
          .num_sms = 132};
}

bool is_by_panels(const ProductShape& shape) { return takes<PanelsConfig>(shape); }

TEST(dense_product_gets_panels) {
  EXPECT(is_by_panels(dense_shape(256, 14336, 1024)) && !is_by_panels(dense_shape(255, 14336, 1024)));
  for (const int bits : {4, 8})
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (const bool backward : {false, true})
        for (const std::int64_t rank : {0, 16}) {
          ProductShape shape = dense_shape(4096, 4000, 1111);
          shape.bits = bits;
          shape.dtype = dtype;
          shape.backward = backward;
          shape.rank = rank;
          shape.aligned = shape.aligned_64 = false;
          EXPECT(is_by_panels(shape));
          shape.masked = true;
          EXPECT(!is_by_panels(shape));
          shape.masked = false;
          shape.has_dense_gemm = false;
          EXPECT(!is_by_panels(shape));
        }
}

// The panel is the smallest one whose products fill the device, so that each wave uses 128 or more of the 132 SMs; or
// the one that memory allows and that comes nearest.
TEST(panel_is_within_its_memory_and_fills_the_device) {
  const struct {
    std::int64_t rows, cols, inner, panel_cols;
  } panels[] = {{4096, 4096, 4096, 1024}, {2048, 4096, 4096, 1024},  {1024, 4096, 4096, 2048}, {8192, 4096, 14336, 256},
                {4096, 4096, 14336, 512}, {2048, 4096, 14336, 1024}, {1600, 2048, 4096, 1024}};  // 13 by 16 tiles,
                                                                                                 // which are two waves
  for (const auto& [rows, cols, inner, panel_cols] : panels)
    EXPECT(panels_of(dense_shape(rows, cols, inner)).cols == panel_cols);
  EXPECT(panels_of(dense_shape(1024, 4096, 14336)).cols == 1024);  // 64 tiles in 32 MB, half as many as SMs
  EXPECT(!is_by_panels(dense_shape(100'000, 4096, 140'000)));      // a panel would not have even 128 columns
  for (const std::int64_t rows : {256, 769, 8192, 8193, 100'000})
    for (const std::int64_t cols : {1, 127, 128, 129, 4096, 128'256})
      for (const std::int64_t inner : {1, 100, 4096, 28672, 65536})
        for (const std::int64_t rank : {0, 1, 64})
          for (const DType dtype : {DType::f32, DType::bf16})
            for (const int num_sms : {1, 132}) {
              ProductShape shape = dense_shape(rows, cols, inner);
              shape.dtype = dtype;
              shape.rank = rank;
              shape.num_sms = num_sms;
              if (!is_by_panels(shape)) continue;
              const PanelsConfig config = panels_of(shape);
              const std::int64_t column_elements = panel_column_elements(inner, rank);
              EXPECT(column_elements >= inner + rank && column_elements < inner + rank + kPanelAlignment);
              EXPECT(config.cols > 0 && config.cols % kPanelCols == 0);
              EXPECT(config.cols * column_elements * static_cast<std::int64_t>(size_of(dtype)) <= kMaxPanelBytes);
              EXPECT(rank == 0 ? config.rows == rows : config.rows <= kMaxConcatenatedRows && config.rows > rows / 16);
            }
}

// ---- wgmma, on compute capability 9.0 ----

ProductShape on_hopper(std::int64_t rows, std::int64_t cols = 4096, std::int64_t inner = 4096, bool backward = false) {
  ProductShape shape = dense_shape(rows, cols, inner);
  shape.backward = backward;
  shape.has_dense_gemm = false;
  shape.has_wgmma = true;
  shape.tma_can_load = true;
  shape.smem_bytes = kHopperSmem;
  shape.reserved_smem_bytes = 1024;
  return shape;
}
constexpr KernelOverride kWgmma{KernelOverride::Kernel::wgmma};
WgmmaConfig wgmma_of(const ProductShape& shape, const std::optional<KernelOverride>& forced) {
  return std::get<WgmmaConfig>(choose_product(shape, forced));
}
KernelOverride forced_wgmma(int tile_rows, std::optional<bool> pairs) {
  KernelOverride forced = kWgmma;
  forced.tile_rows = tile_rows;
  forced.pairs = pairs;
  return forced;
}
bool is_by_wgmma(const ProductShape& shape, const std::optional<KernelOverride>& forced = std::nullopt) {
  return std::holds_alternative<WgmmaConfig>(choose_product(shape, forced));
}

TEST(wgmma_is_for_all_rows_but_those_of_gemv) {
  for (const bool backward : {false, true}) {
    const auto shape = [&](std::int64_t rows) { return on_hopper(rows, 4096, 4096, backward); };
    for (const std::int64_t rows : {0, 1, 8}) EXPECT(is_by_wgmma(shape(rows)) == backward);
    for (const std::int64_t rows : {9, 16, 17, 32, 64, 65, 128, 512, 768, 100'000}) EXPECT(is_by_wgmma(shape(rows)));
  }
  EXPECT(is_by_wgmma(on_hopper(1), kWgmma));
}

TEST(wgmma_is_for_fewer_rows_than_panels_where_there_is_a_dense_product) {
  for (const bool backward : {false, true})
    for (const std::int64_t rank : {0, 16})
      for (const std::int64_t rows : {64, 255, 256, 2048, 100'000}) {
        ProductShape shape = on_hopper(rows, 4096, 4096, backward);
        shape.rank = rank;
        EXPECT(is_by_wgmma(shape));
        shape.has_dense_gemm = true;
        EXPECT(is_by_wgmma(shape) == (rows < 256) && is_by_panels(shape) == (rows >= 256));
        EXPECT(is_by_wgmma(shape, kWgmma));
      }
}

TEST(wgmma_takes_only_what_it_can_load) {
  for (const std::optional<KernelOverride>& forced : {std::optional<KernelOverride>(), std::optional(kWgmma)}) {
    const auto takes_changed = [&](const auto& change) {
      ProductShape shape = on_hopper(512);
      change(shape);
      return is_by_wgmma(shape, forced);
    };
    EXPECT(takes_changed([](ProductShape&) {}));
    EXPECT(takes_changed([](ProductShape& shape) { shape.dtype = DType::f16; }));
    EXPECT(!takes_changed([](ProductShape& shape) { shape.has_wgmma = false; }));
    EXPECT(!takes_changed([](ProductShape& shape) { shape.dtype = DType::f32; }));
    EXPECT(!takes_changed([](ProductShape& shape) { shape.bits = 8; }));
    EXPECT(takes_changed([](ProductShape& shape) { shape.backward = true; }));
    EXPECT(takes_changed([](ProductShape& shape) { shape.masked = shape.backward = true; }));
    EXPECT(!takes_changed([](ProductShape& shape) { shape.aligned_64 = false; }));  // because of K or the blocksize
    EXPECT(!takes_changed([](ProductShape& shape) { shape.tma_can_load = false; }));
    EXPECT(!takes_changed([](ProductShape& shape) { shape.groups = 4; }));
    EXPECT(!takes_changed([](ProductShape& shape) { shape.smem_bytes = kAmpereSmem; }));
    EXPECT(!takes_changed([](ProductShape& shape) { shape.reserved_smem_bytes = 1025; }));
    EXPECT(!takes_changed([](ProductShape& shape) { shape.inner = std::int64_t{1} << 31; }));
  }
}

// On 132 SMs: the smallest tile that holds all rows, or several smaller ones where that leaves fewer SMs idle.
constexpr struct {
  std::int64_t rows, cols, inner;
  int tile;
  bool backward = false;
} kTilesOfWgmma[] = {
    {9, 3712, 4096, 16},
    {16, 3712, 4096, 16},
    {17, 3712, 4096, 32},
    {32, 3712, 4096, 32},
    {33, 3712, 4096, 64},
    {64, 3712, 4096, 64},
    {65, 3584, 4096, 128},
    {128, 3584, 4096, 128},
    {128, 4096, 4096, 64},  // 64 in clusters of 2, because pairs of 128 rows have too few clusters of 8
    {512, 4096, 4096, 128},
    {768, 4096, 4096, 256},
    {100'000, 4096, 4096, 256},
    {256, 4096, 4096, 128},  // 64 tiles in clusters of 2, rather than 32 in runs
    {640, 4096, 4096, 128},  // 160, rather than 96 of 128 rows that do not exist
    {128, 896, 4096, 64},
    {256, 896, 4096, 64},     // 14 in clusters of 8 and 28 in clusters of 4, rather than half
    {1536, 4096, 1024, 128},  // 384, three for most SMs, rather than 192
    // dX, whose steps take other times, and whose warpgroups exchange elements at the end of each tile
    {12, 4096, 14336, 16, true},
    {12, 8192, 4096, 16, true},
    {160, 3072, 2048, 32, true},   // 120, rather than 72 of 64 rows in runs
    {160, 7168, 14336, 256, true}  // 56 in runs, rather than 112 of 128 rows
};

TEST(tile_of_wgmma_takes_the_least_time) {
  for (const auto& [rows, cols, inner, tile, backward] : kTilesOfWgmma) {
    EXPECT(wgmma_of(on_hopper(rows, cols, inner, backward), std::nullopt).gemm.tile_rows == tile);
  }
}

// Of clusters of 4 an H100 of 132 SMs may run only 29 at once, and of clusters of 8 only 14.
void expect_one_wave_on_every_h100(const WgmmaConfig& config, int num_sms) {
  const int blocks = config.blocks_per_cluster(), clusters = config.gemm.blocks / blocks;
  if (num_sms == 132) EXPECT(clusters <= (blocks == 8 ? 14 : blocks == 4 ? 29 : 132 / blocks));
}

TEST(tiles_of_wgmma_hold_the_rows_and_every_step_is_done_once) {
  for (const int tile : {16, 32, 64, 128, 256}) EXPECT(wgmma_smem_bytes(tile) <= kHopperSmem);
  for (const std::int64_t rows : {9, 17, 33, 65, 128, 129, 257, 384, 512, 100'000})
    for (const std::int64_t cols : kSizes)
      for (const std::int64_t inner : {64, 192, 256, 320, 384, 448, 4096, 14336})
        for (const int num_sms : kNumSms) {
          ProductShape shape = on_hopper(rows, cols, inner);
          shape.num_sms = num_sms;
          for (const std::optional<bool> forced_pairs :
               {std::optional<bool>(), std::optional(false), std::optional(true)}) {
            const WgmmaConfig wgmma = wgmma_of(shape, forced_wgmma(0, forced_pairs));
            const auto& [config, cluster, pairs] = wgmma;
            EXPECT(wgmma_smem_bytes(config.tile_rows) <= kHopperSmem && config.tile_cols == kTileCols);
            EXPECT(config.row_tiles * config.tile_rows >= rows && config.tiles / config.row_tiles * kTileCols >= cols);
            EXPECT(config.steps * kGemmStep == inner && config.blocks <= num_sms);
            EXPECT(num_sms == 1 ? !pairs : pairs == forced_pairs.value_or(pairs));
            EXPECT(!pairs || (cluster >= 1 && config.tiles % 2 == 0 && config.tiles / config.row_tiles % 2 == 0));
            if (cluster == 0) {
              expect_each_step_once(config);
              continue;
            }
            EXPECT(!config.splits_a_tile());  // so that there is no memory of runs
            EXPECT(wgmma.blocks_per_cluster() <= kMaxCluster);
            expect_one_wave_on_every_h100(wgmma, num_sms);
            EXPECT(config.blocks % wgmma.blocks_per_cluster() == 0);
            if (cluster == 1) {
              const int max_blocks = pairs ? num_sms / 2 * 2 : num_sms;
              EXPECT(config.blocks == std::min<std::int64_t>(config.tiles, max_blocks));
            } else {
              EXPECT(cluster == 2 || cluster == 4 || cluster == 8);
              EXPECT(config.blocks == config.tiles * cluster && config.steps >= cluster);
            }
          }
        }
}

// How many blocks share a tile by wgmma on 132 SMs, of which clusters of 4 can use 116, and of 8 112; 0 is runs.
// The tile has 16, 64 or 256 rows, and no pairs of blocks share them.
constexpr struct {
  std::int64_t rows, cols, inner;
  int cluster;
} kClusters[] = {
    {64, 3712, 4096, 4},     // 29 tiles
    {64, 3840, 4096, 0},     // 30, one more than there are clusters of 4
    {512, 4096, 4096, 2},    // 64
    {512, 4224, 4096, 2},    // 66
    {512, 4352, 4096, 0},    // 68
    {1024, 4096, 4096, 1},   // 128
    {1024, 4224, 4096, 1},   // 132
    {1024, 4352, 4096, 0},   // 136, a second wave of 4
    {2048, 4096, 4096, 1},   // 256, two waves of almost all SMs
    {2048, 4096, 14336, 0},  // the same, but the 8 that are idle could do more than an exchange takes
    {64, 1024, 4096, 8},     // 8 tiles, each of which 16 runs would share
    {64, 1792, 4096, 8},     // 14
    {64, 1920, 4096, 4},     // 15, one more than there are clusters of 8
    {64, 1024, 64 * 24, 8},  // 24 steps
    {64, 1024, 64 * 12, 4},   {16, 3712, 64 * 16, 4},
    {64, 4096, 64 * 8, 2},    {64, 4096, 64 * 5, 1},  // so few that they take as long as an exchange
    {100'000, 4096, 4096, 0},                         // many waves
};

TEST(wgmma_shares_tiles_in_clusters_where_that_is_cheaper_than_runs) {
  for (const auto& [rows, cols, inner, expected] : kClusters) {
    const int tile_rows = rows <= 16 ? 16 : rows <= 64 ? 64 : 256;
    EXPECT(wgmma_of(on_hopper(rows, cols, inner), forced_wgmma(tile_rows, false)).cluster == expected);
  }
}

// On 132 SMs pairs of blocks share rows where L2 would take longest: by tiles of 128 and 256 rows, if these
// are whole or belong to clusters, and have more than two steps.
constexpr struct {
  std::int64_t rows, cols, inner;
  bool backward, pairs;
} kPairs[] = {
    {1024, 4096, 4096, false, true},     // 128 tiles
    {256, 3584, 4096, false, true},      // 56 in clusters of 4 blocks
    {128, 3584, 4096, false, true},      // 28 in clusters of 8
    {256, 4096, 4096, false, false},     // 64, for which there are too few clusters of 4
    {100'000, 4096, 4096, false, true},  // many waves, as quick as runs
    {1024, 4096, 4096, true, true},      // 128 tiles of dX
    {64, 4096, 4096, true, false},       // decoding takes longer
    {64, 4096, 4096, false, false},      // and here
    {1024, 4096, 128, false, false},     // 2 steps, beside which the barrier of pairs matters
    {1024, 4224, 4096, false, false},    // 33 tiles of columns, of which pairs make 34 and a second wave
    {1280, 3328, 4096, false, true},     // 26
};

TEST(pairs_of_blocks_share_rows_where_l2_takes_longest) {
  for (const auto& [rows, cols, inner, backward, pairs] : kPairs) {
    EXPECT(wgmma_of(on_hopper(rows, cols, inner, backward), std::nullopt).pairs == pairs);
  }
}

// Pairs that are forced take the clusters that hold two tiles, and an odd number of tiles one more in each row.
constexpr struct {
  std::int64_t rows, cols, tiles;
  int cluster, blocks;
} kForcedPairs[] = {
    {64, 2048, 16, 4, 64},     // 8 clusters of 4 + 4 blocks, rather than of 8
    {64, 3584, 28, 4, 112},    // 14, which is as many as run at once
    {64, 3712, 30, 2, 60},     // 15 of 2 + 2
    {256, 4224, 136, 1, 132},  // four rows of tiles; the last 4 are a second wave
    {64, 128, 2, 4, 8},        // one tile, and one that has no columns
};

TEST(pairs_of_tiles_share_clusters) {
  for (const auto& [rows, cols, tiles, cluster, blocks] : kForcedPairs) {
    const WgmmaConfig config = wgmma_of(on_hopper(rows, cols), forced_wgmma(64, true));
    EXPECT(config.pairs && config.gemm.tiles == tiles && config.cluster == cluster && config.gemm.blocks == blocks);
  }
}

TEST(override_names_a_kernel) {
  using Kernel = KernelOverride::Kernel;
  const auto named = [](const std::string& text) {
    setenv("QLN_FORCE_KERNEL", text.c_str(), 1);
    return forced_kernel();
  };
  unsetenv("QLN_FORCE_KERNEL");
  EXPECT(!forced_kernel() && !named(""));
  EXPECT(named("general")->kernel == Kernel::general && named("gemv")->kernel == Kernel::gemv);
  EXPECT(named("gemm")->kernel == Kernel::gemm && named("panels")->kernel == Kernel::panels);
  for (const int rows : {0, 16, 32, 64, 128, 256}) {
    const std::string name = rows == 0 ? "wgmma" : "wgmma:" + std::to_string(rows);
    EXPECT(named(name)->kernel == Kernel::wgmma && named(name)->tile_rows == rows && !named(name)->pairs.has_value());
    EXPECT(named(name + ",pairs")->tile_rows == rows && named(name + ",pairs")->pairs == true);
    EXPECT(named(name + ",alone")->tile_rows == rows && named(name + ",alone")->pairs == false);
    EXPECT(rows == 0 || wgmma_of(on_hopper(700), *forced_kernel()).gemm.tile_rows == rows);
  }
  for (const char* text : {"tiles", "wgmma:48", "wgmma:", "wgmma64", "wgmma:64x", "gemm,pairs", "wgmma,both", "1"}) {
    try {
      named(text);
      EXPECT(false);
    } catch (const Unavailable& error) {
      EXPECT(std::string(error.what()).find(std::string("got \"") + text + "\"") != std::string::npos);
    }
  }
  unsetenv("QLN_FORCE_KERNEL");
}

TEST(forced_kernel_is_used_where_it_supports_the_shape) {
  using Kernel = KernelOverride::Kernel;
  for (const std::int64_t rows : {1, 8, 9, 300, 4096})
    for (const bool backward : {false, true}) {
      ProductShape shape = on_hopper(rows, 4096, 4096, backward);
      shape.has_dense_gemm = true;
      const auto forced = [&](Kernel kernel) { return choose_product(shape, KernelOverride{kernel}); };
      EXPECT(std::holds_alternative<GeneralConfig>(forced(Kernel::general)));
      EXPECT(supports_gemv(shape) == (rows <= 8 && !backward));
      EXPECT(std::holds_alternative<GemvConfig>(forced(Kernel::gemv)) == supports_gemv(shape));
      EXPECT(supports_gemv(shape) || forced(Kernel::gemv).index() == choose_product(shape).index());
      EXPECT(std::holds_alternative<GemmConfig>(forced(Kernel::gemm)));
      EXPECT(std::holds_alternative<WgmmaConfig>(forced(Kernel::wgmma)));
      const auto panels = std::get<PanelsConfig>(forced(Kernel::panels));
      EXPECT(panels.cols > 0 && panels.rows == rows);
    }
}

TEST(disabled_kernel_computes_nothing_and_others_take_its_place) {
  using Kernel = KernelOverride::Kernel;
  struct {
    CudaKernel bit;
    Kernel kernel;
    bool (*supports)(const ProductShape&);
  } constexpr kKernels[] = {{kCudaGemv, Kernel::gemv, supports_gemv},
                            {kCudaGemm, Kernel::gemm, supports_gemm},
                            {kCudaWgmma, Kernel::wgmma, supports_wgmma},
                            {kCudaPanels, Kernel::panels, supports_panels}};
  for (const std::int64_t rows : {8, 300, 4096}) {
    ProductShape shape = on_hopper(rows, 4096, 4096, false);
    shape.has_dense_gemm = true;
    for (const auto& [bit, kernel, supports] : kKernels) {
      shape.disabled = 0;
      EXPECT(supports(shape) == (kernel != Kernel::gemv || rows <= 8));
      const std::size_t chosen = choose_product(shape).index();
      shape.disabled = bit;
      EXPECT(!supports(shape));
      for (const auto& other : kKernels)
        EXPECT(other.bit == bit || other.supports(shape) == (rows <= 8 || other.bit != kCudaGemv));
      const std::size_t index = static_cast<std::size_t>(kernel);  // of the alternative in ProductConfig
      EXPECT(choose_product(shape).index() != index && choose_product(shape, KernelOverride{kernel}).index() != index);
      EXPECT(chosen == index || choose_product(shape).index() == chosen);
    }
    shape.disabled = kCudaGemv | kCudaGemm | kCudaWgmma | kCudaPanels;
    EXPECT(takes<GeneralConfig>(shape));
  }
}

// ---- rows in groups ----

ProductShape in_groups(std::int64_t rows, std::int64_t groups, bool group_weights, bool backward = false) {
  ProductShape shape = dense_shape(rows);
  shape.backward = backward;
  shape.groups = groups;
  shape.group_weights = group_weights;
  shape.smem_bytes = kHopperSmem;
  return shape;
}
Tile tile_of(const ProductShape& shape) {
  const auto config = std::get<GemmConfig>(choose_product(shape));
  EXPECT(config.grouped == (shape.groups > 0));
  return {config.tile_rows, config.tile_cols};
}

// The kernel is chosen by the average number of rows in a group, because the host does not know more than that.
TEST(kernel_of_groups_with_a_weight_each_follows_their_average) {
  constexpr std::int64_t kGroups = 128;
  const auto with_average = [&](std::int64_t rows) { return in_groups(rows * kGroups, kGroups, true); };
  EXPECT(takes<GemvConfig>(in_groups(1, kGroups, true)) && takes<GemvConfig>(with_average(4)));
  for (const std::int64_t rows : {5, 16, 17, 32}) {
    const auto config = std::get<GemmConfig>(choose_product(with_average(rows)));
    EXPECT(config.small_m && config.tile_rows == (rows <= 16 ? 16 : 32));
  }
  for (const bool backward : {false, true}) {
    const auto shape = [&](std::int64_t rows) { return in_groups(rows * kGroups, kGroups, true, backward); };
    EXPECT(tile_of(shape(33)) == kTile64 && tile_of(shape(64)) == kTile64);
    EXPECT(tile_of(shape(65)) == kTile128 && tile_of(shape(1023)) == kTile128);
    EXPECT(tile_of(shape(1024)) == kTile256);
    if (backward) EXPECT(tile_of(shape(1)) == (Tile{16, kTileCols}));
  }
}

// The kernel is chosen by the number of all rows, because the weight is decoded for all of them, whatever their
// adapters.
TEST(kernel_of_groups_with_a_shared_weight_follows_all_rows) {
  for (const std::int64_t groups : {2, 1000}) {
    EXPECT(takes<GemvConfig>(in_groups(8, groups, false)));
    EXPECT(std::get<GemmConfig>(choose_product(in_groups(9, groups, false))).small_m == (groups == 2));
    EXPECT(tile_of(in_groups(9, groups, false)).rows == 16);
    EXPECT(tile_of(in_groups(33, groups, false)) == kTile64);
    EXPECT(tile_of(in_groups(128, groups, false)) == kTile128);
    EXPECT(tile_of(in_groups(4096, groups, false)) == kTile256);
    EXPECT(std::get<GemmConfig>(choose_product(in_groups(4096, groups, false))).row_tiles == 16);
  }
}

TEST(groups_get_the_general_kernel_where_vectors_do_not_reach) {
  for (const bool group_weights : {false, true})
    for (const std::int64_t rows : {1, 100, 10'000}) {
      const ProductShape shape = in_groups(rows, 7, group_weights);
      EXPECT(!is_by_panels(shape));
      ProductShape unaligned = shape, small_blocks = shape, fp32 = shape;
      unaligned.aligned = unaligned.aligned_64 = false;
      small_blocks.small_blocks = true;
      fp32.dtype = DType::f32;
      EXPECT(takes<GeneralConfig>(unaligned) && takes<GeneralConfig>(small_blocks));
      EXPECT(rows == 1 ? takes<GemvConfig>(fp32) : takes<GeneralConfig>(fp32));
    }
}

// The launched blocks divide the tiles that they find among themselves.
TEST(steps_of_as_many_tiles_as_groups_have_are_done_once) {
  for (const std::int64_t rows : {1, 100, 3000})
    for (const std::int64_t groups : {2, 8, 128})
      for (const bool backward : {false, true}) {
        const ProductShape shape = in_groups(rows, groups, true, backward);
        if (takes<GemvConfig>(shape)) continue;
        const auto config = std::get<GemmConfig>(choose_product(shape));
        EXPECT(config.row_tiles == max_row_tiles(rows, groups, config.tile_rows));
        for (std::int64_t tiles = 0; tiles <= config.row_tiles; tiles = 2 * tiles + 1) {
          const GemmConfig found = config.with_row_tiles(tiles);
          EXPECT(found.tiles == tiles * ceil_div(shape.cols, kTileCols) && found.blocks <= config.blocks);
          EXPECT((found.blocks == 0) == (tiles == 0));
          expect_each_step_once(found);
        }
      }
}

TEST(row_tiles_are_as_many_as_groups_of_any_sizes_may_have) {
  EXPECT(max_row_tiles(0, 8, 64) == 0);
  EXPECT(max_row_tiles(1, 128, 16) == 1);  // one group has the row
  EXPECT(max_row_tiles(5, 128, 16) == 5);  // five groups may have one row each
  EXPECT(max_row_tiles(128, 2, 64) == 3);  // the groups may have 65 and 63 rows
  EXPECT(max_row_tiles(130, 2, 64) == 4);  // the groups may have 65 and 65 rows
  EXPECT(max_row_tiles(129, 1, 64) == 3);
}

TEST(parts_of_a_long_sum_cover_it) {
  for (const std::int64_t tiles : {0, 1, 5, 64, 100000})
    for (const std::int64_t inner : {0, 1, 255, 256, 257, 4096, 14336, 1000003})
      for (const int num_sms : kNumSms) {
        const LowRankSplit split = low_rank_split(tiles, inner, num_sms);
        EXPECT(split.parts >= 1 && split.parts * split.length >= inner);
        EXPECT(split.parts == 1 || (split.parts - 1) * split.length < inner);
        EXPECT(split.parts == 1 || split.parts * tiles <= 2 * num_sms);
        for (const std::int64_t group_inner : {std::int64_t{0}, std::int64_t{1}, inner, 3 * inner})  // inner on average
          EXPECT(split.parts * low_rank_length(group_inner, split.parts) >= group_inner);
      }
}

TEST(steps_are_counted_beyond_an_int) {
  const std::int64_t inner = std::int64_t{1} << 34;
  const auto config = std::get<GemmConfig>(
      choose_product({.rows = 9, .cols = 4, .inner = inner, .dtype = DType::f16, .aligned = true, .num_sms = 100}));
  EXPECT(config.steps == inner / kGemmStep && config.first_step(config.blocks) == inner / kGemmStep);
}

// ---- measurements ----

constexpr MeasuredProduct kMeasured[] = {
    {80, MeasuredProduct::forward, DType::bf16, 0, 64, 4096, 4096, "panels", 1.0},
    {90, MeasuredProduct::forward, DType::bf16, 0, 64, 4096, 4096, "gemm", 1.0},
    {90, MeasuredProduct::forward, DType::bf16, 0, 64, 4096, 14336, "wgmma:64,alone", 1.0},
    {90, MeasuredProduct::forward, DType::bf16, 16, 64, 4096, 4096, "general", 1.0},
    {90, MeasuredProduct::dx, DType::bf16, 0, 64, 4096, 14336, "wgmma:32", 1.0},
    {90, MeasuredProduct::forward, DType::bf16, 0, 256, 4096, 4096, "wgmma", 1.0},
};
ProductShape of_capability(int capability, ProductShape shape) {
  shape.compute_capability = capability;
  return shape;
}
std::string measured(const ProductShape& shape) {
  for (const MeasuredProduct& row : kMeasured) {
    const auto found = measured_kernel(shape, kMeasured);
    if (found && row.compute_capability == shape.compute_capability && found == kernel_of_name(row.kernel))
      return std::string(row.kernel);
  }
  return "";
}

TEST(nearest_measurement_of_the_same_kind_decides) {
  const auto kernel = [](std::int64_t rows, std::int64_t N, std::int64_t K, const auto& change) {
    ProductShape shape = of_capability(90, on_hopper(rows, N, K));
    change(shape);
    return measured(shape);
  };
  const auto as_it_is = [](ProductShape&) {};
  EXPECT(kernel(64, 4096, 4096, as_it_is) == "gemm" && kernel(64, 4096, 14336, as_it_is) == "wgmma:64,alone");
  EXPECT(kernel(32, 4096, 4096, as_it_is) == "gemm" && kernel(31, 4096, 4096, as_it_is).empty());
  EXPECT(kernel(127, 4096, 4096, as_it_is) == "gemm" && kernel(129, 4096, 4096, as_it_is) == "wgmma");
  EXPECT(kernel(64, 8192, 8192, as_it_is) == "wgmma:64,alone" && kernel(64, 8192, 7168, as_it_is) == "gemm");
  EXPECT(kernel(64, 8320, 4096, as_it_is).empty() && kernel(0, 4096, 4096, as_it_is).empty());
  EXPECT(kernel(64, 4096, 4096, [](ProductShape& shape) { shape.rank = 4; }) == "general");
  EXPECT(kernel(64, 4096, 4096, [](ProductShape& shape) { shape.dtype = DType::f16; }) == "gemm");
  EXPECT(kernel(64, 14336, 4096, [](ProductShape& shape) { shape.backward = true; }) == "wgmma:32");  // dX of [N, K]
  EXPECT(kernel(64, 4096, 4096, [](ProductShape& shape) { shape.compute_capability = 80; }) == "panels");
  for (const auto& change :
       {+[](ProductShape& shape) { shape.compute_capability = 0; },
        +[](ProductShape& shape) { shape.compute_capability = 120; },
        +[](ProductShape& shape) { shape.dtype = DType::f32; }, +[](ProductShape& shape) { shape.bits = 8; },
        +[](ProductShape& shape) { shape.groups = 2; }, +[](ProductShape& shape) { shape.plain_scales = false; },
        +[](ProductShape& shape) { shape.aligned_64 = false; }})
    EXPECT(kernel(64, 4096, 4096, change).empty());
}

// So that devices of one compute capability compute the same.
TEST(measurement_decides_for_any_number_of_sms) {
  for (const int num_sms : kNumSms) {
    ProductShape shape = of_capability(90, on_hopper(100, 5000, 5000));
    shape.num_sms = num_sms;
    EXPECT(measured(shape) == "gemm");
  }
}

TEST(committed_measurements_name_kernels) {
  for (const MeasuredProduct& row : measured_products()) {
    EXPECT(kernel_of_name(row.kernel).has_value() && row.us > 0 && row.rank >= 0);
    EXPECT(row.compute_capability >= 80 && std::min({row.M, row.N, row.K}) > 0);
    ProductShape shape = on_hopper(row.M, row.N, row.K);
    if (row.direction == MeasuredProduct::dx) shape = on_hopper(row.M, row.K, row.N, true);
    shape.compute_capability = row.compute_capability;
    shape.dtype = row.dtype;
    shape.rank = row.rank;
    EXPECT(measured_kernel(shape) == kernel_of_name(row.kernel));  // there are no two rows of a product
  }
}

}  // namespace
}  // namespace qlora_native

int main() { return run_tests(); }
