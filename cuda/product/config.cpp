#include "product/config.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <optional>
#include <string_view>

#include "common/layout.h"

namespace qlora_native {
namespace {

// How many blocks of the kernel for few rows an SM holds. Each has a table of the codebook of 32 KB.
constexpr std::int64_t kGemvBlocksPerSm = 2;

// Whether more than an eighth of a dimension that is cut into parts of `large` would be zeros which parts of `small` do
// not need.
bool wastes(std::int64_t size, std::int64_t large, std::int64_t small) {
  constexpr std::int64_t kPart = 8;
  const std::int64_t in_large = ceil_div(size, large) * large, in_small = ceil_div(size, small) * small;
  return (in_large - in_small) * kPart > in_large;
}

// How many rows each weight multiplies, on average.
std::int64_t rows_of_weight(const ProductShape& shape) {
  return shape.own_weights ? ceil_div(shape.rows, shape.groups) : shape.rows;
}

// Whether a weight has so few rows that reading it is all that matters. The limit for the average of groups is half of
// kGemvRows, so that few groups have more than that.
bool has_few_rows(const ProductShape& shape) {
  return rows_of_weight(shape) <= (shape.own_weights ? kGemvRows / 2 : kGemvRows);
}

// Whether a tile of many rows is to be the tall one. In a group, half of the last tile is zeros on average.
bool fills_tall_tiles(const ProductShape& shape) {
  constexpr std::int64_t kPart = 8;
  if (shape.own_weights) return rows_of_weight(shape) >= kPart * kGemmTallRows / 2;
  return !wastes(shape.rows, kGemmTallRows, kGemmManyRows);
}

// Up to how many rows the thin kernel is for. With groups it has no registers for more. It multiplies with one adapter
// after another, while the GEMM takes several in a step.
int most_thin_rows(const ProductShape& shape) {
  constexpr std::int64_t kFewAdapters = 4;
  if (shape.groups == 0) return kGemmMiddleRows;
  return shape.own_weights || shape.groups <= kFewAdapters ? kThinRows : 0;
}

// Few rows get the smallest tile that holds all of them, so that no tensor core multiplies zeros. Many rows get as tall
// a tile as shared memory has room for, because each weight is decoded once for all rows of a tile. The tall tile keeps
// the tensor cores busiest, and the wide one is next: warps of both have the same number of columns, so that they load
// the left operand equally rarely.
void choose_tile(const ProductShape& shape, GemmConfig& config) {
  const auto choose = [&](int rows, int cols) {
    config.tile_rows = rows;
    config.tile_cols = cols;
  };
  const auto fits = [&](int rows, int cols) { return shape.smem_bytes >= gemm_smem_bytes(rows, cols); };
  const std::int64_t rows = rows_of_weight(shape);
  if (rows <= most_thin_rows(shape) && shape.aligned_64 && !shape.backward) {
    config.thin = true;
    return choose(rows <= kGemmFewRows ? kGemmFewRows : rows <= kThinRows ? kThinRows : kGemmMiddleRows, kGemmCols);
  }
  if (rows <= kGemmFewRows) return choose(kGemmFewRows, kGemmCols);
  if (rows <= kGemmMiddleRows || !shape.aligned || !fits(kGemmManyRows, kGemmCols)) {
    return choose(kGemmMiddleRows, kGemmCols);
  }
  if (fits(kGemmTallRows, kGemmCols) && fills_tall_tiles(shape)) return choose(kGemmTallRows, kGemmCols);
  const bool wide = shape.aligned_64 && fits(kGemmManyRows, kGemmWideCols) && shape.groups == 0;
  choose(kGemmManyRows, wide && !wastes(shape.cols, kGemmWideCols, kGemmCols) ? kGemmWideCols : kGemmCols);
}

// How many blocks with this tile an SM holds at once. An SM has 1 KB more shared memory than a
// block may have, and keeps 1 KB of it for each block.
int blocks_per_sm(const ProductShape& shape, const GemmConfig& config) {
  constexpr std::size_t kReserved = 1024;
  const std::size_t bytes = kReserved + (config.thin ? thin_smem_bytes(config.tile_rows)
                                                     : gemm_smem_bytes(config.tile_rows, config.tile_cols));
  const int most = gemm_blocks(config.tile_rows);
  return shape.smem_bytes + kReserved >= static_cast<std::size_t>(most) * bytes ? most : 1;
}

// The size of a part if `count` is cut evenly: a multiple of `step`, and at most `most`.
std::int64_t even_part(std::int64_t count, std::int64_t most, std::int64_t step) {
  return ceil_div(ceil_div(count, ceil_div(count, most)), step) * step;
}

// The share of time in which an SM has a tile. There are `rows` by `cols` tiles of 128 x 128, and `part` of
// these columns are multiplied at a time.
double busy_share(std::int64_t rows, std::int64_t cols, std::int64_t part, int num_sms) {
  const auto waves = [&](std::int64_t tiles) { return ceil_div(tiles, num_sms); };
  const std::int64_t all = cols / part * waves(rows * part) + waves(rows * (cols % part));
  return static_cast<double>(rows * cols) / static_cast<double>(all * num_sms);
}

// Chooses panels, unless their products are too small for the device. cuBLAS's tiles are 128 x 128, one for each
// SM. Where more than a quarter of the SMs has none, the dense product does not reach 73 % of
// its rate (kFusedRows) either. Among the panels that memory allows, this takes the smallest whose products keep 95 %
// of the SMs busy, or else those that keep the most busy.
std::optional<PanelsConfig> by_panels(const ProductShape& shape) {
  if (!shape.dense_gemm || shape.rows <= kFusedRows || shape.masked || shape.groups > 0) return std::nullopt;
  PanelsConfig config;
  config.rows = shape.rank == 0 ? shape.rows : even_part(shape.rows, kPanelCopiedRows, kPanelCols);
  const std::int64_t column_elements = panel_column_elements(shape.inner, shape.rank);
  const std::int64_t tile_bytes = kPanelCols * column_elements * static_cast<std::int64_t>(size_of(shape.dtype));
  const std::int64_t col_tiles = ceil_div(shape.cols, kPanelCols);
  constexpr double kEnough = 0.95, kLeast = 0.75;
  double best = 0.0;
  for (std::int64_t tiles = std::max<std::int64_t>(kPanelBytes / tile_bytes, 1);
       tiles * tile_bytes <= kPanelMostBytes && best < kEnough; ++tiles) {
    const std::int64_t panel_tiles = even_part(col_tiles, tiles, 1);
    const double busy =
        busy_share(ceil_div(std::min(config.rows, shape.rows), kPanelCols), col_tiles, panel_tiles, shape.num_sms);
    if (busy > best) {
      best = busy;
      config.cols = panel_tiles * kPanelCols;
    }
    if (tiles >= col_tiles) break;
  }
  if (best >= kLeast) return config;
  return std::nullopt;
}

// Counts tiles and the steps of each, and shares out all steps among the blocks.
void share_steps(const ProductShape& shape, int step, GemmConfig& config) {
  config.steps = static_cast<int>(ceil_div(shape.inner, step));
  config.row_tiles = 1;
  config.tiles = ceil_div(shape.cols, config.tile_cols);
  config = config.with_row_tiles(most_row_tiles(shape.rows, shape.own_weights ? shape.groups : 1, config.tile_rows));
}

// The blocks of a cluster run in one of the device's graphics processing clusters. These have 16 or 18 SMs,
// so that clusters of 4 or 8 may leave 2 of 18 idle.
int clusters_at_once(int blocks_of_cluster, int num_sms) {
  constexpr int kTogether = 16;
  if (blocks_of_cluster <= 2) return num_sms / blocks_of_cluster;
  return num_sms / kTogether * (kTogether / blocks_of_cluster);
}

// How many tiles the device has at once, if `cluster` blocks share each.
std::int64_t tiles_at_once(int cluster, bool pairs, int num_sms) {
  const int tiles = pairs ? 2 : 1;
  return std::int64_t{clusters_at_once(cluster * tiles, num_sms)} * tiles;
}

// The tiles of wgmma, and how long a step of one takes at least, in 16 cycles of an H100. No GPU has confirmed it.
//
//   forward, backward   decoding, counted from the machine code for sm_90a: the largest of shared memory (128 bytes a
//                       cycle), issue (4 instructions of a warp a cycle), and ALU (64 results of integer and logic
//                       instructions a cycle: CUDA C++ Programming Guide, "Throughput of native arithmetic
//                       instructions")
//   alone, in_pair      what else may bound it, for a block alone and for one of a pair: the tensor cores (2048
//                       multiply-adds a cycle), or L2, which gives all multiprocessors 6.65 TB/s at 1.755 GHz (openxla/
//                       xla, gpu_dot_fusion_cost_model.cc), and is assumed to give each at most 64 bytes a cycle
constexpr struct HopperTileTimes {
  int rows;
  std::int64_t forward, backward, alone, in_pair;

  std::int64_t of_step(bool is_backward, bool pairs) const {
    return std::max(is_backward ? backward : forward, pairs ? in_pair : alone);
  }
} kHopperTiles[] = {{kGemmFewRows, 26, 23, 14, 11},
                    {kThinRows, 25, 26, 18, 13},
                    {kGemmMiddleRows, 27, 30, 27, 19},
                    {kGemmManyRows, 39, 40, 45, 38},
                    {kGemmTallRows, 71, 78, 81, 77}};

// HopperConfig::cluster, and how long the slowest block then takes, in 16 cycles.
struct HopperSharing {
  int cluster;
  std::int64_t time;
};

// Chooses what takes the slowest block the least time, on an H100. A load takes 291 cycles from L2 and 700 from DRAM
// (github.com/markdewing/AI_kernels, latency/README.md). From the shared memory of other blocks it takes 200, and all
// multiprocessors of an H800 PCIe, 114 at 1.755 GHz, load 3.3 TB/s so in clusters of 2, and 2.65 TB/s in clusters of 4
// (Luo et al., arXiv 2501.12084). For 8 the rate is assumed to fall once more as it does from 2 to 4, and stores to be
// as fast as loads.
//
//   steps              as many as the block has
//   results            8 cycles for each row, shared by the blocks of a cluster
//   sums of dX         each of two warpgroups gives half of its sums to the other through shared memory; in a tall tile
//                      each has half as many, and in a cluster they exchange none of these
//   exchange of sums   in a cluster, 25 for a barrier and a latency, and for each 16 rows the time of storing the sums
//                      into the shared memory of other blocks. To add them takes 4 for each 16 rows. Only those of the
//                      last turn are added and stored when no others are on their way. Between runs, 6 steps, and 3 for
//                      two more runs: a launch clears the flags, the sums go to L2, and the block that has the tile's
//                      beginning adds those of one run after another
//   pairs              a barrier of the cluster before the first step
HopperSharing hopper_sharing(const GemmConfig& runs, std::int64_t of_step, bool backward, bool pairs, int num_sms) {
  constexpr std::int64_t kStepsOfRuns = 6, kStepsOfTwoMoreRuns = 3;
  constexpr std::int64_t kOfExchange = 25, kOfBarrier = 13;
  constexpr struct {
    int blocks;
    std::int64_t of_16_rows;
  } kClusters[] = {{2, 16}, {4, 29}, {8, 42}};
  const std::int64_t rows = runs.tile_rows, results = rows / 2, of_pairs = pairs ? kOfBarrier : 0;
  const bool shares_steps = hopper_shares_steps(runs.tile_rows);
  const std::int64_t of_warpgroups = !backward ? 0 : shares_steps ? rows / 2 : rows / 4;
  const std::int64_t waves = ceil_div(runs.tiles, tiles_at_once(1, pairs, num_sms));
  HopperSharing best = {1, waves * (runs.steps * of_step + results + of_warpgroups) + of_pairs};
  const auto consider = [&](int cluster, std::int64_t time) {
    if (time < best.time) best = {cluster, time};
  };
  if (!pairs) {
    const std::int64_t others = runs.splits_a_tile() ? ceil_div(std::int64_t{runs.steps}, runs.share) : 0;
    const std::int64_t of_exchange = others == 0 ? 0 : kStepsOfRuns + kStepsOfTwoMoreRuns * others / 2;
    const std::int64_t tiles = ceil_div(runs.tiles, std::int64_t{num_sms});
    consider(0, (runs.share + (runs.rest > 0) + of_exchange) * of_step + tiles * (results + of_warpgroups));
  }
  for (const auto& [blocks, of_16_rows] : kClusters) {
    // Each block must have a step.
    if (blocks * (pairs ? 2 : 1) > kHopperMostCluster || blocks > runs.steps) break;
    if (runs.tiles > tiles_at_once(blocks, pairs, num_sms)) break;
    const std::int64_t of_turn = (rows / 4 + results / blocks) / hopper_turns(runs.tile_rows, blocks);
    consider(blocks, ceil_div(std::int64_t{runs.steps}, std::int64_t{blocks}) * of_step +
                         (shares_steps ? of_warpgroups : 0) + kOfExchange + rows / 16 * of_16_rows + of_turn +
                         of_pairs);
  }
  return best;
}

// Chooses wgmma, and of its tiles those that take the slowest block the least time: tall tiles decode each weight for
// more rows, smaller ones occupy more SMs, and pairs of blocks load rows once for two tiles.
std::optional<HopperConfig> by_wgmma(const ProductShape& shape) {
  constexpr std::int64_t kMostCoordinate = 0x7FFFFFFF;  // TMA's coordinates have 32 bits, with a sign
  if (shape.hopper == HopperUse::none || shape.groups > 0) return std::nullopt;
  if (shape.dtype == DType::f32 || shape.bits != 4 || !shape.aligned_64 || !shape.tma_can_load) return std::nullopt;
  if (std::max({shape.rows, shape.cols, shape.inner}) > kMostCoordinate - kGemmTallRows) return std::nullopt;
  if (shape.reserved_smem_bytes > kGemmMostReservedSmem) return std::nullopt;
  if (shape.smem_bytes < hopper_smem_bytes(kGemmTallRows)) return std::nullopt;
  const auto allows = [&](bool pairs) {
    return shape.num_sms == 1 ? !pairs : shape.hopper_pairs.value_or(pairs) == pairs;
  };
  HopperConfig best;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (const auto& tile : kHopperTiles) {
    if (shape.hopper_rows != 0 && tile.rows != shape.hopper_rows) continue;
    for (const bool pairs : {false, true}) {
      if (!allows(pairs)) continue;
      HopperConfig config{
          .gemm = {.aligned = true, .tile_rows = tile.rows, .tile_cols = kGemmCols, .blocks = shape.num_sms},
          .pairs = pairs};
      share_steps(shape, kGemmStep, config.gemm);
      if (pairs) config.gemm.tiles += ceil_div(shape.cols, std::int64_t{kGemmCols}) % 2 * config.gemm.row_tiles;
      const auto [cluster, time] =
          hopper_sharing(config.gemm, tile.of_step(shape.backward, pairs), shape.backward, pairs, shape.num_sms);
      if (time >= least) continue;
      least = time;
      config.cluster = cluster;
      best = config;
    }
  }
  if (best.cluster == 0) return best;
  const std::int64_t at_once = tiles_at_once(best.cluster, best.pairs, shape.num_sms);
  best.gemm.blocks = static_cast<int>(std::min(best.gemm.tiles, at_once) * best.cluster);
  best.gemm.share = best.gemm.rest = 0;
  return best;
}

// Whether wgmma is faster than panels, where both can compute a product: by the times above, for an H100 and an H200,
// over 18 weights of 1024 ... 28672 rows and columns. A launch takes 1 us, and the dense product has the 790 TFLOP/s
// that were measured of cuBLAS. No GPU has confirmed it.
//
// Up to kRows rows it is faster, in the median by 5 ... 9% without an adapter and by 11 ... 17% with one: the first
// panel is decoded while nothing is multiplied, and panels leave more of the device idle. It is not where the inner
// dimension is so short that the ends of tiles take as much.
//
// Beyond kRows rows the two are within 5% of each other, mostly, but for the adapter. Panels then copy [X | U]: 4 bytes
// of 3.35 TB/s an element, for which the dense product computes 2 * cols of 790 TFLOP/s. So the copy takes 472 / cols
// of its time. wgmma spends the adapter's step, its waits for B and the store of the result once a tile: 3.1 steps of
// the tile's inner / 64, which are 201 / inner of its time. The copy takes more if cols <= 2.3 * inner.
bool beats_panels(const ProductShape& shape) {
  constexpr std::int64_t kRows = 2048, kLong = 3072, kLongWithAdapter = 2048;
  if (shape.rows <= kRows) return shape.inner >= (shape.rank > 0 ? kLongWithAdapter : kLong);
  return shape.rank > 0 && shape.cols <= 2 * shape.inner;
}

}  // namespace

ProductConfig product_config(const ProductShape& shape) {
  const std::optional<HopperConfig> hopper = by_wgmma(shape);
  if (hopper && shape.hopper == HopperUse::wherever_it_can) return *hopper;
  const bool grouped = shape.groups > 0;
  const bool is_compiled = !grouped || shape.aligned;  // groups have kernels for vectors, and the general one
  if (has_few_rows(shape) && !shape.backward && !shape.small_blocks && is_compiled) {
    const std::int64_t most = kGemvBlocksPerSm * shape.num_sms;
    const std::int64_t row_tiles = most_row_tiles(shape.rows, shape.own_weights ? shape.groups : 1, kGemvRows);
    const std::int64_t blocks = std::min(most, row_tiles * ceil_div(shape.cols, kGemvCols));
    return GemvConfig{.aligned = shape.aligned, .blocks = static_cast<int>(blocks)};
  }
  const std::optional<PanelsConfig> panels = by_panels(shape);
  if (panels && !(hopper && beats_panels(shape))) return *panels;
  if (hopper) return *hopper;
  // fp32 has no tensor-core product that keeps its bits, and the kernels of gemm/ decode pairs of 4-bit codes.
  if (shape.dtype == DType::f32 || shape.bits != 4 || shape.small_blocks || !is_compiled) return GeneralConfig{};
  if (shape.reserved_smem_bytes > kGemmMostReservedSmem) return GeneralConfig{};  // no device so far keeps as much
  GemmConfig config{.aligned = shape.aligned, .grouped = grouped};
  choose_tile(shape, config);
  config.blocks = blocks_per_sm(shape, config) * shape.num_sms;
  share_steps(shape, config.thin ? kThinStep : kGemmStep, config);
  return config;
}

HopperUse asked_hopper_use(bool is_hopper) {
  if (!is_hopper) return HopperUse::none;
  const char* asked = std::getenv("QLN_FORCE_HOPPER");
  if (asked == nullptr) return HopperUse::where_it_wins;
  return *asked == '0' ? HopperUse::none : HopperUse::wherever_it_can;
}

int asked_hopper_rows() {
  const char* asked = std::getenv("QLN_FORCE_HOPPER");
  const int rows = asked == nullptr ? 0 : std::atoi(asked);
  const bool is_tile = std::any_of(std::begin(kHopperTiles), std::end(kHopperTiles),
                                   [&](const auto& tile) { return tile.rows == rows; });
  return is_tile ? rows : 0;
}

std::optional<bool> asked_hopper_pairs() {
  const char* asked = std::getenv("QLN_FORCE_HOPPER");
  const std::string_view text = asked == nullptr ? "" : asked;
  if (text.ends_with(",pairs")) return true;
  if (text.ends_with(",alone")) return false;
  return std::nullopt;
}

LowRankSplit low_rank_split(std::int64_t tiles, std::int64_t inner, int num_sms) {
  constexpr std::int64_t kLeastLength = 256;  // a shorter sum is mostly the exchange of its result
  constexpr std::int64_t kBlocksPerSm = 2;    // a block has 256 threads with 128 registers
  const std::int64_t blocks = kBlocksPerSm * num_sms;
  const std::int64_t most = std::min(ceil_div(inner, kLeastLength), tiles == 0 ? 1 : blocks / tiles);
  const std::int64_t parts = std::max<std::int64_t>(most, 1);
  const std::int64_t length = low_rank_length(inner, parts);
  return {static_cast<int>(length == 0 ? 1 : ceil_div(inner, length)), length};
}

namespace {

std::string number(std::int64_t n) { return std::to_string(n); }

std::string name_of_way(const ProductShape& shape, const GeneralConfig&) {
  return shape.dtype == DType::f32 ? "CUDA cores" : "tensor cores, of decoded elements";
}
std::string name_of_way(const ProductShape&, const GemvConfig& config) {
  return "GEMV, " + number(config.blocks) + " blocks";
}
std::string text_of_tiles(const GemmConfig& config) {
  return number(config.tiles) + " tiles of " + number(config.tile_rows) + "x" + number(config.tile_cols) + ", " +
         number(config.steps) + " steps each, " + number(config.blocks) + " blocks";
}
std::string name_of_way(const ProductShape&, const GemmConfig& config) {
  return (config.thin ? "tensor cores, thin, " : "tensor cores, ") + text_of_tiles(config);
}
std::string name_of_way(const ProductShape&, const HopperConfig& config) {
  return "tensor cores by wgmma, " + text_of_tiles(config.gemm) +
         (config.cluster > 1    ? " in clusters of " + number(config.cluster)
          : config.cluster == 1 ? " with whole tiles"
                                : " in runs") +
         (config.pairs ? ", in pairs" : "");
}
std::string name_of_way(const ProductShape&, const PanelsConfig& config) {
  return "panels of " + number(config.cols) + " columns, " + number(config.rows) +
         " rows at once, for the host program's product";
}

}  // namespace

std::string text_of(const ProductShape& shape, const ProductConfig& config) {
  const std::string groups =
      shape.groups == 0 ? ""
                        : ", rows in " + number(shape.groups) + (shape.own_weights ? " groups" : " groups of adapters");
  return "[" + number(shape.rows) + ", " + number(shape.inner) + "] to [" + number(shape.rows) + ", " +
         number(shape.cols) + "] in " + name_of(shape.dtype) + ", " + number(shape.bits) + " bits" + groups + ", " +
         (shape.aligned ? "aligned" : "not aligned") + ", " + number(shape.num_sms) +
         " SMs: " + std::visit([&](const auto& way) { return name_of_way(shape, way); }, config);
}

void print_if_asked(const ProductShape& shape, const ProductConfig& config) {
  const char* asked = std::getenv("QLN_PRINT_CONFIG");
  if (asked != nullptr && *asked == '1') std::fprintf(stderr, "%s\n", text_of(shape, config).c_str());
}

}  // namespace qlora_native
