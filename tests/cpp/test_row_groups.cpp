// Guards products of rows in groups, whose offsets only the device knows: kernels find each tile of a group's rows
// exactly once, and stay within the operands for any offsets. To be run with QLN_BACKEND=cuda_emulated.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "backend.h"
#include "emulator.h"
#include "layer.h"
#include "product/config.h"
#include "product/groups.cuh"
#include "qlora_native/qlora_native.h"
#include "runtime/launch.h"

namespace qlora_native::cuda_emulated {
namespace {

template <int kRows>
void find_kernel(const Groups groups, std::int64_t rows, std::uint32_t count, FoundTile* found) {
  for (std::uint32_t i = 0; i < count; ++i) {
    const FoundTile tile = find_row_tile<kRows>(groups, rows, i);
    if (thread_index() == 0) found[i] = tile;
  }
  const FoundTile none = find_row_tile<kRows>(groups, rows, kNoTile);
  if (thread_index() == 0) found[count] = none;
}

// The results of find_row_tile() for as many tiles as there may be, and for kNoTile.
template <int kRows>
Managed<FoundTile> found_tiles(const Groups& groups, std::int64_t rows) {
  const std::int64_t count = max_row_tiles(rows, groups.total(), kRows);
  Managed<FoundTile> found(count + 1);
  launch<find_kernel<kRows>>({.blocks = 1, .threads = kWarp}, {}, groups, rows, static_cast<std::uint32_t>(count),
                             found.data());
  return found;
}

template <int kRows>
void expect_each_row_in_one_tile(const Groups& groups, std::int64_t rows) {
  const Managed<FoundTile> found = found_tiles<kRows>(groups, rows);
  std::int64_t next = groups.has_leading_group ? 0 : groups.offsets[0];  // the first row that is in no tile yet
  std::size_t tiles = 0;
  for (std::size_t i = 0; i + 1 < found.size(); ++i) {
    const RowTile& tile = found[i].tile;
    if (tile.is_empty()) continue;
    EXPECT(tiles++ == i);
    EXPECT(tile.begin == next);
    const std::int64_t first = tile.group * groups.stride, after = first + groups.stride;
    EXPECT(tile.begin >= (tile.group < 0 ? 0 : groups.offsets[first]));
    EXPECT(tile.end == groups.offsets[tile.group < 0 ? 0 : after]);
    next = std::min(tile.begin + kRows, tile.end);
  }
  EXPECT(next == rows);
  EXPECT(found.back().tile.is_empty() && found.back().count == tiles);
}

TEST(each_row_is_in_one_tile) {
  std::mt19937 random(1);
  for (const int count : {1, 2, 7, 31, 32, 33, 64, 150})
    for (const std::int64_t rows : {0, 1, 8, 9, 64, 200, 1000}) {
      Managed<std::int64_t> offsets(static_cast<std::size_t>(count) + 1);
      for (auto& offset : offsets) offset = static_cast<std::int64_t>(random() % (rows + 1));
      offsets.back() = rows;
      std::sort(offsets.begin(), offsets.end());
      for (const bool has_leading_group : {false, true})
        for (const int stride : {1, count}) {
          const Groups groups{.count = count / stride,
                              .stride = stride,
                              .offsets = offsets.data(),
                              .has_leading_group = has_leading_group};
          expect_each_row_in_one_tile<8>(groups, rows);
          expect_each_row_in_one_tile<64>(groups, rows);
        }
    }
}

constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min(), kMax = std::numeric_limits<std::int64_t>::max();
// Wrong offsets for 100 rows: outside of the rows, descending, or both.
const std::vector<std::vector<std::int64_t>> kAnyOffsets = {{0, 101, 100, 100, 100}, {-1, 50, 70, 80, 100},
                                                            {100, 80, 60, 40, 0},    {kMax, kMin, kMax, kMin, 100},
                                                            {kMin, kMax, 7, 7, 7},   {5, 5, 5, 5, 5}};
constexpr std::int64_t kRowsOfAny = 100;

TEST(tile_is_within_the_rows_whatever_the_offsets_say) {
  for (const auto& values : kAnyOffsets) {
    const Managed<std::int64_t> offsets(values.begin(), values.end());
    for (const bool has_leading_group : {false, true}) {
      const Groups groups{.count = static_cast<int>(values.size()) - 1,
                          .offsets = offsets.data(),
                          .has_leading_group = has_leading_group};
      for (const FoundTile& found : found_tiles<8>(groups, kRowsOfAny)) {
        if (found.tile.is_empty()) continue;
        EXPECT(found.tile.begin >= 0 && found.tile.end <= kRowsOfAny);
        EXPECT(found.tile.group >= -1 && found.tile.group < groups.count);
      }
    }
  }
}

// The host does not check the offsets, as on a GPU. The emulator ends the process if a kernel leaves its memory, or
// writes a tensor that the call only reads.
TEST(kernels_stay_within_the_operands_whatever_the_offsets_say) {
  const Backend& backend = backend_for({});
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const auto& offsets : kAnyOffsets)
      for (const std::int64_t rows : {kRowsOfAny, std::int64_t{16}})  // for the GEMM, and for that of small M
        for (const bool group_weights : {true, false}) {
          Layer layer({.M = rows,
                       .N = 72,
                       .K = 128,
                       .dtype = dtype,
                       .double_quant = false,
                       .rank = 8,
                       .dropout = 0.5f,
                       .offsets = offsets,
                       .group_weights = group_weights});
          backend.linear_forward(layer.forward_args(), {});
          backend.linear_backward_input(layer.backward_args(), {});
          backend.lora_gradients(layer.gradients_args(), {});
        }
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() { return run_tests(); }
