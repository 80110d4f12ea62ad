#include "cpu/runtime/blocking.h"

#include <algorithm>

#include "common/layout.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace qlora_native {

std::int64_t rows_per_block(std::int64_t rows, std::int64_t bytes_per_row, std::int64_t multiple) {
  const std::int64_t fitting = kPackedBytes / std::max<std::int64_t>(1, bytes_per_row);
  const std::int64_t max_rows = std::max(multiple, fitting / multiple * multiple);
  const std::int64_t blocks = std::max<std::int64_t>(1, ceil_div(rows, max_rows));
  return round_up(ceil_div(rows, blocks), multiple);  // blocks of equal size
}

Grid make_grid(std::int64_t rows, std::int64_t columns, const GridLimits& limits, std::int64_t threads,
               std::int64_t tasks_per_thread) {
  if (rows == 0 || columns == 0) return {};
  const std::int64_t tasks = threads * tasks_per_thread;
  Grid grid;
  grid.row_parts = ceil_div(rows, limits.max_rows);
  const auto split_columns = [&](std::int64_t multiple) {
    const std::int64_t wanted = ceil_div(tasks, grid.row_parts);
    grid.column_tile = std::clamp(columns / wanted / multiple * multiple, multiple, limits.max_tile);
    grid.column_tiles = ceil_div(columns, grid.column_tile);
    if (grid.row_parts > 1) return;
    grid.column_tile = round_up(ceil_div(columns, round_up(grid.column_tiles, threads)), multiple);
    grid.column_tiles = ceil_div(columns, grid.column_tile);
  };
  split_columns(limits.preferred_min_tile);
  const std::int64_t max_parts = std::max(grid.row_parts, rows / limits.min_rows);
  grid.row_parts = std::clamp(ceil_div(tasks, grid.column_tiles), grid.row_parts, max_parts);
  grid.row_part = ceil_div(rows, grid.row_parts);
  grid.row_parts = ceil_div(rows, grid.row_part);
  if (grid.row_parts * grid.column_tiles < tasks) split_columns(limits.min_tile);
  return grid;
}

bool wants_streaming_stores(const void* out, std::int64_t bytes) {
  constexpr std::uintptr_t kAlignment = 64;
  const auto address = reinterpret_cast<std::uintptr_t>(out);
  if (bytes < stream_bytes(caches()) || address % kAlignment != 0) return false;
#ifdef __linux__
  // One page answers for all; the first may share its page with something else.
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t middle = (address + static_cast<std::uintptr_t>(bytes / 2)) / page * page;
  unsigned char present;
  if (mincore(reinterpret_cast<void*>(middle), page, &present) == 0) return present % 2 != 0;
#endif
  return true;
}

}  // namespace qlora_native
