// How the cpu products are cut into blocks: a cache model in plain scalar code, so that it can be read and tested.
// No choice here changes a result, except that the forward product sums K in blocks of Dot::kRestart.
#pragma once

#include <cstdint>

namespace qlora_native {

// Bytes of packed activations that a call keeps for all its threads.
constexpr std::int64_t kPackedBytes = 6 << 20;
// A thread is given at least so many tasks where the shape allows it, so that threads end together.
constexpr std::int64_t kTasksPerThread = 4;

// Rows of activations that are packed at once: what fits kPackedBytes, a multiple of `multiple`, at most 512.
std::int64_t rows_per_block(std::int64_t rows, std::int64_t bytes_per_row, std::int64_t multiple);

// A product's output is cut into a grid of parts of its rows x tiles of its columns.
struct Grid {
  std::int64_t row_part;  // rows of activations a task takes; a multiple of `row_multiple`
  std::int64_t column_tile;
  std::int64_t row_parts;
  std::int64_t column_tiles;
};
// Prefers wide tiles (they are decoded once for all rows), then splits columns down to `narrowest_tile`, then rows
// down to `fewest_rows`, until there are so many tasks. Dimensions in elements.
Grid make_grid(std::int64_t rows, std::int64_t row_multiple, std::int64_t fewest_rows, std::int64_t columns,
               std::int64_t widest_tile, std::int64_t narrowest_tile, std::int64_t tasks);

}  // namespace qlora_native
