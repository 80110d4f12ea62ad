#include "cpu/blocking.h"

#include <algorithm>

namespace qlora_native {

namespace {
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t multiple) { return ceil_div(a, multiple) * multiple; }
}  // namespace

std::int64_t rows_per_block(std::int64_t rows, std::int64_t bytes_per_row, std::int64_t multiple) {
  constexpr std::int64_t kMostRows = 512;
  const std::int64_t fitting = std::min(kMostRows, kPackedBytes / std::max<std::int64_t>(1, bytes_per_row));
  const std::int64_t most = std::max(multiple, fitting / multiple * multiple);
  const std::int64_t blocks = std::max<std::int64_t>(1, ceil_div(rows, most));
  return round_up(ceil_div(rows, blocks), multiple);  // blocks of equal size
}

Grid make_grid(std::int64_t rows, std::int64_t row_multiple, std::int64_t fewest_rows, std::int64_t columns,
               std::int64_t widest_tile, std::int64_t narrowest_tile, std::int64_t tasks) {
  Grid grid{round_up(rows, row_multiple), widest_tile, 1, ceil_div(columns, widest_tile)};
  const auto split_columns = [&](std::int64_t narrowest) {
    while (grid.row_parts * grid.column_tiles < tasks && grid.column_tile / 2 >= narrowest) {
      grid.column_tile /= 2;
      grid.column_tiles = ceil_div(columns, grid.column_tile);
    }
  };
  const auto split_rows = [&](std::int64_t fewest) {
    while (grid.row_parts * grid.column_tiles < tasks && grid.row_part / 2 >= fewest) {
      grid.row_part = round_up(grid.row_part / 2, row_multiple);
      grid.row_parts = ceil_div(rows, grid.row_part);
    }
  };
  split_columns(narrowest_tile);
  split_rows(std::max(fewest_rows, row_multiple));
  return grid;
}

}  // namespace qlora_native
