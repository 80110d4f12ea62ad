// Tile products, by which a Dot that names a type `Tiles` multiplies where another one uses vectors.
//
// A tile is a register of 16 rows of 16 units. The product C += A . B takes
//
//   A   [16 rows][16 units of the inner dimension]
//   B   [16 units of the inner dimension][16 columns]
//   C   [16 rows][16 columns], fp32
//
// Their rows may lie any distance apart in memory. For Y A is a decoded panel of W and B is packed X, which lie as for
// vectors (product_nt-inl.h). For dX A is packed dY and B are interleaved rows of W, in a layout of their own
// (product_nn_layout-inl.h). amx/tile.h has the instruction, and amx/tile_emulated.h computes the same in plain C++.
#pragma once

#include <cstdint>

#include "cpu/product/prefetch-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileUnits = 16;  // of the inner dimension; also the columns of B and C

template <class Dot>
constexpr bool kTiled = requires { typename Dot::Tiles; };

struct NoTiles {};
template <class Dot>
struct TilesOf {
  using type = NoTiles;
};
template <class Dot>
  requires kTiled<Dot>
struct TilesOf<Dot> {
  using type = typename Dot::Tiles;
};

// Where the tiles of one operand of a block lie. All distances are in floats.
template <class Pointer>
struct TileGrid {
  Pointer data;
  std::int64_t row;   // from a row of a tile to its next
  std::int64_t tile;  // from a tile to the block's next: of A and C downwards, of B to the right
  std::int64_t step;  // of A and B: from these 16 units to the next 16. Of C: from a tile to the one on its right
};

// The operand of a block whose every line is read once. The other one stays in the first-level cache, for one block
// after the other.
enum class Streamed { a, b };

// A block of kRows x kCols tiles of accumulators, which stay in registers from begin() to end(): C in tiles 0 ... 3, A
// in 4, B in 5. With two registers for A and two for B, 2 x 2 tiles would cost four loads a step instead of five, and
// no time, because products take twice as long as the loads. But where another thread shares the core, each tile in use
// costs time, as if the processor renamed tiles from a set that the two share: on an Intel Xeon (Emerald Rapids) such a
// block took 3.7 times as long there as alone with eight tiles, and 2.4 times with six.
template <int kRows, int kCols, class Tiles>
class TileBlock {
  static_assert(kRows * kCols <= 4);

 public:
  // The accumulators begin with what `c` holds, or with zero.
  [[gnu::always_inline]] static void begin(Tiles& tiles, TileGrid<float*> c, bool accumulate) {
    each([=, &tiles](auto i, auto j) {
      if (accumulate)
        tiles.template load<i * kCols + j>(c.data + i * c.tile + j * c.step, c.row);
      else
        tiles.template zero<i * kCols + j>();
    });
  }
  // Multiplies kTileUnits units. Each tile of the streamed operand is loaded once. Every other one takes the tiles of
  // the other operand backwards, so it begins with the tile that the one before ended with.
  template <Streamed kStreamed>
  [[gnu::always_inline]] static void multiply(Tiles& tiles, TileGrid<const float*> a, TileGrid<const float*> b) {
    constexpr int kA = 4, kB = 5;
    if constexpr (kStreamed == Streamed::a)
      each<kCols>([=, &tiles](auto i, auto place) {
        constexpr int j = i % 2 == 0 ? place : kCols - 1 - place;
        if constexpr (place == 0) tiles.template load_once<kA>(a.data + i * a.tile, a.row);
        if constexpr (place != 0 || i == 0) tiles.template load<kB>(b.data + j * b.tile, b.row);
        tiles.template multiply<i * kCols + j, kA, kB>();
      });
    else
      each<kRows>([=, &tiles](auto j, auto place) {
        constexpr int i = j % 2 == 0 ? place : kRows - 1 - place;
        if constexpr (place == 0) tiles.template load_once<kB>(b.data + j * b.tile, b.row);
        if constexpr (place != 0 || j == 0) tiles.template load<kA>(a.data + i * a.tile, a.row);
        tiles.template multiply<i * kCols + j, kA, kB>();
      });
  }
  // Prefetches a part of the accumulators at `c`, one of `kTileRows` parts. Rows are counted over all tiles.
  [[gnu::always_inline]] static void prefetch(TileGrid<float*> c, std::int64_t part) {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kCols; ++j) __builtin_prefetch(c.data + i * c.tile + j * c.step + part * c.row, 0, 3);
  }
  // Stores the tiles that begin in the first `rows` rows.
  [[gnu::always_inline]] static void end(Tiles& tiles, TileGrid<float*> c, std::int64_t rows = kRows * kTileRows) {
    each([=, &tiles](auto i, auto j) {
      if (i * kTileRows < rows) tiles.template store<i * kCols + j>(c.data + i * c.tile + j * c.step, c.row);
    });
  }

 private:
  // Calls f(line, place in the line) for all tiles, which lie in lines of kPlaces. The functions above give f the
  // addresses by value, so that they stay in registers: as far as the compiler knows, the assembler of a tile may write
  // any memory.
  template <int kPlaces = kCols, class F>
  [[gnu::always_inline]] static void each(F f) {
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      (f(std::integral_constant<int, i / kPlaces>(), std::integral_constant<int, i % kPlaces>()), ...);
    }(std::make_integer_sequence<int, kRows * kCols>());
  }
};

// A block over `units` units, a multiple of kTileUnits. The accumulators of the next block, `next_block` floats after
// these, are prefetched, and so is what `ahead` says.
template <int kRows, int kCols, Streamed kStreamed, class Tiles, class Ahead>
[[gnu::noinline]] void multiply_tiles(Tiles& tiles, TileGrid<const float*> a, TileGrid<const float*> b,
                                      std::int64_t units, TileGrid<float*> c, bool accumulate, std::int64_t next_block,
                                      Ahead ahead) {
  using Block = TileBlock<kRows, kCols, Tiles>;
  Block::begin(tiles, c, accumulate);
  TileGrid<float*> next = c;
  next.data += next_block;
  for (std::int64_t unit = 0; unit < units; unit += kTileUnits) {
    Block::prefetch(next, unit / kTileUnits % kTileRows);
    ahead.prefetch(unit);
    Block::template multiply<kStreamed>(tiles, a, b);
    a.data += a.step;
    b.data += b.step;
  }
  Block::end(tiles, c);
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
