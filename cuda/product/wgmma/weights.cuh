// The weight as a consumer of the product by wgmma (gemm.cuh) decodes it: forward by its rows, backward by its columns.
//
// Both layouts say which codes and scales of a step go where, and which of them a lane has. Of 16 of the inner
// dimension, wgmma wants lane (g, t) to have 2t, 2t + 1, 2t + 8 and 2t + 9.
#pragma once

#include "common/tensor_map.h"
#include "product/wgmma/register_table.cuh"
#include "product/wgmma/tile.cuh"

namespace qlora_native::QLN_CUDA {

// The elements of a step that a lane has, rounded, as wgmma's operand a: by product, then by half of its 16 of the
// inner dimension and by column of the result. A register has two adjacent elements of the inner dimension (WgmmaLane).
using WgmmaFragments = std::uint32_t[kGemmStep / kWgmmaInner][4];

// Each layout has a Decoder of what a lane has of a step. It decodes a step while the products of the one before run,
// and rounds it when they are done, because the compiler lets nothing define an operand of wgmma while products run.

// Tables in registers (register_table.cuh) save a step cycles of shared memory, but cost issue slots and cycles of the
// ALU. By the counts of config.cpp shared memory bounds the steps of small tiles, so that these use both, as equally as
// they can. With 256 rows the tensor cores take longer.
//
// Whether a forward tile of so many rows decodes half of its codes by a BlockTable: 128 cycles less of shared memory,
// 100 more of the issue slots, and 230 of the ALU. With 16 rows it would have to wait for these.
constexpr bool decodes_in_registers(int tile_rows) { return tile_rows > 16 && tile_rows < 256; }
// How many of the 8 rows that a lane has of a step of dX it decodes by a LevelTable: 32 cycles less of shared memory
// each, 39 ... 58 more of the issue slots, and 87 ... 92 of the ALU. With four, a step of 128 rows has nearly gone down
// to the time of the tensor cores.
constexpr unsigned rows_in_registers(int tile_rows) {
  if (tile_rows == 256) return 0;
  return tile_rows == 128 ? 4 : tile_rows == 64 ? 3 : 2;
}

// Forward: a column of the result is a row of W, and 32 bytes of it are a step. The lane takes byte t of each word:
//
//   element of a step   0 1  2 3  4 5  6 7   8 ... 15   16 ... 23   24 ... 31   ...
//   byte                0    1    2    3     4 ... 7    8 ... 11    12 ... 15
//   taken by t =        0    1    2    3     0 ... 3    0 ... 3     0 ... 3
//
// TMA's swizzle exchanges the two vectors of a row in every second group of four rows. So four adjacent g, which is
// how many a load of 16 bytes serves at once, read different banks.
struct WgmmaRows : ByRows {
  static constexpr int kTileRows = kTileCols, kTileRowBytes = kGemmStep / 2;  // of codes
  static constexpr Swizzle kSwizzle = Swizzle::bytes_32;

  static constexpr int tile_row(int, int col0) { return col0; }
  static constexpr int tile_byte(int inner0, int) { return inner0 / 2; }
  // The element of a step, and the column of a tile, that the i-th scale is for.
  static constexpr int scale_inner(int) { return 0; }
  static constexpr int scale_col(int i) { return i; }

  // The first of the lane's two rows is decoded by the table of pairs. So is the second one, or by a table in
  // registers.
  template <class T, class Tile>
  class Decoder {
   public:
    // `codes` and `scales` are the first stage's.
    __device__ Decoder(const SharedAddress& codes, const SharedAddress& scales, const float* code)
        : Decoder(WgmmaLane<Tile>(), codes, scales) {
      if constexpr (kInRegisters) {
#pragma unroll
        for (int i = 0; i < kLevels; ++i) levels_[i] = code[i];
      }
    }
    // Decodes the step in the stage that begins `stage` bytes behind the first.
    template <class Table>
    __device__ __forceinline__ void decode(std::uint32_t stage, const Table& table) {
      const auto scale = load_shared<Vector<float, 2>>(scales_.at(stage));
#pragma unroll
      for (unsigned vector = 0; vector < 2; ++vector) {
#pragma unroll
        for (unsigned row = 0; row < kRowsByPairs; ++row) {
          const Words words = load(stage, vector, row);
#pragma unroll
          for (unsigned word = 0; word < 4; ++word) {
            const auto pair = table.pair_of_byte(words.at[word], t_);
            float* const to = values_ + (row * kWords + vector * 4 + word) * 2;
            to[0] = pair.at[0] * scale.at[row];
            to[1] = pair.at[1] * scale.at[row];
          }
        }
      }
      if constexpr (kInRegisters) {
        const BlockTable<T> second(levels_, scale.at[1]);
#pragma unroll
        for (unsigned i = 0; i < kSecondRowWords; ++i) {
          const Words words = load(stage, i / 2, 1);
          second_row_[i] = second.look_up(pick_bytes(words.at[i % 2 * 2], words.at[i % 2 * 2 + 1], bytes_t_));
        }
      }
    }
    __device__ __forceinline__ void round(WgmmaFragments& fragments) const {
#pragma unroll
      for (unsigned word = 0; word < kWords; ++word) {
        std::uint32_t* const to = fragments[word / 2] + word % 2 * 2;
#pragma unroll
        for (unsigned row = 0; row < kRowsByPairs; ++row) {
          const float* const pair = values_ + (row * kWords + word) * 2;
          to[row] = pack_pair<T>(pair[0], pair[1]);
        }
        // The first code of a byte is its high digit.
        if constexpr (kInRegisters) {
          const auto& four = second_row_[word / 2];
          to[1] = in_register(word % 2 == 0 ? four.template pair<1, 0>() : four.template pair<3, 2>());
        }
      }
    }
    __device__ __forceinline__ void wait_for_products() {
      wgmma_wait_for(values_);
      if constexpr (kInRegisters) {
#pragma unroll
        for (auto& four : second_row_) four = {in_register(four.bytes[0]), in_register(four.bytes[1])};
      }
    }

   private:
    using Words = Vector<std::uint32_t, 4>;
    static constexpr bool kInRegisters = decodes_in_registers(Tile::kRows);
    static constexpr unsigned kRowsByPairs = kInRegisters ? 1 : 2, kWords = 8, kSecondRowWords = 4;
    static constexpr int kLevels = 16;

    __device__ Decoder(const WgmmaLane<Tile>& lane, const SharedAddress& codes, const SharedAddress& scales)
        : vectors_{codes.at(vector(lane, 0)).in_register(), codes.at(vector(lane, 1)).in_register()},
          scales_(scales.at(lane.col() * sizeof(float)).in_register()),
          t_(lane.t),
          bytes_t_(lane.t | (lane.t + 4) << 4) {}
    // A stage has the i-th vector of the lane's first row so many bytes behind its codes' beginning.
    __device__ static unsigned vector(const WgmmaLane<Tile>& lane, unsigned i) {
      return lane.col() * kTileRowBytes + (i ^ lane.col() / 4 % 2) * kVectorBytes;
    }
    __device__ __forceinline__ Words load(std::uint32_t stage, unsigned vector, unsigned row) const {
      return load_shared<Words>(vectors_[vector].at(stage + row * kTileRowBytes));
    }
    const SharedAddress vectors_[2], scales_;
    const std::uint32_t t_, bytes_t_;  // the byte that the lane takes of a word, and those that it takes of two
    float levels_[kLevels];
    float values_[kRowsByPairs * kWords * 2];                     // by row and word
    typename BlockTable<T>::Values second_row_[kSecondRowWords];  // of the second row: each of two words
  };
};

// Backward: a column of the result is a column of W, whose rows are the inner dimension. A step has 64 rows of 64
// bytes. A vector of 16 bytes has 32 columns, which a warp has. ldmatrix gives lane (g, t) of it two bytes, four
// columns, of two rows:
//
//   of eight rows of vectors, as it loads them     as lane (g, t) has them, in one register
//   row 2t      bytes 0 1 ... 2g 2g+1 ...          row 2t:     bytes 2g, 2g + 1
//   row 2t + 1  bytes 0 1 ... 2g 2g+1 ...          row 2t + 1: bytes 2g, 2g + 1
//
// With Tile::kSplitsSteps the lane decodes both bytes of half of the rows, and otherwise its warpgroup's byte of all
// rows.
//
// TMA's swizzle of 64 bytes puts the vectors of eight rows, which are loaded at once, into different banks.
struct WgmmaColumns : ByColumns {
  static constexpr int kTileRows = kGemmStep, kTileRowBytes = kTileCols / 2;
  static constexpr Swizzle kSwizzle = Swizzle::bytes_64;

  static constexpr int tile_row(int inner0, int) { return inner0; }
  static constexpr int tile_byte(int, int col0) { return col0 / 2; }
  static constexpr int scale_inner(int i) { return i % kGemmStep; }
  static constexpr int scale_col(int i) { return i / kGemmStep * kGemmStep; }

  // The levels of the lane's first kRowsInRegisters rows come from a table in registers, and the others from the table
  // of pairs.
  template <class T, class Tile>
  class Decoder {
   public:
    __device__ Decoder(const SharedAddress& codes, const SharedAddress& scales, const float* code)
        : Decoder(WgmmaLane<Tile>(), codes, scales, code) {}
    template <class Table>
    __device__ __forceinline__ void decode(std::uint32_t stage, const Table& table) {
#pragma unroll
      for (unsigned first = 0; first < Tile::kInner; first += 4 * kMatrixRows) {
        std::uint32_t words[4];
        ldmatrix_x4_transposed(words, row_.at(stage + first * kTileRowBytes));
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
          const unsigned inner = first + i * kMatrixRows;
          const auto scale = load_shared<Vector<float, 2>>(scales_.at(stage + inner * sizeof(float)));
#pragma unroll
          for (unsigned row = 0; row < 2; ++row) {
            float levels[2 * Tile::kColTiles];
            look_up(words[i], 2 * i + row, table, levels);
#pragma unroll
            for (unsigned col = 0; col < 2 * Tile::kColTiles; ++col) {
              values_[((col / 2 * Tile::kInner + inner) / kMatrixRows * 2 + col % 2) * 2 + row] =
                  levels[col] * scale.at[row];
            }
          }
        }
      }
    }
    __device__ __forceinline__ void round(WgmmaFragments& fragments) const {
#pragma unroll
      for (unsigned i = 0; i < kValues / 2; ++i) {
        fragments[i / 4][i % 4] = pack_pair<T>(values_[2 * i], values_[2 * i + 1]);
      }
    }
    __device__ __forceinline__ void wait_for_products() { wgmma_wait_for(values_); }

   private:
    static constexpr unsigned kMatrixRows = 8, kValues = 32, kRowsInRegisters = rows_in_registers(Tile::kRows);

    __device__ Decoder(const WgmmaLane<Tile>& lane, const SharedAddress& codes, const SharedAddress& scales,
                       const float* code)
        : row_(codes.at(row_of(lane)).in_register()),
          scales_(scales.at((lane.col() / kGemmStep * kGemmStep + lane.inner(0, 0)) * sizeof(float)).in_register()),
          warpgroup_(lane.warpgroup()),
          levels_(code) {}
    // Looks up the lane's columns of the `row`-th of its rows, of which a word has two.
    template <class Table>
    __device__ __forceinline__ void look_up(std::uint32_t word, unsigned row, const Table& table,
                                            float (&levels)[2 * Tile::kColTiles]) const {
      const unsigned first_byte = row % 2 * 2;
      if constexpr (Tile::kSplitsSteps) {
        if (row < kRowsInRegisters) {
          float digit_levels[4];  // the first code of a byte is its high digit
          levels_.look_up(word >> 8 * first_byte, digit_levels);
#pragma unroll
          for (unsigned col = 0; col < 4; ++col) levels[col] = digit_levels[col ^ 1];
          return;
        }
      }
#pragma unroll
      for (unsigned i = 0; i < Tile::kColTiles; ++i) {
        const auto pair = table.pair_of_byte(word, first_byte + (Tile::kSplitsSteps ? i : warpgroup_));
        levels[2 * i] = pair.at[0];
        levels[2 * i + 1] = pair.at[1];
      }
    }
    // A stage has the vector that the lane points the first ldmatrix at so many bytes behind its codes' beginning. It
    // is that of the warpgroup's lane-th row. Rows that are multiples of 8 further on have the same swizzle.
    __device__ static unsigned row_of(const WgmmaLane<Tile>& lane) {
      const unsigned row = lane.first_inner() + lane.lane, vector = lane.col() / (2 * kVectorBytes);
      return row * kTileRowBytes + (vector ^ row / 2 % 4) * kVectorBytes;
    }
    const SharedAddress row_, scales_;
    const std::uint32_t warpgroup_;
    const LevelTable levels_;
    float values_[kValues];  // by tile of columns, pair of rows, column, and row
  };
};

}  // namespace qlora_native::QLN_CUDA
