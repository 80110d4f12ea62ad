#include "gemm_config.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "common/layout.h"

namespace qlora_native {
namespace {

// Blocks that a multiprocessor holds of the kernel for few rows, whose table of the codebook takes 32 KB.
constexpr std::int64_t kGemvBlocksOfMultiprocessor = 2;
// A run of fewer steps is mostly the start of its pipeline and the exchange of its sums.
constexpr std::int64_t kLeastSteps = 4;

// Whether more than an eighth of a dimension in parts of `large` would be zeros that it has not in parts of `small`.
bool wastes(std::int64_t size, std::int64_t large, std::int64_t small) {
  constexpr std::int64_t kPart = 8;
  const std::int64_t in_large = ceil_div(size, large) * large, in_small = ceil_div(size, small) * small;
  return (in_large - in_small) * kPart > in_large;
}

// As few rows as hold all of M, so that no tensor core multiplies zeros. Of many rows as many as shared memory has room
// for: each weight is decoded once for all rows of a tile, and the tall one keeps the tensor cores busiest. The wide
// one is the next: its warps have as many columns as those of the tall one, so that they load the left operand as
// rarely.
void choose_tile(const GemmProblem& problem, GemmConfig& config) {
  const auto choose = [&](int rows, int cols) {
    config.tile_rows = rows;
    config.tile_cols = cols;
  };
  const auto fits = [&](int rows, int cols) { return problem.smem_bytes >= gemm_smem_bytes(rows, cols); };
  if (problem.rows <= kGemmFewRows) return choose(kGemmFewRows, kGemmCols);
  if (problem.rows <= kGemmMiddleRows || !problem.aligned || !fits(kGemmManyRows, kGemmCols)) {
    return choose(kGemmMiddleRows, kGemmCols);
  }
  if (fits(kGemmTallRows, kGemmCols) && !wastes(problem.rows, kGemmTallRows, kGemmManyRows)) {
    return choose(kGemmTallRows, kGemmCols);
  }
  const bool wide = problem.aligned_64 && fits(kGemmManyRows, kGemmWideCols);
  choose(kGemmManyRows, wide && !wastes(problem.cols, kGemmWideCols, kGemmCols) ? kGemmWideCols : kGemmCols);
}

// How many blocks of its tile a multiprocessor holds at once. It has 1 KB more than a block may have, and keeps 1 KB of
// each.
int blocks_of_multiprocessor(const GemmProblem& problem, const GemmConfig& config) {
  constexpr std::size_t kReserved = 1024;
  const std::size_t bytes = gemm_smem_bytes(config.tile_rows, config.tile_cols) + kReserved;
  const int most = gemm_blocks(config.tile_rows);
  return problem.smem_bytes + kReserved >= static_cast<std::size_t>(most) * bytes ? most : 1;
}

// `count` in parts of one size, a multiple of `unit`, none of them above `most`.
std::int64_t even_part(std::int64_t count, std::int64_t most, std::int64_t unit) {
  return ceil_div(ceil_div(count, ceil_div(count, most)), unit) * unit;
}

// By panels, unless the product of one is too small for the device: cuBLAS's tiles are 128 x 128, and where more than a
// quarter of the multiprocessors has none the dense product has no 73 % of its rate (kFusedRows) either.
std::optional<GemmConfig> by_panels(const GemmProblem& problem) {
  if (!problem.dense_gemm || problem.rows <= kFusedRows || problem.masks) return std::nullopt;
  GemmConfig config{.kernel = GemmConfig::Kernel::panel, .aligned = problem.aligned};
  config.panel_rows = problem.rank == 0 ? problem.rows : even_part(problem.rows, kPanelCopiedRows, kPanelCols);
  const std::int64_t column = column_of_panel(problem.inner, problem.rank);
  const std::int64_t column_bytes = column * static_cast<std::int64_t>(size_of(problem.dtype));
  for (const std::int64_t bytes : {kPanelBytes, kPanelMostBytes}) {
    const std::int64_t most = bytes / column_bytes / kPanelCols * kPanelCols;
    if (most == 0) continue;
    config.panel_cols = even_part(problem.cols, most, kPanelCols);
    const std::int64_t elements = std::min(config.panel_rows, problem.rows) * std::min(config.panel_cols, problem.cols);
    if (4 * elements >= 3 * problem.multiprocessors * kPanelCols * kPanelCols) return config;
  }
  return std::nullopt;
}

}  // namespace

GemmConfig gemm_config(const GemmProblem& problem) {
  GemmConfig config;
  config.aligned = problem.aligned;
  if (problem.rows <= kGemvRows && !problem.backward) {
    config.kernel = GemmConfig::Kernel::gemv;
    const std::int64_t most = kGemvBlocksOfMultiprocessor * problem.multiprocessors;
    config.blocks = problem.rows == 0 ? 0 : static_cast<int>(std::min(most, ceil_div(problem.cols, kGemvCols)));
    return config;
  }
  if (const std::optional<GemmConfig> panels = by_panels(problem)) return *panels;
  // fp32 has no tensor-core product that keeps its bits, and this one decodes pairs of 4 bits.
  if (problem.dtype == DType::f32 || problem.bits != 4) return config;
  if (problem.reserved_smem_bytes > kGemmMostReservedSmem) return config;  // of a device to come
  config.kernel = GemmConfig::Kernel::tensor_cores;
  choose_tile(problem, config);
  config.row_tiles = ceil_div(problem.rows, config.tile_rows);
  config.tiles = config.row_tiles * ceil_div(problem.cols, config.tile_cols);
  config.steps = static_cast<int>(ceil_div(problem.inner, kGemmStep));
  const std::int64_t all = config.tiles * config.steps;
  const std::int64_t most = std::int64_t{blocks_of_multiprocessor(problem, config)} * problem.multiprocessors;
  config.blocks = static_cast<int>(std::min(most, ceil_div(all, kLeastSteps)));
  if (config.blocks > 0) {
    config.share = all / config.blocks;
    config.rest = static_cast<int>(all % config.blocks);
  }
  return config;
}

LowRankSplit low_rank_split(std::int64_t tiles, std::int64_t inner, int multiprocessors) {
  constexpr std::int64_t kLeastLength = 256;           // a shorter sum is mostly the exchange of its result
  constexpr std::int64_t kBlocksOfMultiprocessor = 2;  // of 256 threads and 128 registers
  const std::int64_t blocks = kBlocksOfMultiprocessor * multiprocessors;
  const std::int64_t most = std::min(ceil_div(inner, kLeastLength), tiles == 0 ? 1 : blocks / tiles);
  const std::int64_t parts = std::max<std::int64_t>(most, 1);
  const std::int64_t length = ceil_div(ceil_div(inner, parts), kGemmStep) * kGemmStep;  // whole vectors, whole steps
  return {static_cast<int>(length == 0 ? 1 : ceil_div(inner, length)), length};
}

std::string text_of(const GemmProblem& problem, const GemmConfig& config) {
  const auto number = [](std::int64_t n) { return std::to_string(n); };
  std::string text = "[" + number(problem.rows) + ", " + number(problem.inner) + "] to [" + number(problem.rows) +
                     ", " + number(problem.cols) + "] in " + name_of(problem.dtype) + ", " + number(problem.bits) +
                     " bits, " + (problem.aligned ? "aligned" : "not aligned") + ", " +
                     number(problem.multiprocessors) + " multiprocessors: ";
  if (config.kernel == GemmConfig::Kernel::general)
    return text + (problem.dtype == DType::f32 ? "CUDA cores" : "tensor cores, of decoded elements");
  if (config.kernel == GemmConfig::Kernel::panel)
    return text + "panels of " + number(config.panel_cols) + " columns, " + number(config.panel_rows) +
           " rows at once, for the host program's product";
  if (config.kernel == GemmConfig::Kernel::gemv) return text + "GEMV, " + number(config.blocks) + " blocks";
  return text + "tensor cores, " + number(config.tiles) + " tiles of " + number(config.tile_rows) + "x" +
         number(config.tile_cols) + ", " + number(config.steps) + " steps each, " + number(config.blocks) + " blocks";
}

void print_if_asked(const GemmProblem& problem, const GemmConfig& config) {
  const char* asked = std::getenv("QLN_PRINT_CONFIG");
  if (asked != nullptr && *asked == '1') std::fprintf(stderr, "%s\n", text_of(problem, config).c_str());
}

}  // namespace qlora_native
