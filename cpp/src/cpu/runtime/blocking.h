// How the cpu products are cut into blocks: a cache model in plain scalar code, so that it can be read and tested.
// Where accumulators start from zero is not decided here, so that no choice changes a result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/runtime/caches.h"

namespace qlora_native {

// Bytes of packed activations that all threads of a call share: nearly all of the 8 MB that it may take beside 1 MB a
// thread, because a weight is decoded once for every block of rows.
constexpr std::int64_t kPackedBytes = 15 << 19;
// Each thread gets about so many tasks where the shape allows it, so that all threads end together.
constexpr std::int64_t kTasksPerThread = 8;
// A task decodes its first panel of W before it multiplies anything. A vector of rows is multiplied about as fast as
// the next panel is decoded, so a thread that has fewer panels times vectors than this does them in one task.
constexpr std::int64_t kPanelsOfOneTask = 32;
constexpr std::int64_t tasks_per_thread(std::int64_t panels, std::int64_t threads) {
  return panels < kPanelsOfOneTask * threads ? 1 : kTasksPerThread;
}

// Rows of activations that are packed at once: as many as fit kPackedBytes, and a multiple of `multiple`.
std::int64_t rows_per_block(std::int64_t rows, std::int64_t bytes_per_row, std::int64_t multiple);

// The output of a product is cut into a grid: parts of its rows times tiles of its columns, all of about one size.
struct Grid {
  std::int64_t row_part = 0, row_parts = 0;
  std::int64_t column_tile = 0, column_tiles = 0;
};
struct GridLimits {
  std::int64_t max_rows, min_rows;            // of a part
  std::int64_t max_tile, preferred_min_tile;  // columns are split down to preferred_min_tile before rows are,
  std::int64_t min_tile;                      // and down to this if that is not enough; each divides the one before
};
// Splits until each thread has `tasks_per_thread` parts times tiles. A weight is decoded once for every part of the
// rows, and activations are read once for every tile of the columns, so rows are split only where narrow tiles are not
// enough. Where rows are one part, every thread has the same number of tiles if the columns allow it: if two threads
// had seven tiles, one of them would wait while the other computes its fourth.
Grid make_grid(std::int64_t rows, std::int64_t columns, const GridLimits& limits, std::int64_t threads,
               std::int64_t tasks_per_thread);

// What a task keeps in the second-level cache was tuned for a cache of 1 MB. A smaller one holds less in proportion; a
// larger one gets no more, because the memory of a task is bounded.
constexpr std::int64_t kTunedL2 = 1 << 20;
constexpr std::int64_t scaled_to_l2(std::int64_t tuned, std::int64_t minimum, const Caches& caches) {
  return std::clamp(tuned * std::min(caches.second, kTunedL2) / kTunedL2, minimum, tuned);
}

// Whether an output of so many bytes is to be written by non-temporal stores. A plain store first reads the cache line
// that it is about to fill; these do not. It pays from half of the last-level cache on, which would not hold the
// output until it is read; and from 16 MB on where the cache is larger, for other programs use it too. The output must
// be aligned, and its memory must not be new: then its lines are in the cache already, where the system cleared them.
constexpr std::int64_t stream_bytes(const Caches& caches) { return std::min<std::int64_t>(caches.last / 2, 16 << 20); }
bool wants_streaming_stores(const void* out, std::int64_t bytes);

}  // namespace qlora_native
