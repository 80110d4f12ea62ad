#include "gemm_config.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "common/layout.h"

namespace qlora_native {
namespace {

// Blocks of 256 threads that a multiprocessor holds at once: the kernel is compiled for 128 registers a thread.
constexpr std::int64_t kBlocksOfMultiprocessor = 2;
// The same of the kernel for few rows, whose table of the codebook takes 32 KB.
constexpr std::int64_t kGemvBlocksOfMultiprocessor = 2;
// A run of fewer steps is mostly the start of its pipeline and the exchange of its sums.
constexpr std::int64_t kLeastSteps = 4;

// As few rows as hold all of M, so that no tensor core multiplies zeros, up to the most that registers have room for:
// of 128 rows backward, sm_80 puts some into memory.
int tile_rows_for(const GemmProblem& problem) {
  if (problem.rows <= 16) return 16;
  return problem.rows <= 64 || problem.backward || !problem.aligned ? 64 : 128;
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
  // fp32 has no tensor-core product that keeps its bits.
  if (problem.dtype == DType::f32 || problem.bits != 4) return config;
  config.kernel = GemmConfig::Kernel::tensor_cores;
  config.tile_rows = tile_rows_for(problem);
  config.row_tiles = ceil_div(problem.rows, config.tile_rows);
  config.tiles = config.row_tiles * ceil_div(problem.cols, kGemmTileCols);
  config.steps = static_cast<int>(ceil_div(problem.inner, kGemmStep));
  const std::int64_t all = config.tiles * config.steps;
  config.blocks =
      static_cast<int>(std::min(kBlocksOfMultiprocessor * problem.multiprocessors, ceil_div(all, kLeastSteps)));
  if (config.blocks > 0) {
    config.share = all / config.blocks;
    config.rest = static_cast<int>(all % config.blocks);
  }
  return config;
}

LowRankSplit low_rank_split(std::int64_t tiles, std::int64_t inner, int multiprocessors) {
  constexpr std::int64_t kLeastLength = 256;  // a shorter sum is mostly the exchange of its result
  const std::int64_t blocks = kBlocksOfMultiprocessor * multiprocessors;
  const std::int64_t most = std::min(ceil_div(inner, kLeastLength), tiles == 0 ? 1 : blocks / tiles);
  const std::int64_t parts = std::max<std::int64_t>(most, 1), length = ceil_div(inner, parts);
  return {static_cast<int>(length == 0 ? 1 : ceil_div(inner, length)), length};
}

std::string text_of(const GemmProblem& problem, const GemmConfig& config) {
  const auto number = [](std::int64_t n) { return std::to_string(n); };
  std::string text = "[" + number(problem.rows) + ", " + number(problem.inner) + "] to [" + number(problem.rows) +
                     ", " + number(problem.cols) + "] in " + name_of(problem.dtype) + ", " + number(problem.bits) +
                     " bits, " + (problem.aligned ? "aligned" : "not aligned") + ", " +
                     number(problem.multiprocessors) + " multiprocessors: ";
  if (config.kernel == GemmConfig::Kernel::cuda_cores) return text + "CUDA cores";
  if (config.kernel == GemmConfig::Kernel::gemv) return text + "GEMV, " + number(config.blocks) + " blocks";
  return text + "tensor cores, " + number(config.tiles) + " tiles of " + number(config.tile_rows) + "x" +
         number(kGemmTileCols) + ", " + number(config.steps) + " steps each, " + number(config.blocks) + " blocks";
}

void print_if_asked(const GemmProblem& problem, const GemmConfig& config) {
  const char* asked = std::getenv("QLN_PRINT_CONFIG");
  if (asked != nullptr && *asked == '1') std::fprintf(stderr, "%s\n", text_of(problem, config).c_str());
}

}  // namespace qlora_native
