// The weight's side of the tensor-core product (gemm.cuh): which of a step's codes a thread brings and decodes, and how
// the decoded step lies in shared memory. The columns of the result are rows of W, or columns of W.
//
// A thread has pieces of 32 neighbours of W, each of which becomes four vectors of eight 16-bit elements. Both layouts
// give: where in the step and in the tile the thread's first piece begins; where its vectors stand and which codes each
// holds; and where a lane points ldmatrix at. All eight vectors that lanes write at once, or ldmatrix reads at once,
// lie in different banks.
#pragma once

#include "device/elements.cuh"
#include "device/gemm_tile.cuh"
#include "device/weight_chunk.cuh"

namespace qlora_native::QLN_CUDA {

constexpr int kChunkBytes = kGemmChunk / 2;
constexpr unsigned kPieceVectors = kGemmChunk / 8;

// Decoded weights lie in lines of 128 bytes, as many as the tile has columns. Before each is room for a row of the
// table by which codes are decoded: PairTable wants its rows 256 bytes apart, and half of that is enough for 16 copies.
constexpr unsigned kLineBytes = kRowBytes, kLineVectors = kRowBytes / 2 / kVectorBytes;

// Forward: a column of the result is a row of W, which lies along the inner dimension. Decoded, each is a line of eight
// vectors, as those of the left operand. A fragment of mma has columns in pairs, kLaneCols apart: vectors change places
// by what differs among these.
template <class Tile>
struct RowsOfWeight {
  static constexpr bool kForward = true;
  static constexpr unsigned kColThreads = kGemmStep / Tile::kThreadWeights;

  // In bytes, as all places here.
  static constexpr unsigned place(unsigned col, unsigned vector) {
    return col * kLineBytes + (vector ^ (col % 2 + col / Tile::kLaneCols % 4 * 2)) * kVectorBytes;
  }

  // Where what the thread has begins. Eight threads have columns whose vectors do not meet.
  static constexpr unsigned col_of(unsigned thread) {
    constexpr unsigned kPairs = Tile::kLaneCols / 2;
    const unsigned i = thread / kColThreads, pair = i / 8 % kPairs, group = i / 8 / kPairs;
    return group * Tile::kGroupCols + i / 2 % 4 * Tile::kLaneCols + pair * 2 + i % 2;
  }
  static constexpr unsigned inner_of(unsigned thread) { return thread % kColThreads * Tile::kThreadWeights; }
  // Of its first vector. Its others have bits flipped.
  static constexpr unsigned place_of(unsigned thread) { return place(col_of(thread), inner_of(thread) / 8); }
  // The byte of a piece's codes that is word `i` of its vector.
  static constexpr unsigned byte_of_piece(unsigned vector, unsigned i) { return 4 * vector + i; }

  static QLN_HOST_DEVICE std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return col * w.K + inner;
  }
  static QLN_HOST_DEVICE std::int64_t step(const QuantizedWeightView&) { return kGemmStep; }

  // What a lane points ldmatrix at first: of two fragments both halves of 16 of the inner dimension.
  __device__ static unsigned first_of(const Lane& lane) {
    const unsigned row = lane.lane % 8, half = lane.lane / 8 % 2, other = lane.lane / 16;
    const unsigned col = row / 2 * Tile::kLaneCols + row % 2 + 2 * other;
    return place(lane.warp_col<Tile>() + col, half);
  }
  // The k-th sixteen of the inner dimension, of the p-th two fragments.
  __device__ __forceinline__ static SharedPlace operands(const SharedPlace& first, unsigned k, unsigned p) {
    const unsigned col = 2 * p / Tile::kGroup * Tile::kGroupCols + 2 * p % Tile::kGroup * 2;
    return first.flipped(2 * kVectorBytes * k).at(col * kLineBytes);
  }
  __device__ __forceinline__ static void load(std::uint32_t (&b)[4], const SharedPlace& from) { ldmatrix_x4(b, from); }
};

// Backward: a column of the result is a column of W, whose rows are the inner dimension. Decoded, a row is lines of
// vectors, one for each fragment's eight columns, which ldmatrix transposes. A piece is one group of fragments, or two,
// and its pairs of neighbours are dealt out to their vectors.
template <class Tile>
struct ColumnsOfWeight {
  static constexpr bool kForward = false;
  static constexpr unsigned kRowVectors = Tile::kCols / kMmaCols;
  static constexpr unsigned kRowThreads = Tile::kCols / Tile::kThreadWeights;
  static constexpr unsigned kLineThreads = kLineVectors * kMmaCols / Tile::kThreadWeights;
  static constexpr unsigned kRowLines = kRowVectors / kLineVectors;

  static constexpr unsigned place(unsigned inner, unsigned vector) {
    return (inner * kRowLines + vector / kLineVectors) * kLineBytes +
           (vector % kLineVectors ^ inner % 8) * kVectorBytes;
  }

  // Of eight threads those whose vectors fill a line have it together; the others have one of another row.
  static constexpr unsigned col_of(unsigned thread) {
    return (thread / 8 % (kRowThreads / kLineThreads) * kLineThreads + thread % kLineThreads) * Tile::kThreadWeights;
  }
  static constexpr unsigned inner_of(unsigned thread) {
    constexpr unsigned kRows = 8 / kLineThreads;
    return thread / 8 / (kRowThreads / kLineThreads) * kRows + thread / kLineThreads % kRows;
  }
  static constexpr unsigned place_of(unsigned thread) { return place(inner_of(thread), col_of(thread) / kMmaCols); }
  static constexpr unsigned byte_of_piece(unsigned vector, unsigned i) {
    return vector / Tile::kGroup * Tile::kGroupCols / 2 + Tile::kGroup * i + vector % Tile::kGroup;
  }

  static QLN_HOST_DEVICE std::int64_t element(const QuantizedWeightView& w, std::int64_t inner, std::int64_t col) {
    return inner * w.K + col;
  }
  static QLN_HOST_DEVICE std::int64_t step(const QuantizedWeightView& w) { return kGemmStep * w.K; }

  __device__ static unsigned first_of(const Lane& lane) {
    const unsigned row = lane.lane % 8, half = lane.lane / 8 % 2, other = lane.lane / 16;
    return place(8 * half + row, lane.warp_col<Tile>() / kMmaCols + other);
  }
  __device__ __forceinline__ static SharedPlace operands(const SharedPlace& first, unsigned k, unsigned p) {
    return first.flipped(2 * kVectorBytes * p).at(k * kMmaInner * kRowLines * kLineBytes);
  }
  __device__ __forceinline__ static void load(std::uint32_t (&b)[4], const SharedPlace& from) {
    ldmatrix_x4_transposed(b, from);
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
