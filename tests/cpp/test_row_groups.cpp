// Guards products of rows in groups, whose offsets only the device knows: kernels find each tile of a group's rows
// exactly once, and stay within the operands for any offsets. To be run with QLN_BACKEND=cuda_emulated; exits 1 on a
// failure.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "backend.h"
#include "common/codebook.h"
#include "expect.h"
#include "product/config.h"
#include "product/groups.cuh"
#include "qlora_native/qlora_native.h"
#include "runtime/launch.h"

namespace qlora_native::cuda_emulated {
namespace {

// Memory that the test and its kernels share.
template <class T>
using Managed = std::vector<T, emulator::ManagedAllocator<T>>;

struct Random {
  std::uint64_t state = 1;
  std::int64_t below(std::int64_t end) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::int64_t>((state >> 33) % static_cast<std::uint64_t>(end));
  }
};

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
  const std::int64_t most = max_row_tiles(rows, groups.total(), kRows);
  Managed<FoundTile> found(static_cast<std::size_t>(most) + 1);
  launch<find_kernel<kRows>>({.blocks = 1, .threads = kWarp}, {}, groups, rows, static_cast<std::uint32_t>(most),
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
  Random random;
  for (const int count : {1, 2, 7, 31, 32, 33, 64, 150}) {
    for (const std::int64_t rows : {0, 1, 8, 9, 64, 200, 1000}) {
      Managed<std::int64_t> offsets(static_cast<std::size_t>(count) + 1);
      for (auto& offset : offsets) offset = random.below(rows + 1);
      offsets.back() = rows;
      std::sort(offsets.begin(), offsets.end());
      for (const bool has_leading_group : {false, true}) {
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
  }
}

constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min(),
                       kMost = std::numeric_limits<std::int64_t>::max();
// Wrong offsets for 100 rows: outside of the rows, descending, or both.
const std::vector<std::vector<std::int64_t>> kAnyOffsets = {
    {0, 101, 100, 100, 100},  {-1, 50, 70, 80, 100}, {100, 80, 60, 40, 0}, {kMost, kLeast, kMost, kLeast, 100},
    {kLeast, kMost, 7, 7, 7}, {5, 5, 5, 5, 5}};
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
TEST(kernels_keep_to_the_operands_whatever_the_offsets_say) {
  constexpr std::int64_t M = kRowsOfAny, N = 72, K = 128, kRank = 8, kGroups = 4;
  std::vector<std::uint8_t> codes(kGroups * N * K / 2, 0x77);
  const std::vector<float> absmax(kGroups * N * K / 64, 1.0f);
  const std::vector<float> a(kGroups * kRank * K, 1.0f), b(kGroups * N * kRank, 1.0f);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const auto matrix = [&](std::vector<float>& memory, std::int64_t cols) {
      memory.assign(static_cast<std::size_t>(M * cols), 0.0f);  // for bf16 this is more than enough
      return Matrix{memory.data(), dtype, M, cols, cols};
    };
    std::vector<float> memory[6];
    std::vector<float> da(a.size()), db(b.size());
    const Matrix x = matrix(memory[0], K), dy = matrix(memory[1], N), y = matrix(memory[2], N),
                 dx = matrix(memory[3], K), u = matrix(memory[4], kRank), v = matrix(memory[5], kRank);
    const auto read = [](const Matrix& m) { return ConstMatrix{m.data, m.dtype, m.rows, m.cols, m.stride}; };
    for (const auto& offsets : kAnyOffsets) {
      for (const std::int64_t rows : {M, std::int64_t{16}}) {  // the kernel with tiles, and the one for few rows
        for (const bool group_weights : {true, false}) {
          const QuantizedWeightView weight{.N = N,
                                           .K = K,
                                           .count = group_weights ? kGroups : 1,
                                           .codes = codes.data(),
                                           .absmax = absmax.data(),
                                           .code = codebook("nf4").data()};
          const LoraView lora{.rank = kRank, .count = kGroups, .a = a.data(), .b = b.data(), .dropout = 0.5f};
          const RowGroups groups{.count = kGroups, .offsets = offsets.data()};
          const auto first = [rows](Matrix m) {
            m.rows = rows;
            return m;
          };
          const Backend& backend = backend_for({});
          backend.linear_forward(
              {.weight = weight, .lora = lora, .groups = groups, .x = read(first(x)), .y = first(y), .u = first(u)},
              {});
          backend.linear_backward_input(
              {.weight = weight, .lora = lora, .groups = groups, .dy = read(first(dy)), .dx = first(dx), .v = first(v)},
              {});
          backend.lora_gradients({.lora = lora,
                                  .groups = groups,
                                  .x = read(first(x)),
                                  .dy = read(first(dy)),
                                  .u = read(first(u)),
                                  .v = read(first(v)),
                                  .da = da.data(),
                                  .db = db.data()},
                                 {});
        }
      }
    }
  }
}

}  // namespace
}  // namespace qlora_native::cuda_emulated

int main() {
  using namespace qlora_native::cuda_emulated;
  return run_tests();
}
