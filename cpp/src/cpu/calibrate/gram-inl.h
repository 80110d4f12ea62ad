// gram += X^T X, in tiles of gram on and above its diagonal. A task takes a tile through all rows of X, in panels of
// 256 rows, whose columns it packs in two forms (product_nn-inl.h):
//
//   columns   [chunk][unit of rows][64 columns]   the second operand
//   rows      [column][unit of rows]              the first one, which is the other transposed
//
// A unit is two rows of bfloat16 or one of fp32.
#pragma once

#include "cpu/product/job_operands-inl.h"
#include "cpu/product/product_nn-inl.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "qlora_native/calibrate.h"
#include "qlora_native/runtime.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot>
class Gram {
 public:
  static void run(const GramArgs& args) {
    const Gram gram(args, num_threads());
    parallel_for(gram.tiles_ * (gram.tiles_ + 1) / 2, [&](std::int64_t task) {
      std::int64_t row = 0;  // the tiles of a row end with the diagonal one
      for (; task > row; ++row) task -= row + 1;
      gram.multiply_tile(gram.tile(task), gram.tile(row));
    });
  }

 private:
  using Nn = ProductNn<Dot>;
  using Layout = LayoutNn<Dot>;
  using Panel = typename Layout::WholePanel;
  static constexpr std::int64_t kPanelRows = 256;
  static constexpr std::int64_t kPanelUnits = kPanelRows / Dot::kElementsPerUnit;
  // X is read, and gram added to, once for every tile. On Zen 4 tiles of 12 chunks took a tenth less time than those of
  // 6. Fewer are taken where threads would have too few tasks.
  static constexpr std::int64_t kMaxTileChunks = 12, kMinTileChunks = 2, kMinTasksPerThread = 3;
  static_assert(kPanelUnits % kTileUnits == 0 && kTileUnits % kLanes == 0);

  Gram(const GramArgs& args, std::int64_t threads)
      : args_(args), K_(args.x.cols), chunks_(ceil_div(K_, kChunk)), tile_chunks_(kMaxTileChunks) {
    const auto tiles = [&] { return ceil_div(chunks_, tile_chunks_); };
    while (tile_chunks_ > kMinTileChunks && tiles() * (tiles() + 1) / 2 < kMinTasksPerThread * threads) --tile_chunks_;
    tiles_ = tiles();
  }

  Range tile(std::int64_t i) const { return {i * tile_chunks_, smaller((i + 1) * tile_chunks_, chunks_)}; }
  std::int64_t width(std::int64_t chunk) const { return smaller<std::int64_t>(kChunk, K_ - chunk * kChunk); }
  float* at(std::int64_t i, std::int64_t j) const { return args_.gram + i * K_ + j; }

  // The tile of these rows and columns of gram, which are given in chunks.
  void multiply_tile(Range rows, Range columns) const {
    const std::int64_t stride = Layout::packed_stride(kPanelUnits);
    const std::int64_t panel_floats = tile_chunks_ * kPanelUnits * kChunk;
    const std::int64_t row_floats = tile_chunks_ * kChunk * stride;
    float* const of_columns =
        scratch_floats(Slot::thread, panel_floats + row_floats + (tile_chunks_ * kChunk + kTileRows) * kChunk);
    float* const of_rows = of_columns + panel_floats;
    float* const accumulators = of_rows + row_floats;
    typename Nn::Tiles tiles;
    for (std::int64_t first = 0; first < args_.x.rows; first += kPanelRows) {
      const ConstMatrix x = rows_of(args_.x, first, smaller(kPanelRows, args_.x.rows - first));
      const Range units{0, round_up(ceil_div(x.rows, std::int64_t{Dot::kElementsPerUnit}), kTileUnits)};
      decode_panel(DenseRows<Dot, true>(x), Panel{units, rows, of_columns});
      Layout::transpose_panel(of_columns, units.end, rows.count(), of_rows, stride);
      if (rows.begin != columns.begin) decode_panel(DenseRows<Dot, true>(x), Panel{units, columns, of_columns});
      for (std::int64_t c = columns.begin; c < columns.end; ++c) {
        const std::int64_t count = smaller(smaller(rows.end, c + 1) * kChunk, K_) - rows.begin * kChunk;
        const auto vectors = static_cast<int>(ceil_div(width(c), std::int64_t{kLanes}));
        Nn::multiply_rows(tiles, of_rows, stride, count, of_columns + (c - columns.begin) * units.end * kChunk,
                          units.end, vectors, accumulators, false);
        prefetch(first + kPanelRows, c - columns.begin, columns.count(), rows, columns);
        for (std::int64_t i = 0; i < count; ++i)
          add_row(accumulators + i * kChunk, width(c), at(rows.begin * kChunk + i, c * kChunk));
      }
    }
    for (std::int64_t c = columns.begin; c < columns.end; ++c)
      for (std::int64_t r = rows.begin; r < smaller(rows.end, c + 1); ++r) mirror(r, c);
  }

  // Fetches a part of the next panel, from row `first` on, while this one is multiplied: part i of `parts`. Rows are
  // too short for the processor to do so by itself.
  void prefetch(std::int64_t first, std::int64_t i, std::int64_t parts, Range rows, Range columns) const {
    constexpr auto kSize = static_cast<std::int64_t>(size_of(Dot::kActivation));
    const std::int64_t end = smaller(first + (i + 1) * kPanelRows / parts, args_.x.rows);
    for (std::int64_t row = first + i * kPanelRows / parts; row < end; ++row)
      for (const Range& chunks : {rows, columns}) {
        const char* const begin =
            static_cast<const char*>(args_.x.data) + (row * args_.x.stride + chunks.begin * kChunk) * kSize;
        for (std::int64_t at = 0; at < chunks.count() * kChunk * kSize; at += 64) __builtin_prefetch(begin + at, 0, 2);
      }
  }

  static void add_row(const float* terms, std::int64_t count, float* sums) {
    for (std::int64_t i = 0; i < count; i += kLanes) {
      const auto lanes = static_cast<int>(smaller<std::int64_t>(kLanes, count - i));
      store_from_f32<DType::f32>(sums + i, add(load_as_f32<DType::f32>(sums + i, lanes), load(terms + i)), lanes);
    }
  }

  // Copies what chunk r of the rows and chunk c of the columns have above the diagonal to where it stands transposed.
  void mirror(std::int64_t r, std::int64_t c) const {
    for (std::int64_t i = r * kChunk; i < r * kChunk + width(r); i += kLanes)
      for (std::int64_t j = larger(i, c * kChunk); j < c * kChunk + width(c); j += kLanes) {
        const auto rows = static_cast<int>(smaller<std::int64_t>(kLanes, K_ - i));
        const auto columns = static_cast<int>(smaller<std::int64_t>(kLanes, K_ - j));
        if (i == j) {
          for (int k = 1; k < rows; ++k)
            for (int l = 0; l < k; ++l) *at(i + k, j + l) = *at(i + l, j + k);
          continue;
        }
        F32 square[kLanes];
        for (int k = 0; k < kLanes; ++k) square[k] = k < rows ? load_as_f32<DType::f32>(at(i + k, j), columns) : zero();
        transpose(square);
        for (int k = 0; k < columns; ++k) store_from_f32<DType::f32>(at(j + k, i), square[k], rows);
      }
  }

  const GramArgs& args_;
  std::int64_t K_, chunks_, tile_chunks_, tiles_ = 0;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
