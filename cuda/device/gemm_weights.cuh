// The weight's side of the tensor-core product (gemm.cuh): how the codes and scales of a step lie in shared memory, and
// how a lane decodes those that mma takes from it. The columns of the result are rows of W, or columns of W.
//
// Both give: of the piece or the scale with a number, where it begins in the step and in the tile; a lane's own places
// in the stage; and Registers, what a lane holds while it decodes. Pieces lie in the stage in the order of their
// numbers, so a thread writes where it writes the left operand, a number of bytes further on.
#pragma once

#include "device/gemm_tile.cuh"
#include "device/weight_chunk.cuh"

namespace qlora_native::QLN_CUDA {

constexpr int kChunkBytes = kGemmChunk / 2;

// Forward: a column of the result is a row of W, which lies along the inner dimension. A step has 32 bytes of it, of
// which lane t takes eight: the codes of its 16t ... 16t + 15. Lanes read the j-th of their columns at once, so those
// of a warp's eight g lie together.
template <class Tile>
struct RowsOfWeight {
  static constexpr bool kForward = true;
  static constexpr bool kWholeSteps = Tile::kScaled == kGemmStep;  // of the inner dimension there are no others
  using Scale = ChunkScale<Tile::kAligned>;
  using Table = PairTable<Tile::kCopies>;
  static constexpr unsigned kColBytes = kGemmStep / 2, kColPieces = kGemmStep / kGemmChunk;
  static constexpr unsigned kColScales = kGemmStep / Tile::kScaled;
  static constexpr unsigned kScalesApart = Tile::kCols + 8;  // of a column: two such lie in different banks
  static constexpr unsigned kCodeBytes = Tile::kCols * kColBytes;
  static constexpr unsigned kScales = (kColScales - 1) * kScalesApart + Tile::kCols;

  __device__ static unsigned col_of_piece(unsigned piece) {
    const unsigned place = piece / kColPieces, of_warp = place % Tile::kWarpCols;
    return place - of_warp + of_warp % kMmaCols * Tile::kLaneCols + of_warp / kMmaCols;
  }
  __device__ static unsigned inner_of_piece(unsigned piece) { return piece % kColPieces * kGemmChunk; }
  __device__ static unsigned col_of_scale(unsigned i) { return i / kColScales; }
  __device__ static unsigned inner_of_scale(unsigned i) { return i % kColScales * Tile::kScaled; }
  __device__ static unsigned place_of_scale(unsigned i) { return i % kColScales * kScalesApart + i / kColScales; }
  __device__ static std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return col * w.K + inner;
  }
  static QLN_HOST_DEVICE std::int64_t step(const QuantizedWeightView&) { return kGemmStep; }
  // Between the pieces of a thread.
  static std::int64_t apart(const QuantizedWeightView& w) { return kGemmThreads / kColPieces * w.K; }

  __device__ static unsigned codes_of(const Lane& lane) {
    return (lane.warp * Tile::kWarpCols + lane.g) * kColBytes + lane.t * kLaneInner / 2;
  }
  __device__ static unsigned scales_of(const Lane& lane) {
    return lane.t * kLaneInner / Tile::kScaled * kScalesApart + lane.col<Tile>();
  }
  // Which of those codes that share a scale a lane's first is.
  __device__ static unsigned first_of_scaled(const Lane& lane) { return lane.t * kLaneInner % Tile::kScaled; }

  struct Registers {
    Vector<std::uint32_t, 2> words[Tile::kLaneCols];
    Scale scales[Tile::kLaneCols];

    __device__ __forceinline__ void load(const SharedPlace& codes, const SharedPlace& from, unsigned half) {
      if (half != 0) return;
#pragma unroll
      for (int j = 0; j < Tile::kLaneCols; ++j) {
        words[j] = load_shared<Vector<std::uint32_t, 2>>(codes.at(j * kMmaCols * kColBytes));
      }
      load_scales(scales, from);
    }
    // The operand of the s-th mma of a half.
    template <class T>
    __device__ __forceinline__ void decode(std::uint32_t (&a)[Tile::kFragments][4], int half, int s, const Table& table,
                                           unsigned first_of_scaled) const {
#pragma unroll
      for (int j = 0; j < Tile::kLaneCols; ++j) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const unsigned byte = 2 * s + upper, i = first_of_scaled + 8 * half + 2 * byte;
          const auto pair = table.of_byte(words[j].at[half], byte);
          a[j / 2][j % 2 + 2 * upper] = pack_pair<T>(pair.at[0] * scales[j].at(i), pair.at[1] * scales[j].at(i + 1));
        }
      }
    }
  };
};

// Backward: a column of the result is a column of W, whose rows are the inner dimension. A byte of codes holds two
// columns, of which mma wants pairs along the inner dimension: a lane joins those of two rows of W. A step is 64 rows:
//
//   row  0   | 0 | 1 | 2 | 3 | ...      of 16 bytes each; lanes of equal g read rows 16t + j, of each the same piece:
//   row 16   | 1 | 0 | 3 | 2 | ...      these four lie together, their pieces in different banks
//   row 32   | 2 | 3 | 0 | 1 | ...
//   row 48   | 3 | 2 | 1 | 0 | ...
//   row  1   | 0 | 1 | 2 | 3 | ...
template <class Tile>
struct ColumnsOfWeight {
  static constexpr bool kForward = false;
  static constexpr bool kWholeSteps = false;
  using Scale = ChunkScale<Tile::kAligned>;
  using Table = PairTable<Tile::kCopies>;
  static constexpr unsigned kRowBytes = Tile::kCols / 2, kRowPieces = Tile::kCols / kGemmChunk;
  static constexpr unsigned kRowScales = Tile::kCols / Tile::kScaled;
  static constexpr unsigned kScalesApart = kGemmStep + kGemmStep / kLaneInner * 4;
  static constexpr unsigned kCodeBytes = kGemmStep * kRowBytes;
  static constexpr unsigned kScales = kRowScales * kScalesApart;

  __device__ static unsigned col_of_piece(unsigned piece) {
    return (piece % kRowPieces ^ piece / kRowPieces % 4) * kGemmChunk;
  }
  __device__ static unsigned inner_of_piece(unsigned piece) {
    const unsigned place = piece / kRowPieces;
    return place % 4 * kLaneInner + place / 4;
  }
  __device__ static unsigned col_of_scale(unsigned i) { return i % kRowScales * Tile::kScaled; }
  __device__ static unsigned inner_of_scale(unsigned i) { return i / kRowScales; }
  __device__ static unsigned place_of_scale(unsigned i) { return scales_of_row(i % kRowScales, i / kRowScales); }
  __device__ static std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return inner * w.K + col;
  }
  static QLN_HOST_DEVICE std::int64_t step(const QuantizedWeightView& w) { return kGemmStep * w.K; }
  static std::int64_t apart(const QuantizedWeightView& w) { return kGemmThreads / kRowPieces / 4 * w.K; }

  __device__ static unsigned codes_of(const Lane& lane) {
    const unsigned col = lane.col<Tile>();
    return lane.t * kRowBytes + (col / kGemmChunk ^ lane.t) * kChunkBytes + col % kGemmChunk / 2;
  }
  __device__ static unsigned scales_of(const Lane& lane) {
    return scales_of_row(lane.col<Tile>() / Tile::kScaled, lane.t * kLaneInner);
  }
  __device__ static unsigned first_of_scaled(const Lane& lane) { return lane.col<Tile>() % Tile::kScaled; }

  // Of one half of a step: from each of eight rows the codes of the lane's columns.
  struct Registers {
    static constexpr int kHalf = kLaneInner / 2;
    std::uint32_t codes[kHalf];
    Scale scales[kHalf];

    __device__ __forceinline__ void load(const SharedPlace& from, const SharedPlace& scales_from, unsigned half) {
      using Codes = std::conditional_t<Tile::kLaneCols == 2, std::uint8_t, std::uint16_t>;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) codes[i] = load_shared<Codes>(from.at((kHalf * half + i) * 4 * kRowBytes));
      load_scales(scales, scales_from.at(kHalf * half * static_cast<unsigned>(sizeof(Scale))));
    }
    template <class T>
    __device__ __forceinline__ void decode(std::uint32_t (&a)[Tile::kFragments][4], int, int s, const Table& table,
                                           unsigned first_of_scaled) const {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int row = 4 * s + 2 * upper;
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) {
          const auto first = table.of_byte(codes[row], f), second = table.of_byte(codes[row + 1], f);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const unsigned i = first_of_scaled + 2 * f + h;
            a[f][h + 2 * upper] = pack_pair<T>(first.at[h] * scales[row].at(i), second.at[h] * scales[row + 1].at(i));
          }
        }
      }
    }
  };

 private:
  // Those of a lane's 16 rows are neighbours; behind them is room for one vector, so that four lanes' differ in banks.
  __device__ static unsigned scales_of_row(unsigned i, unsigned row) {
    return i * kScalesApart + row + row / kLaneInner * 4;
  }
};

struct WeightRowsOfTile {
  template <class Tile>
  using Of = RowsOfWeight<Tile>;
};
struct WeightColumnsOfTile {
  template <class Tile>
  using Of = ColumnsOfWeight<Tile>;
};

}  // namespace qlora_native::QLN_CUDA
