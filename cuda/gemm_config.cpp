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

// The wide tile reads the left operand half as often from shared memory, and keeps the tensor cores busiest. It is not
// for few rows, nor where more than an eighth of its columns would be zeros that the other one has not.
bool wants_wide_tile(const GemmProblem& problem) {
  constexpr std::int64_t kPart = 8;
  const std::int64_t wide = ceil_div(problem.cols, kGemmWideCols) * kGemmWideCols;
  const std::int64_t other = ceil_div(problem.cols, kGemmCols) * kGemmCols;
  return problem.aligned_64 && problem.rows > kGemmMiddleRows && (wide - other) * kPart <= wide;
}

int copies_of_wide_tile(const GemmProblem& problem) {
  const bool has_rows =
      problem.smem_bytes >= kGemmMostCopiesSmem && problem.reserved_smem_bytes <= kGemmMostReservedSmem;
  return has_rows ? kGemmMostCopies : kGemmWideCopies;
}

// How many of its blocks a multiprocessor holds at once.
int blocks_of_multiprocessor(const GemmProblem& problem, const GemmConfig& config) {
  if (config.tile_rows == kGemmWideRows) return kGemmWideBlocks;
  const bool is_small = config.tile_rows == kGemmFewRows && config.aligned;
  return is_small || problem.smem_bytes >= kGemmBlocks * kGemmSmem ? kGemmBlocks : 1;
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
  config.kernel = GemmConfig::Kernel::tensor_cores;
  const bool wide = wants_wide_tile(problem);
  // As few rows as hold all of M, so that no tensor core multiplies zeros.
  config.tile_rows = problem.rows <= kGemmFewRows ? kGemmFewRows : wide ? kGemmWideRows : kGemmMiddleRows;
  config.tile_cols = wide ? kGemmWideCols : kGemmCols;
  config.copies = wide ? copies_of_wide_tile(problem) : kGemmCopies;
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
         number(config.tile_cols) + ", " + number(config.copies) + " tables, " + number(config.steps) +
         " steps each, " + number(config.blocks) + " blocks";
}

void print_if_asked(const GemmProblem& problem, const GemmConfig& config) {
  const char* asked = std::getenv("QLN_PRINT_CONFIG");
  if (asked != nullptr && *asked == '1') std::fprintf(stderr, "%s\n", text_of(problem, config).c_str());
}

}  // namespace qlora_native
