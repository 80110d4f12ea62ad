// linear_forward of many rows of x, through ProductNt.
#pragma once

#include "cpu/blocking.h"
#include "cpu/generic/lora-inl.h"
#include "cpu/generic/product_nt-inl.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "qlora_native/runtime.h"

namespace qlora_native {
namespace {

template <class Dot>
struct ManyRows {
  using Product = ProductNt<Dot>;
  static constexpr std::int64_t kWidestTask = 512;  // rows of W
  static constexpr std::int64_t kStripRows = Product::kStripVectors * kLanes;
  // Rows whose sums stay in the second-level cache, with two panels. Where tiles are wider, fewer.
  static constexpr std::int64_t kMostStrips = (kTiled<Dot> ? 448 : 528) / kStripRows;
  static constexpr std::int64_t kFewestStrips = 144 / kStripRows;  // fewer rows, and decoding again would show

  template <class Rows>
  static void forward(const Rows& w, const LinearForwardArgs& args) {
    const LoraView& lora = args.lora;
    const std::int64_t units = Product::padded_units(w);
    const std::int64_t u_units = Product::padded_units(DenseRows<Dot, true>(lora_b(lora, args.weight.N)));
    const std::int64_t block = rows_per_block(args.x.rows, (units + 2 * u_units) * 4, kStripRows);
    for (std::int64_t m = 0; m < args.x.rows; m += block) {
      const std::int64_t rows = smaller(block, args.x.rows - m);
      LinearForwardArgs part = args;
      part.x = rows_of(args.x, m, rows);
      part.y = rows_of(args.y, m, rows);
      part.u = rows_of(args.u, m, rows);
      forward_block(w, part, m, units, u_units);
    }
  }

 private:
  template <class Rows>
  static void forward_block(const Rows& w, LinearForwardArgs args, std::int64_t first_row, std::int64_t units,
                            std::int64_t u_units) {
    const LoraView& lora = args.lora;
    const std::int64_t vectors = ceil_div(args.x.rows, kLanes), rows = vectors * kLanes;
    const Strips strips(vectors, Product::kStripVectors, Product::kWidest);
    float* x = reinterpret_cast<float*>(
        scratch(Slot::call, static_cast<std::size_t>(rows * (units + 2 * u_units)) * sizeof(float)));
    float* u = x + rows * units;
    if (lora.rank > 0 && args.u.data == nullptr)
      args.u = {u + rows * u_units, Dot::kActivation, args.x.rows, lora.rank, lora.rank};

    const auto pack = [&](std::int64_t strip) {
      const DenseRows<Dot, false> dense(args.x);
      Product::pack_strip(dense, strips.first(strip) * kLanes, strips.width(strip), 0, ceil_div(args.x.cols, kChunk),
                          x + strips.first(strip) * units * kLanes);
      if (lora.rank > 0) low_rank(args, first_row, strips, strip, x, units, u, u_units);
    };

    const std::int64_t N = args.weight.N;
    const std::int64_t most_strips = for_second_level(kMostStrips, kFewestStrips, caches());
    const Grid grid = make_grid(
        strips.count(), N, {most_strips, kFewestStrips, kWidestTask, Product::kWidestTile, Product::kNarrowestTile},
        num_threads(), kTasksPerThread);
    const auto multiply = [&](std::int64_t task) {
      const std::int64_t first = task % grid.row_parts * grid.row_part;
      const std::int64_t last = smaller(first + grid.row_part, strips.count());
      const std::int64_t begin = task / grid.row_parts * grid.column_tile;
      const std::int64_t end = smaller(begin + grid.column_tile, N);
      const std::int64_t vectors = strips.first(last) - strips.first(first);
      float* panels = reinterpret_cast<float*>(scratch(
          Slot::thread, static_cast<std::size_t>(2 * Product::kPanelFloats + vectors * kLanes * Product::kWidestTile) *
                            sizeof(float)));
      float* sums = panels + 2 * Product::kPanelFloats;
      const typename Product::Packed packed_x{x, units, strips, first, last}, packed_u{u, u_units, strips, first, last};
      const DenseRows<Dot, true> b(lora_b(lora, N), lora.scaling);
      typename Product::Tiles tiles;
      Product::multiply(
          tiles, w, begin, end, packed_x, panels, sums, [&](std::int64_t n, std::int64_t rows, float* panel) {
            typename Product::NoDecoder none;
            for (std::int64_t c = 0; c < ceil_div(lora.rank, kChunk); c += Product::kBlockChunks) {
              const std::int64_t unit = c * Dot::kUnits;
              Product::decode_panel(b, n, smaller(rows, end - n), rows, c,
                                    smaller(c + Product::kBlockChunks, ceil_div(lora.rank, kChunk)), panel);
              Product::multiply_panel(tiles, packed_u, unit, smaller(Product::kBlockUnits, u_units - unit), panel, rows,
                                      sums, true, none);
            }
            for (std::int64_t s = first; s < last; ++s)
              Product::write(sums + packed_x.sums(s, rows), strips.width(s), rows, 1.0f, args.bias, args.y,
                             strips.first(s) * kLanes, n);
          });
    };
    parallel_stages(Stage{strips.count(), pack}, Stage{grid.row_parts * grid.column_tiles, multiply});
  }

  // U = drop(X) . A^T / (1-p) for one strip: to args.u, and packed as more units of x.
  static void low_rank(const LinearForwardArgs& args, std::int64_t first_row, const Strips& strips, std::int64_t strip,
                       const float* x, std::int64_t units, float* u, std::int64_t u_units) {
    const LoraView& lora = args.lora;
    const Dropout dropout = dropout_of(lora);
    const std::int64_t first = strips.first(strip), chunks = ceil_div(args.x.cols, kChunk);
    const int width = strips.width(strip);
    const DenseRows<Dot, false> a(lora_a(lora, args.x.cols));
    const DenseRows<Dot, false> dropped(args.x, 1.0f, dropout, first_row);
    constexpr std::int64_t kMaskedFloats = Product::kWidest * kLanes * Product::kBlockUnits;
    float* panel = reinterpret_cast<float*>(
        scratch(Slot::thread, static_cast<std::size_t>(Product::kPanelFloats + kMaskedFloats +
                                                       Product::kWidestTile * Product::kWidest * kLanes) *
                                  sizeof(float)));
    float* masked = panel + Product::kPanelFloats;
    float* sums = masked + kMaskedFloats;
    typename Product::Tiles tiles;
    for (std::int64_t r = 0; r < lora.rank; r += Product::kWidestTile) {
      const std::int64_t count = smaller(Product::kWidestTile, lora.rank - r);
      const std::int64_t tile_rows = Product::whole_tiles(count);
      for (std::int64_t c = 0; c < chunks; c += Product::kBlockChunks) {
        const std::int64_t end = smaller(c + Product::kBlockChunks, chunks);
        const float* block = x + (first * units + c * Dot::kUnits * width) * kLanes;
        if (dropout) {
          Product::pack_strip(dropped, first * kLanes, width, c, end, masked);
          block = masked;
        }
        Product::decode_panel(a, r, count, tile_rows, c, end, panel);
        typename Product::NoDecoder none;
        Product::strip(tiles, width, block, panel, tile_rows, (end - c) * Dot::kUnits, sums, c != 0, none);
      }
      Product::write(sums, width, tile_rows, dropout_scale(lora), nullptr, args.u, first * kLanes, r);
    }
    Product::pack_strip(DenseRows<Dot, true>(readable(args.u)), first * kLanes, width, 0, ceil_div(lora.rank, kChunk),
                        u + first * u_units * kLanes);
  }
};

}  // namespace
}  // namespace qlora_native
