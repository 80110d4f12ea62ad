#include "product/config.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <optional>
#include <string_view>

#include "common/layout.h"
#include "hooks.h"
#include "product/measured.h"
#include "qlora_native/error.h"

namespace qlora_native {
namespace {

// Whether more than an eighth of a dimension that is cut into parts of `large` would be zeros which parts of `small` do
// not need.
bool wastes(std::int64_t size, std::int64_t large, std::int64_t small) {
  constexpr std::int64_t kPart = 8;
  const std::int64_t in_large = ceil_div(size, large) * large, in_small = ceil_div(size, small) * small;
  return (in_large - in_small) * kPart > in_large;
}

// How many rows each weight multiplies, on average.
std::int64_t rows_per_weight(const ProductShape& shape) {
  return shape.group_weights ? ceil_div(shape.rows, shape.groups) : shape.rows;
}
std::int64_t count_row_tiles(const ProductShape& shape, int tile_rows) {
  return max_row_tiles(shape.rows, shape.group_weights ? shape.groups : 1, tile_rows);
}
// Groups, and gemv over a weight without plain scales, have kernels for vectors, and the general one.
bool has_layout_of_kernels(const ProductShape& shape) {
  return !shape.small_blocks && ((shape.groups == 0 && shape.plain_scales) || shape.aligned);
}

// Counts tiles and the steps of each, and divides all steps among the blocks.
void divide_steps(const ProductShape& shape, int step, GemmConfig& config) {
  config.steps = static_cast<int>(ceil_div(shape.inner, step));
  config.row_tiles = 1;
  config.tiles = ceil_div(shape.cols, config.tile_cols);
  config = config.with_row_tiles(count_row_tiles(shape, config.tile_rows));
}

// ---- gemv ----------------------------------------------------------------------------------------------------------

// Whether a weight has so few rows that reading it is all that matters. The limit for the average of groups is half of
// kGemvRows, so that few groups have more than that.
bool reads_take_longest(const ProductShape& shape) {
  return rows_per_weight(shape) <= (shape.group_weights ? kGemvRows / 2 : kGemvRows);
}

GemvConfig gemv_config(const ProductShape& shape) {
  constexpr std::int64_t kBlocksPerSm = 2;  // each has a table of the codebook of 32 KB
  const std::int64_t tiles = count_row_tiles(shape, kGemvRows) * ceil_div(shape.cols, kGemvCols);
  return {.aligned = shape.aligned, .blocks = static_cast<int>(std::min(kBlocksPerSm * shape.num_sms, tiles))};
}

// ---- gemm ----------------------------------------------------------------------------------------------------------

// Up to how many rows small_m.cuh is for. With groups it has no registers for more. It multiplies with one adapter
// after another, while gemm.cuh takes several in a step.
int max_small_m(const ProductShape& shape) {
  constexpr std::int64_t kMaxAdapters = 4;
  if (shape.groups == 0) return kMaxSmallM;
  return shape.group_weights || shape.groups <= kMaxAdapters ? kMaxSmallM / 2 : 0;
}

// Whether tiles of 256 rows leave few of them empty. In a group, half of the last tile is zeros on average.
bool fills_256_rows(const ProductShape& shape) {
  constexpr std::int64_t kPart = 8;
  if (shape.group_weights) return rows_per_weight(shape) >= kPart * 256 / 2;
  return !wastes(shape.rows, 256, 128);
}

// Few rows get the smallest tile that holds all of them, so that no tensor core multiplies zeros. Many rows get a tile
// of as many rows as shared memory has room for, because each weight is decoded once for all rows of a tile. That of
// 256 rows keeps the tensor cores busiest, and that of 256 columns is next: warps of both have the same number of
// columns, so that they load X equally rarely.
void choose_tile(const ProductShape& shape, GemmConfig& config) {
  const auto choose = [&](int rows, int cols) {
    config.tile_rows = rows;
    config.tile_cols = cols;
  };
  const auto fits = [&](int rows, int cols) { return shape.smem_bytes >= gemm_smem_bytes(rows, cols); };
  const std::int64_t rows = rows_per_weight(shape);
  if (rows <= max_small_m(shape) && shape.aligned_64 && !shape.backward) {
    config.small_m = true;
    return choose(rows <= 16 ? 16 : rows <= 32 ? 32 : 64, kTileCols);
  }
  if (rows <= 16) return choose(16, kTileCols);
  if (rows <= 64 || !shape.aligned || !fits(128, kTileCols)) return choose(64, kTileCols);
  if (fits(256, kTileCols) && fills_256_rows(shape)) return choose(256, kTileCols);
  const bool wide = shape.aligned_64 && fits(128, kMaxTileCols) && shape.groups == 0;
  choose(128, wide && !wastes(shape.cols, kMaxTileCols, kTileCols) ? kMaxTileCols : kTileCols);
}

// How many blocks with this tile an SM holds at once. An SM has 1 KB more shared memory than a block may have, and
// keeps 1 KB of it for each block.
int blocks_per_sm(const ProductShape& shape, const GemmConfig& config) {
  constexpr std::size_t kReserved = 1024;
  const std::size_t bytes = kReserved + (config.small_m ? small_m_smem_bytes(config.tile_rows)
                                                        : gemm_smem_bytes(config.tile_rows, config.tile_cols));
  const int max_blocks = gemm_blocks_per_sm(config.tile_rows);
  return shape.smem_bytes + kReserved >= static_cast<std::size_t>(max_blocks) * bytes ? max_blocks : 1;
}

GemmConfig gemm_config(const ProductShape& shape) {
  GemmConfig config{.aligned = shape.aligned, .grouped = shape.groups > 0};
  choose_tile(shape, config);
  config.blocks = blocks_per_sm(shape, config) * shape.num_sms;
  divide_steps(shape, config.small_m ? kSmallMStep : kGemmStep, config);
  return config;
}

// ---- wgmma: cycles of an H100 ---------------------------------------------------------------------------------------
//
// All figures are in 16 cycles. They are an estimate that no GPU has confirmed.

// The tiles of wgmma, and how long a step of one takes at least:
//
//   forward, backward   decoding, counted from the machine code for sm_90a: the largest of shared memory (128 bytes a
//                       cycle), issue (4 instructions of a warp a cycle), and ALU (64 results of integer and logic
//                       instructions a cycle: CUDA C++ Programming Guide, "Throughput of native arithmetic
//                       instructions")
//   alone, in_pair      what else may bound it, for a block alone and for one of a pair: the tensor cores (2048
//                       multiply-adds a cycle), or L2, which gives all SMs 6.65 TB/s at 1.755 GHz (openxla/xla,
//                       gpu_dot_fusion_cost_model.cc), and is assumed to give each at most 64 bytes a cycle
constexpr struct WgmmaTileCycles {
  int rows;
  std::int64_t forward, backward, alone, in_pair;

  std::int64_t step_cycles(bool is_backward, bool pairs) const {
    return std::max(is_backward ? backward : forward, pairs ? in_pair : alone);
  }
} kWgmmaTiles[] = {
    {16, 26, 23, 14, 11}, {32, 25, 26, 18, 13}, {64, 27, 30, 27, 19}, {128, 39, 40, 45, 38}, {256, 71, 78, 81, 77}};

// Exchanges of partial sums. A load takes 291 cycles from L2 and 700 from DRAM (github.com/markdewing/AI_kernels,
// latency/README.md). From the shared memory of other blocks it takes 200, and all SMs of an H800 PCIe, 114 at 1.755
// GHz, load 3.3 TB/s so in clusters of 2, and 2.65 TB/s in clusters of 4 (Luo et al., arXiv 2501.12084). For 8 the rate
// is assumed to fall once more as it does from 2 to 4, and stores to be as fast as loads.
//
// In a cluster: a barrier and the latency, and for each 16 rows the time of storing the partial sums into the shared
// memory of other blocks.
constexpr std::int64_t kExchangeCycles = 25;
constexpr struct {
  int blocks;
  std::int64_t cycles_per_16_rows;
} kClusters[] = {{2, 16}, {4, 29}, {8, 42}};
// The barrier of pairs before the first step.
constexpr std::int64_t kPairBarrierCycles = 13;
// By stream-K, in steps: a launch clears the flags, the partial sums go to L2, and the block that has the tile's
// beginning adds those of one run after another, which takes so much more for each two runs.
constexpr std::int64_t kStreamKSteps = 6, kStreamKStepsPerTwoRuns = 3;

// How many clusters every device with so many SMs runs at once. The blocks of a cluster run in one of the device's
// graphics processing clusters, which have up to 18 SMs, and not the same number in each H100: on one, clusters of 8
// were measured to occupy 120 of its 132 SMs (accel-sim/gpu-app-collection#87). A second wave takes as long as the
// first, and the choice must be the same on all. So these are the numbers that CUTLASS falls back to, those of graphics
// processing clusters with 18 SMs each and one with the rest: 29 clusters of 4, or 14 of 8, on 132 SMs.
int clusters_at_once(int blocks_per_cluster, int num_sms) {
  constexpr int kMaxTogether = 18;
  return num_sms / kMaxTogether * (kMaxTogether / blocks_per_cluster) + num_sms % kMaxTogether / blocks_per_cluster;
}

// How many tiles the device has at once, if `cluster` blocks share each.
std::int64_t tiles_at_once(int cluster, bool pairs, int num_sms) {
  const int tiles = pairs ? 2 : 1;
  return std::int64_t{clusters_at_once(cluster * tiles, num_sms)} * tiles;
}

// WgmmaConfig::cluster, and how long the slowest block then takes.
struct TileSharing {
  int cluster;
  std::int64_t cycles;
};

// Chooses what takes the slowest block the least time:
//
//   steps               as many as the block has
//   results             8 cycles for each row, divided among the blocks of a cluster
//   warpgroups of dX    each gives half of its accumulators to the other through shared memory; with 256 rows each has
//                       half as many, and in a cluster they exchange none of these
//   partial sums        in a cluster, to store them, and to add them, 4 for each 16 rows. Only those of the last round
//                       are added and stored when no others are on their way
TileSharing choose_sharing(const GemmConfig& runs, std::int64_t step_cycles, bool backward, bool pairs, int num_sms) {
  const std::int64_t rows = runs.tile_rows, result_cycles = rows / 2, pair_cycles = pairs ? kPairBarrierCycles : 0;
  const bool splits_steps = wgmma_splits_steps(runs.tile_rows);
  const std::int64_t warpgroup_cycles = !backward ? 0 : splits_steps ? rows / 2 : rows / 4;
  const std::int64_t waves = ceil_div(runs.tiles, tiles_at_once(1, pairs, num_sms));
  TileSharing best = {1, waves * (runs.steps * step_cycles + result_cycles + warpgroup_cycles) + pair_cycles};
  const auto consider = [&](int cluster, std::int64_t cycles) {
    if (cycles < best.cycles) best = {cluster, cycles};
  };
  if (!pairs) {
    const std::int64_t others = runs.splits_a_tile() ? ceil_div(std::int64_t{runs.steps}, runs.steps_per_block) : 0;
    const std::int64_t exchange_steps = others == 0 ? 0 : kStreamKSteps + kStreamKStepsPerTwoRuns * others / 2;
    const std::int64_t tiles = ceil_div(runs.tiles, std::int64_t{num_sms});
    consider(0, (runs.steps_per_block + (runs.extra_steps > 0) + exchange_steps) * step_cycles +
                    tiles * (result_cycles + warpgroup_cycles));
  }
  for (const auto& [blocks, cycles_per_16_rows] : kClusters) {
    // Each block must have a step.
    if (blocks * (pairs ? 2 : 1) > kMaxCluster || blocks > runs.steps) break;
    if (runs.tiles > tiles_at_once(blocks, pairs, num_sms)) break;
    const std::int64_t round_cycles = (rows / 4 + result_cycles / blocks) / reduce_rounds(runs.tile_rows, blocks);
    consider(blocks, ceil_div(std::int64_t{runs.steps}, std::int64_t{blocks}) * step_cycles +
                         (splits_steps ? warpgroup_cycles : 0) + kExchangeCycles + rows / 16 * cycles_per_16_rows +
                         round_cycles + pair_cycles);
  }
  return best;
}

// Chooses the tile that takes the slowest block the least time: tiles of more rows decode each weight for more rows,
// smaller ones occupy more SMs, and pairs of blocks load rows once for two tiles.
WgmmaConfig wgmma_config(const ProductShape& shape, int tile_rows, const std::optional<bool>& forced_pairs) {
  const auto allows = [&](bool pairs) { return shape.num_sms == 1 ? !pairs : forced_pairs.value_or(pairs) == pairs; };
  WgmmaConfig best;
  std::int64_t min_cycles = std::numeric_limits<std::int64_t>::max();
  for (const auto& tile : kWgmmaTiles) {
    if (tile_rows != 0 && tile.rows != tile_rows) continue;
    for (const bool pairs : {false, true}) {
      if (!allows(pairs)) continue;
      WgmmaConfig config{
          .gemm = {.aligned = true, .tile_rows = tile.rows, .tile_cols = kTileCols, .blocks = shape.num_sms},
          .pairs = pairs};
      divide_steps(shape, kGemmStep, config.gemm);
      if (pairs) config.gemm.tiles += ceil_div(shape.cols, std::int64_t{kTileCols}) % 2 * config.gemm.row_tiles;
      const std::int64_t step_cycles = tile.step_cycles(shape.backward, pairs);
      const auto [cluster, cycles] = choose_sharing(config.gemm, step_cycles, shape.backward, pairs, shape.num_sms);
      if (cycles >= min_cycles) continue;
      min_cycles = cycles;
      config.cluster = cluster;
      best = config;
    }
  }
  if (best.cluster == 0) return best;
  const std::int64_t at_once = tiles_at_once(best.cluster, best.pairs, shape.num_sms);
  best.gemm.blocks = static_cast<int>(std::min(best.gemm.tiles, at_once) * best.cluster);
  best.gemm.steps_per_block = best.gemm.extra_steps = 0;
  return best;
}

// ---- panels --------------------------------------------------------------------------------------------------------

// From this many rows on, decoded panels go to the application's product. No GPU has run a kernel of this folder yet,
// so this is what others have measured on an H100 of products that decode 4-bit weights while they multiply (Humming),
// and of cuBLAS's dense product, in per cent of the dense peak:
//
//   rows     16   64  128  256  1024  2048
//   fused     8   24   35   39    51    49
//   cuBLAS    4   15   29   55    71    68
//
// The fused product falls behind between 128 and 256 rows. Our estimates of wgmma promise more than that, so they
// decide only after a device has confirmed them, by rows of measured.inc.
constexpr std::int64_t kMinPanelRows = 256;

// The size of a part if `count` is cut evenly: a multiple of `step`, and at most `max_size`.
std::int64_t even_part(std::int64_t count, std::int64_t max_size, std::int64_t step) {
  return ceil_div(ceil_div(count, ceil_div(count, max_size)), step) * step;
}

// The fraction of time in which an SM has a tile. There are `rows` by `cols` tiles of 128 x 128, and `part` of these
// columns are multiplied at a time.
double sm_utilization(std::int64_t rows, std::int64_t cols, std::int64_t part, int num_sms) {
  const auto waves = [&](std::int64_t tiles) { return ceil_div(tiles, num_sms); };
  const std::int64_t all = cols / part * waves(rows * part) + waves(rows * (cols % part));
  return static_cast<double>(rows * cols) / static_cast<double>(all * num_sms);
}

std::int64_t panel_tile_bytes(const ProductShape& shape) {
  const auto element_bytes = static_cast<std::int64_t>(size_of(shape.dtype));
  return kPanelCols * panel_column_elements(shape.inner, shape.rank) * element_bytes;
}

// cuBLAS's tiles are 128 x 128, one for each SM. Among the panels that memory allows, this takes the smallest whose
// products keep 95 % of the SMs busy, or else those that keep the most busy.
PanelsConfig panels_config(const ProductShape& shape) {
  constexpr double kEnough = 0.95;
  PanelsConfig best{.rows = shape.rank == 0 ? shape.rows : even_part(shape.rows, kMaxConcatenatedRows, kPanelCols)};
  double best_utilization = 0.0;
  const std::int64_t tile_bytes = panel_tile_bytes(shape), col_tiles = ceil_div(shape.cols, kPanelCols);
  const std::int64_t row_tiles = ceil_div(std::min(best.rows, shape.rows), kPanelCols);
  for (std::int64_t tiles = std::max<std::int64_t>(kPanelBytes / tile_bytes, 1);
       tiles * tile_bytes <= kMaxPanelBytes && best_utilization < kEnough; ++tiles) {
    const std::int64_t panel_tiles = even_part(col_tiles, tiles, 1);
    const double utilization = sm_utilization(row_tiles, col_tiles, panel_tiles, shape.num_sms);
    if (utilization > best_utilization) {
      best_utilization = utilization;
      best.cols = panel_tiles * kPanelCols;
    }
    if (tiles >= col_tiles) break;
  }
  return best;
}

bool is_wgmma_tile(int rows) {
  return std::any_of(std::begin(kWgmmaTiles), std::end(kWgmmaTiles),
                     [&](const auto& tile) { return tile.rows == rows; });
}

}  // namespace

// ---- the choice ----------------------------------------------------------------------------------------------------

// In fp32 the kernel has no registers for what 8-bit codes without plain scales need.
bool supports_gemv(const ProductShape& shape) {
  if (!shape.plain_scales && shape.bits == 8 && shape.dtype == DType::f32) return false;
  return !(shape.disabled & kCudaGemv) && !shape.backward && has_layout_of_kernels(shape) &&
         (shape.group_weights || shape.rows <= kGemvRows);
}
// fp32 has no tensor-core product that keeps its bits, and the kernels of gemm/ decode pairs of 4-bit codes.
bool supports_gemm(const ProductShape& shape) {
  return !(shape.disabled & kCudaGemm) && shape.dtype != DType::f32 && shape.bits == 4 && shape.plain_scales &&
         has_layout_of_kernels(shape) && shape.reserved_smem_bytes <= kMaxReservedSmem;
}
bool supports_wgmma(const ProductShape& shape) {
  constexpr std::int64_t kMaxCoordinate = 0x7FFFFFFF;  // TMA's coordinates have 32 bits, with a sign
  return !(shape.disabled & kCudaWgmma) && shape.has_wgmma && shape.groups == 0 && shape.dtype != DType::f32 &&
         shape.bits == 4 && shape.plain_scales && shape.aligned_64 && shape.tma_can_load &&
         std::max({shape.rows, shape.cols, shape.inner}) <= kMaxCoordinate - kMaxTileRows &&
         shape.reserved_smem_bytes <= kMaxReservedSmem && shape.smem_bytes >= wgmma_smem_bytes(kMaxTileRows);
}
bool supports_panels(const ProductShape& shape) {
  return !(shape.disabled & kCudaPanels) && shape.has_dense_gemm && !shape.masked && shape.groups == 0 &&
         shape.rows > 0 && shape.cols > 0 && panel_tile_bytes(shape) <= kMaxPanelBytes;
}

namespace {

// The configuration of a kernel, if it supports the shape.
std::optional<ProductConfig> config_of(const ProductShape& shape, const KernelOverride& chosen) {
  using Kernel = KernelOverride::Kernel;
  if (chosen.kernel == Kernel::general) return GeneralConfig{};
  if (chosen.kernel == Kernel::gemv && supports_gemv(shape)) return gemv_config(shape);
  if (chosen.kernel == Kernel::gemm && supports_gemm(shape)) return gemm_config(shape);
  if (chosen.kernel == Kernel::wgmma && supports_wgmma(shape))
    return wgmma_config(shape, chosen.tile_rows, chosen.pairs);
  if (chosen.kernel == Kernel::panels && supports_panels(shape)) return panels_config(shape);
  return std::nullopt;
}

}  // namespace

ProductConfig choose_product(const ProductShape& shape, const std::optional<KernelOverride>& forced) {
  for (const std::optional<KernelOverride>& chosen : {forced, measured_kernel(shape)})
    if (chosen)
      if (const auto config = config_of(shape, *chosen)) return *config;
  if (supports_gemv(shape) && reads_take_longest(shape)) return gemv_config(shape);
  // Without plain scales, what is left beside panels is general.cu, which decodes the weight for each 64 rows.
  const bool for_panels = shape.rows >= kMinPanelRows || !shape.plain_scales;
  if (for_panels && supports_panels(shape)) return panels_config(shape);
  if (supports_wgmma(shape)) return wgmma_config(shape, 0, std::nullopt);
  if (supports_gemm(shape)) return gemm_config(shape);
  return GeneralConfig{};
}

std::optional<KernelOverride> kernel_of_name(std::string_view name) {
  using Kernel = KernelOverride::Kernel;
  if (name == "general") return KernelOverride{Kernel::general};
  if (name == "gemv") return KernelOverride{Kernel::gemv};
  if (name == "gemm") return KernelOverride{Kernel::gemm};
  if (name == "panels") return KernelOverride{Kernel::panels};
  constexpr std::string_view kWgmma = "wgmma", kPairs = ",pairs", kAlone = ",alone";
  if (!name.starts_with(kWgmma)) return std::nullopt;
  KernelOverride found{Kernel::wgmma};
  name.remove_prefix(kWgmma.size());
  if (name.ends_with(kPairs) || name.ends_with(kAlone)) {
    found.pairs = name.ends_with(kPairs);
    name.remove_suffix(kPairs.size());
  }
  if (name.empty()) return found;
  const char* const end = name.data() + name.size();
  if (name.front() != ':' || std::from_chars(name.data() + 1, end, found.tile_rows).ptr != end ||
      !is_wgmma_tile(found.tile_rows)) {
    return std::nullopt;
  }
  return found;
}

std::optional<KernelOverride> forced_kernel() {
  const char* const value = std::getenv("QLN_FORCE_KERNEL");
  if (value == nullptr || *value == '\0') return std::nullopt;
  if (const auto found = kernel_of_name(value)) return found;
  throw Unavailable(
      "QLN_FORCE_KERNEL: expected general, gemv, gemm, wgmma[:ROWS][,pairs|,alone] with 16, 32, 64, 128 "
      "or 256 rows, or panels, got \"" +
      std::string(value) + "\"");
}

LowRankSplit low_rank_split(std::int64_t tiles, std::int64_t inner, int num_sms) {
  constexpr std::int64_t kMinLength = 256;  // a shorter sum is mostly the exchange of its result
  constexpr std::int64_t kBlocksPerSm = 2;  // a block has 256 threads with 128 registers
  const std::int64_t blocks = kBlocksPerSm * num_sms;
  const std::int64_t max_parts = std::min(ceil_div(inner, kMinLength), tiles == 0 ? 1 : blocks / tiles);
  const std::int64_t parts = std::max<std::int64_t>(max_parts, 1);
  const std::int64_t length = low_rank_length(inner, parts);
  return {static_cast<int>(length == 0 ? 1 : ceil_div(inner, length)), length};
}

namespace {

std::string number(std::int64_t n) { return std::to_string(n); }

std::string describe(const ProductShape& shape, const GeneralConfig&) {
  return shape.dtype == DType::f32 ? "general, on CUDA cores" : "general, on tensor cores";
}
std::string describe(const ProductShape&, const GemvConfig& config) {
  return "gemv, " + number(config.blocks) + " blocks";
}
std::string describe_tiles(const GemmConfig& config) {
  return number(config.tiles) + " tiles of " + number(config.tile_rows) + "x" + number(config.tile_cols) + ", " +
         number(config.steps) + " steps each, " + number(config.blocks) + " blocks";
}
std::string describe(const ProductShape&, const GemmConfig& config) {
  return (config.small_m ? "gemm, small M, " : "gemm, ") + describe_tiles(config);
}
std::string describe(const ProductShape&, const WgmmaConfig& config) {
  return "wgmma, " + describe_tiles(config.gemm) +
         (config.cluster > 1    ? " in clusters of " + number(config.cluster)
          : config.cluster == 1 ? " with whole tiles"
                                : " by stream-K") +
         (config.pairs ? ", in pairs" : "");
}
std::string describe(const ProductShape&, const PanelsConfig& config) {
  return "panels of " + number(config.cols) + " columns, " + number(config.rows) +
         " rows at once, for the application's product";
}

}  // namespace

std::string describe(const ProductShape& shape, const ProductConfig& config) {
  const std::string groups = shape.groups == 0 ? ""
                                               : ", rows in " + number(shape.groups) +
                                                     (shape.group_weights ? " groups" : " groups of adapters");
  return "[" + number(shape.rows) + ", " + number(shape.inner) + "] to [" + number(shape.rows) + ", " +
         number(shape.cols) + "] in " + name_of(shape.dtype) + ", " + number(shape.bits) + " bits" + groups + ", " +
         (shape.aligned ? "aligned" : "not aligned") + ", " + number(shape.num_sms) +
         " SMs: " + std::visit([&](const auto& kernel) { return describe(shape, kernel); }, config);
}

void log_product(const ProductShape& shape, const ProductConfig& config) {
  const char* const value = std::getenv("QLN_PRINT_CONFIG");
  if (value != nullptr && *value == '1') std::fprintf(stderr, "%s\n", describe(shape, config).c_str());
}

}  // namespace qlora_native
