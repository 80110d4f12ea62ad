// Rows in groups (linear.h), as kernels find them. The offsets lie in the device's memory, and the host launches
// kernels without reading them: it knows how many tiles of rows there may be at most (config.h), and each block looks
// for its own. An offset beyond the rows counts as their end, so that no kernel goes beyond the rows.
#pragma once

#include "common/layout.h"
#include "device/simt.cuh"
#include "qlora_native/linear.h"

namespace qlora_native::QLN_CUDA {

struct RowSpan {
  std::int64_t begin, end;
  __device__ bool is_empty() const { return begin >= end; }
};

// A tile of rows begins with row `begin` and has no row behind `end`, where its group ends. It is empty where there is
// no such tile.
struct RowTile : RowSpan {
  int group;
};

struct Groups {
  int count = 0;   // 0: all rows are one group
  int stride = 1;  // group g begins at offset g * stride
  const std::int64_t* offsets = nullptr;
  bool has_leading_group = false;  // whether rows before the first offset are a group too, number -1

  // The number of groups, with the leading one.
  int total() const { return count == 0 ? 1 : count + (has_leading_group ? 1 : 0); }

  __device__ std::int64_t offset(int g, std::int64_t rows) const {
    const std::int64_t at = offsets[std::int64_t{g} * stride];
    return at < 0 ? 0 : at < rows ? at : rows;
  }
  __device__ RowSpan rows_of(int g, std::int64_t rows) const {
    if (count == 0) return {0, rows};
    return {g < 0 ? 0 : offset(g, rows), offset(g + 1, rows)};
  }
  // The first group that ends behind `row`, or `count` where none does.
  __device__ int group_of(std::int64_t row, std::int64_t rows) const {
    int low = 0, high = count;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (offset(middle + 1, rows) > row) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

// The groups of rows that adapters are for. If all groups share one adapter, they are one group.
inline Groups groups_of_adapters(const LoraView& lora, const RowGroups& groups) {
  if (groups.count == 0) return {};
  return {.count = static_cast<int>(lora.count),
          .stride = static_cast<int>(groups.count / lora.count),
          .offsets = groups.offsets};
}

struct FoundTile {
  RowTile tile;
  std::uint32_t count;  // where there is no such tile: how many tiles there are
};
constexpr std::uint32_t kNoTile = 0xFFFFFFFF;

// Finds tile number `wanted` of the groups' rows, which are cut into tiles of kRows rows, group after group. All lanes
// of a warp search for the same tile, and each reads one group of 32.
template <int kRows>
__device__ FoundTile find_row_tile(const Groups& groups, std::int64_t rows, std::uint32_t wanted) {
  const int lane = thread_index() % kWarp;
  std::uint32_t tiles_before = 0;
#pragma unroll 1
  for (int first = groups.has_leading_group ? -1 : 0; first < groups.count; first += kWarp) {
    const int group = first + lane;
    const RowSpan span = group < groups.count ? groups.rows_of(group, rows) : RowSpan{0, 0};
    const std::uint32_t tiles =
        span.is_empty() ? 0 : static_cast<std::uint32_t>(ceil_div(span.end - span.begin, kRows));
    std::uint32_t prefix_sum = tiles;  // how many tiles the lanes up to this one have
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const std::uint32_t lower_sum = shfl(prefix_sum, lane < distance ? lane : lane - distance);
      if (lane >= distance) prefix_sum += lower_sum;
    }
    const std::uint32_t place = wanted - (tiles_before + prefix_sum - tiles);
    const std::uint32_t found = max_of_warp(place < tiles ? static_cast<std::uint32_t>(lane) + 1 : 0);
    if (found > 0) {
      const int source = static_cast<int>(found) - 1;
      const std::int64_t begin = span.begin + std::int64_t{place} * kRows;
      return {{{shfl(begin, source), shfl(span.end, source)}, first + source}, 0};
    }
    tiles_before += shfl(prefix_sum, kWarp - 1);
  }
  return {{{0, 0}, 0}, tiles_before};
}

}  // namespace qlora_native::QLN_CUDA
