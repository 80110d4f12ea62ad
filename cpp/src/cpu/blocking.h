// How the cpu products are cut into blocks: a cache model in plain scalar code, so that it can be read and tested.
// Where a sum starts afresh is not decided here, so that no choice changes a result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/caches.h"

namespace qlora_native {

// Bytes of packed activations that a call keeps for all its threads: of the 8 MB that it may take beside 1 MB a thread.
// As many as may be, for a weight is decoded once for every block of rows.
constexpr std::int64_t kPackedBytes = 15 << 19;
// A thread is given about so many tasks where the shape allows it, so that threads end together.
constexpr std::int64_t kTasksPerThread = 8;

// Rows of activations that are packed at once: what fits kPackedBytes, a multiple of `multiple`.
std::int64_t rows_per_block(std::int64_t rows, std::int64_t bytes_per_row, std::int64_t multiple);

// A product's output is cut into a grid of parts of its rows x tiles of its columns, all of about one size.
struct Grid {
  std::int64_t row_part = 0, row_parts = 0;
  std::int64_t column_tile = 0, column_tiles = 0;
};
struct GridLimits {
  std::int64_t most_rows, fewest_rows;    // of a part
  std::int64_t widest_tile, narrow_tile;  // columns are split down to narrow_tile before rows are,
  std::int64_t narrowest_tile;            // and down to this if that is not enough; each divides the one before
};
// Splits no further than it takes to have `tasks_per_thread` parts x tiles a thread, and rows only where narrow tiles
// are not enough: a weight is decoded once for every part of the rows, and activations are read once for every tile of
// the columns. Where rows are one part, every thread has the same number of tiles if the columns allow it: with seven
// for two, one thread would wait for an eighth.
Grid make_grid(std::int64_t rows, std::int64_t columns, const GridLimits& limits, std::int64_t threads,
               std::int64_t tasks_per_thread);

// What a task keeps in the second-level cache was tuned for one of 1 MB. A smaller cache gets less in proportion. A
// larger one gets no more, for a task's memory is bounded.
constexpr std::int64_t kTunedSecondLevel = 1 << 20;
constexpr std::int64_t for_second_level(std::int64_t tuned, std::int64_t least, const Caches& of) {
  return std::clamp(tuned * std::min(of.second, kTunedSecondLevel) / kTunedSecondLevel, least, tuned);
}

// Whether an output of so many bytes is to be written past the caches, which is only for aligned ones: a plain store
// first reads the line that it is about to fill. From half of the last-level cache on, for it would not hold the output
// until it is read; from 16 MB on where the cache is larger, for other programs use it too. Where memory is new, its
// lines are in the cache already, where the system cleared them.
constexpr std::int64_t stream_bytes(const Caches& of) { return std::min<std::int64_t>(of.last / 2, 16 << 20); }
bool written_past_caches(const void* out, std::int64_t bytes);

}  // namespace qlora_native
