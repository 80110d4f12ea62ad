// gemm_config: that the blocks share the steps of all tiles, each of them once, for any problem and device.
#include "gemm_config.h"

#include <algorithm>

#include "expect.h"

namespace qlora_native {
namespace {

constexpr std::int64_t kRows[] = {0, 1, 8, 9, 16, 17, 64, 65, 128, 129, 256, 257, 384, 4096, 100000};
constexpr std::int64_t kSizes[] = {1, 63, 64, 65, 128, 129, 256, 300, 4096, 14336};
constexpr std::size_t kLeastSmem = 99 * 1024, kAmpereSmem = 163 * 1024, kHopperSmem = 227 * 1024;
constexpr int kMultiprocessors[] = {1, 3, 108, 132};

template <class F>
void for_each_problem(const F& f) {
  for (const std::int64_t rows : kRows) {
    for (const std::int64_t cols : kSizes) {
      for (const std::int64_t inner : kSizes) {
        for (const int multiprocessors : kMultiprocessors) {
          for (const int flags : {0, 1, 2, 3, 5, 7, 13, 15, 21, 23}) {
            f(GemmProblem{.rows = rows,
                          .cols = cols,
                          .inner = inner,
                          .dtype = DType::bf16,
                          .backward = flags / 2 % 2 == 1,
                          .aligned = flags % 2 == 1,
                          .aligned_64 = flags / 4 % 2 == 1,
                          .multiprocessors = multiprocessors,
                          .smem_bytes = flags >= 16  ? kAmpereSmem
                                        : flags >= 8 ? kHopperSmem
                                                     : kLeastSmem});
          }
        }
      }
    }
  }
}

bool is_for_few_rows(const GemmProblem& problem) { return problem.rows <= kGemvRows && !problem.backward; }

void a_step_is_left_out_or_done_twice() {
  for_each_problem([](const GemmProblem& problem) {
    const GemmConfig config = gemm_config(problem);
    if (is_for_few_rows(problem)) return;
    EXPECT(config.kernel == GemmConfig::Kernel::tensor_cores);
    EXPECT((config.blocks == 0) == (problem.rows == 0));
    if (config.blocks == 0) return;
    EXPECT(config.begin_of(0) == 0 && config.begin_of(config.blocks) == config.tiles * config.steps);
    bool splits = false;
    for (int i = 0; i < config.blocks; ++i) {
      EXPECT(config.begin_of(i) < config.begin_of(i + 1));
      splits |= config.begin_of(i + 1) % config.steps != 0;
    }
    EXPECT(splits == config.splits_a_tile());
  });
}

void tiles_do_not_cover_the_result() {
  for_each_problem([](const GemmProblem& problem) {
    if (is_for_few_rows(problem)) return;
    const GemmConfig config = gemm_config(problem);
    const std::int64_t col_tiles = config.row_tiles == 0 ? 0 : config.tiles / config.row_tiles;
    EXPECT(config.row_tiles * config.tile_rows >= problem.rows);
    EXPECT(problem.rows == 0 || col_tiles * config.tile_cols >= problem.cols);
    EXPECT(std::int64_t{config.steps} * kGemmStep >= problem.inner);
  });
}

void tile_is_not_one_that_was_compiled_or_does_not_fit() {
  for_each_problem([](const GemmProblem& problem) {
    if (is_for_few_rows(problem)) return;
    const GemmConfig config = gemm_config(problem);
    const int rows = config.tile_rows, cols = config.tile_cols;
    if (cols == kGemmWideCols) {
      EXPECT(rows == kGemmManyRows && problem.aligned_64);
    } else {
      EXPECT(cols == kGemmCols);
      EXPECT(rows == kGemmFewRows || rows == kGemmMiddleRows ||
             (problem.aligned && (rows == kGemmManyRows || rows == kGemmTallRows)));
    }
    EXPECT((rows == kGemmFewRows) == (problem.rows <= kGemmFewRows));
    EXPECT(rows <= kGemmMiddleRows || problem.rows > kGemmMiddleRows);
    EXPECT(gemm_smem_bytes(rows, cols) <= problem.smem_bytes);
  });
}

void more_blocks_wait_for_each_other_than_a_device_holds() {
  for_each_problem([](const GemmProblem& problem) {
    if (is_for_few_rows(problem)) return;
    const GemmConfig config = gemm_config(problem);
    const int of_multiprocessor = config.tile_rows <= kGemmMiddleRows && problem.smem_bytes == kHopperSmem ? 2 : 1;
    EXPECT(config.blocks <= of_multiprocessor * problem.multiprocessors);
  });
}

struct Tile {
  int rows, cols;
  bool operator==(const Tile&) const = default;
};
constexpr Tile kMiddle = {kGemmMiddleRows, kGemmCols}, kMany = {kGemmManyRows, kGemmCols};
constexpr Tile kWide = {kGemmManyRows, kGemmWideCols}, kTall = {kGemmTallRows, kGemmCols};

// As many rows as there is memory for, and no more than an eighth of them zeros that another tile has not.
void tile_for_many_rows_is_another() {
  GemmProblem problem = {
      .cols = 4096, .inner = 4096, .dtype = DType::bf16, .aligned = true, .aligned_64 = true, .multiprocessors = 132};
  const auto tile_of = [&](std::int64_t rows, std::size_t smem_bytes) {
    problem.rows = rows;
    problem.smem_bytes = smem_bytes;
    const GemmConfig config = gemm_config(problem);
    return Tile{config.tile_rows, config.tile_cols};
  };
  for (const bool backward : {false, true}) {
    problem.backward = backward;
    for (const std::int64_t rows : {129, 255, 256, 385, 512, 641, 768, 4096}) {
      EXPECT(tile_of(rows, kHopperSmem) == kTall && tile_of(rows, kAmpereSmem) == kTall);
      EXPECT(tile_of(rows, kLeastSmem) == kMiddle);
    }
    for (const std::int64_t rows : {65, 128, 257, 384, 513, 640}) {
      EXPECT(tile_of(rows, kHopperSmem) == kWide && tile_of(rows, kAmpereSmem) == kMany);
      EXPECT(tile_of(rows, kLeastSmem) == kMiddle);
    }
    EXPECT(tile_of(64, kHopperSmem) == kMiddle);
  }
  for (const std::int64_t cols : {128, 300, 384}) {  // the wide one's would be mostly zeros
    problem.cols = cols;
    EXPECT(tile_of(128, kHopperSmem) == kMany && tile_of(129, kHopperSmem) == kTall);
  }
  for (const std::int64_t cols : {129, 256, 512, 960, 1100, 14336}) {
    problem.cols = cols;
    EXPECT(tile_of(128, kHopperSmem) == kWide);
  }
  problem.aligned_64 = false;  // a block of the quantization may end within a step
  EXPECT(tile_of(128, kHopperSmem) == kMany && tile_of(129, kHopperSmem) == kTall);
  problem.aligned = false;
  EXPECT(tile_of(128, kHopperSmem) == kMiddle && tile_of(129, kHopperSmem) == kMiddle);
}

void table_has_no_place_where_it_must_begin() {
  GemmProblem problem = {.rows = 300, .cols = 4096, .inner = 4096, .dtype = DType::bf16, .smem_bytes = kHopperSmem};
  for (const std::size_t reserved : {0, 1024}) {
    problem.reserved_smem_bytes = reserved;
    EXPECT(gemm_config(problem).kernel == GemmConfig::Kernel::tensor_cores);
  }
  problem.reserved_smem_bytes = 1025;  // a device to come
  EXPECT(gemm_config(problem).kernel == GemmConfig::Kernel::general);
}

// Its blocks loop over the columns: how many there are is a matter of speed, unless there is none.
void few_rows_do_not_get_their_kernel() {
  for_each_problem([](GemmProblem problem) {
    if (!is_for_few_rows(problem)) return;
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const int bits : {4, 8}) {
        problem.dtype = dtype;
        problem.bits = bits;
        const GemmConfig config = gemm_config(problem);
        EXPECT(config.kernel == GemmConfig::Kernel::gemv && config.aligned == problem.aligned);
        EXPECT((config.blocks == 0) == (problem.rows == 0));
        EXPECT(config.blocks * kGemvCols < problem.cols + kGemvCols);
      }
    }
  });
}

void product_without_a_gemm_kernel_is_given_to_one() {
  const GemmProblem problem = {.rows = 64, .cols = 64, .inner = 64, .aligned = true};
  GemmProblem eight_bits = problem;
  eight_bits.dtype = DType::f16;
  EXPECT(gemm_config(eight_bits).kernel == GemmConfig::Kernel::tensor_cores);
  eight_bits.bits = 8;
  EXPECT(gemm_config(problem).kernel == GemmConfig::Kernel::general);
  EXPECT(gemm_config(eight_bits).kernel == GemmConfig::Kernel::general);
}

GemmProblem many_rows(std::int64_t rows, std::int64_t cols, std::int64_t inner) {
  return {.rows = rows,
          .cols = cols,
          .inner = inner,
          .dtype = DType::bf16,
          .aligned = true,
          .aligned_64 = true,
          .dense_gemm = true,
          .multiprocessors = 132};
}

bool is_by_panels(const GemmProblem& problem) { return gemm_config(problem).kernel == GemmConfig::Kernel::panel; }

void panels_are_missed_or_taken_where_they_cannot_be() {
  EXPECT(is_by_panels(many_rows(2048, 4096, 4096)));
  EXPECT(is_by_panels(many_rows(769, 14336, 1024)) && !is_by_panels(many_rows(768, 14336, 1024)));
  for (const int bits : {4, 8}) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const bool backward : {false, true}) {
        for (const std::int64_t rank : {0, 16}) {
          GemmProblem problem = many_rows(4096, 4000, 1111);
          problem.bits = bits;
          problem.dtype = dtype;
          problem.backward = backward;
          problem.rank = rank;
          problem.aligned = problem.aligned_64 = false;
          EXPECT(is_by_panels(problem));
          problem.masks = true;
          EXPECT(!is_by_panels(problem));
          problem.masks = false;
          problem.dense_gemm = false;
          EXPECT(!is_by_panels(problem));
        }
      }
    }
  }
}

// As kPanelBytes says; the last two need more columns than 8 MB of so long ones have, and than 16 MB have.
void panel_takes_more_memory_than_it_may_or_is_too_small() {
  EXPECT(gemm_config(many_rows(4096, 4096, 4096)).panel_cols == 1024);
  EXPECT(gemm_config(many_rows(1024, 4096, 4096)).panel_cols == 2048);
  EXPECT(gemm_config(many_rows(8192, 4096, 14336)).panel_cols == 256);
  EXPECT(gemm_config(many_rows(4096, 4096, 14336)).panel_cols == 512);
  EXPECT(!is_by_panels(many_rows(2048, 4096, 14336)));
  EXPECT(!is_by_panels(many_rows(100'000, 4096, 70'000)));  // not even 128
  for (const std::int64_t rows : {769, 8192, 8193, 100'000}) {
    for (const std::int64_t cols : {1, 127, 128, 129, 4096, 128'256}) {
      for (const std::int64_t inner : {1, 100, 4096, 28672, 65536}) {
        for (const std::int64_t rank : {0, 1, 64}) {
          for (const DType dtype : {DType::f32, DType::bf16}) {
            for (const int multiprocessors : {1, 132}) {
              GemmProblem problem = many_rows(rows, cols, inner);
              problem.dtype = dtype;
              problem.rank = rank;
              problem.multiprocessors = multiprocessors;
              if (!is_by_panels(problem)) continue;
              const GemmConfig config = gemm_config(problem);
              const std::int64_t column = column_of_panel(inner, rank);
              EXPECT(column >= inner + rank && column < inner + rank + kPanelAlignment);
              EXPECT(config.panel_cols > 0 && config.panel_cols % kPanelCols == 0);
              EXPECT(config.panel_cols * column * static_cast<std::int64_t>(size_of(dtype)) <= kPanelMostBytes);
              EXPECT(rank == 0 ? config.panel_rows == rows
                               : config.panel_rows <= kPanelCopiedRows && config.panel_rows > rows / 16);
              const std::int64_t tile = kPanelCols * kPanelCols;
              EXPECT(std::min(rows, config.panel_rows) * std::min(cols, config.panel_cols) * 4 >=
                     multiprocessors * tile * 3);
            }
          }
        }
      }
    }
  }
}

void part_of_a_long_sum_is_left_out_or_empty() {
  for (const std::int64_t tiles : {0, 1, 5, 64, 100000}) {
    for (const std::int64_t inner : {0, 1, 255, 256, 257, 4096, 14336, 1000003}) {
      for (const int multiprocessors : kMultiprocessors) {
        const LowRankSplit split = low_rank_split(tiles, inner, multiprocessors);
        EXPECT(split.parts >= 1 && split.parts * split.length >= inner);
        EXPECT(split.parts == 1 || (split.parts - 1) * split.length < inner);
        EXPECT(split.parts == 1 || split.parts * tiles <= 2 * multiprocessors);
      }
    }
  }
}

void more_elements_than_an_int_counts() {
  const std::int64_t many = std::int64_t{1} << 34;
  const GemmConfig config =
      gemm_config({.rows = 9, .cols = 4, .inner = many, .dtype = DType::f16, .aligned = true, .multiprocessors = 100});
  EXPECT(config.steps == many / kGemmStep && config.begin_of(config.blocks) == many / kGemmStep);
}

}  // namespace
}  // namespace qlora_native

int main() {
  using namespace qlora_native;
  a_step_is_left_out_or_done_twice();
  tiles_do_not_cover_the_result();
  tile_is_not_one_that_was_compiled_or_does_not_fit();
  more_blocks_wait_for_each_other_than_a_device_holds();
  tile_for_many_rows_is_another();
  table_has_no_place_where_it_must_begin();
  few_rows_do_not_get_their_kernel();
  product_without_a_gemm_kernel_is_given_to_one();
  panels_are_missed_or_taken_where_they_cannot_be();
  panel_takes_more_memory_than_it_may_or_is_too_small();
  part_of_a_long_sum_is_left_out_or_empty();
  more_elements_than_an_int_counts();
  return report();
}
