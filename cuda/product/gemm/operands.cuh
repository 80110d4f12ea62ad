// The operands of the tensor-core product (gemm.cuh): how a step of each lies in shared memory, and which part of it a
// thread brings. First the left operand's rows, then the weight.
#pragma once

#include "device/elements.cuh"
#include "device/weight_chunk.cuh"
#include "product/gemm/tile.cuh"

namespace qlora_native::QLN_CUDA {

// ---- the left operand
// ------------------------------------------------------------------------------------------------

// A step of each row of a tile's left operand, as 16-byte vectors. Lanes read the same vector of several rows at once:
// it stands at another place in each, so that all lie in different banks.
template <class T, class Tile>
struct LeftStage {
  static constexpr unsigned kVector = kVectorBytes / sizeof(T);
  static constexpr unsigned kVectors = Tile::kStep / kVector, kRowBytes = kVectors * kVectorBytes;
  alignas(kStageAlignment) T at[Tile::kRows * Tile::kStep];

  // In vectors: of a row's, and which of a row's stands at a place.
  static constexpr unsigned place(unsigned row, unsigned vector) { return row * kVectors + (vector ^ row % 8); }
  static constexpr unsigned vector_at(unsigned place) { return place % kVectors ^ place / kVectors % 8; }
  // In bytes, of what a lane points ldmatrix at: of 16 rows both halves of 16 of the inner dimension, as mma takes
  // them.
  __device__ static unsigned first_of(const Lane& lane) {
    return place(lane.warp_row<Tile>() + lane.lane % kMmaRows, lane.lane / kMmaRows) * kVectorBytes;
  }
  // The k-th sixteen of the inner dimension, of the i-th 16 rows.
  __device__ __forceinline__ static SharedPlace operand(const SharedPlace& first, unsigned k, unsigned i) {
    return first.flipped(2 * kVectorBytes * k).at(i * kMmaRows * kRowBytes);
  }
};

// A thread's share of a tile's rows, step after step: the same 16-byte vector of every 32nd row. `to`: its place in a
// stage, which is that of its number, so that a warp writes neighbours.
template <class T, class Tile>
class LeftRows {
  using Stage = LeftStage<T, Tile>;
  static constexpr int kVector = Stage::kVector;
  static constexpr int kRowsAtOnce = kGemmThreads / Stage::kVectors;
  static constexpr int kRowsOfThread = (Tile::kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr std::uint32_t kBytesApart = kRowsAtOnce * Stage::kRowBytes;

 public:
  // Of the thread's vector, in a step.
  __device__ static int inner_of(const Lane& lane) { return static_cast<int>(Stage::vector_at(lane.thread)) * kVector; }
  __device__ int inner() const { return static_cast<int>(Stage::vector_at(thread_)) * kVector; }

  // From row `row0` of the matrix, of which `rows` are there, and from `inner0` of the inner dimension.
  __device__ __forceinline__ LeftRows(const Lane& lane, const ConstMatrix& matrix, std::int64_t row0, int rows,
                                      std::int64_t inner0)
      : thread_(lane.thread), first_(static_cast<const T*>(matrix.data) + row0 * matrix.stride + inner0 + inner()) {
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      // The last row for those beyond, whose results are not stored.
      const int there = row(i) < rows ? row(i) : rows - 1;
      vectors_[i] = static_cast<std::uint32_t>(there) * static_cast<std::uint32_t>(matrix.stride / kVector);
    }
  }
  __device__ __forceinline__ void next_step() { first_ += Tile::kStep; }

  // Rows begin ... end-1 of the tile.
  __device__ __forceinline__ void keep(int begin, int end) {
    first_kept_ = begin;
    end_of_kept_ = end;
  }

  // Of rows that are vectors. Zeros, if the thread's is not there, or if it is in none of the rows to be kept.
  template <bool kKeepsSome = false>
  __device__ __forceinline__ void fetch_vectors(const SharedPlace& to, bool there) const {
    if (Tile::kRows < kRowsAtOnce && row(0) >= Tile::kRows) return;
    const auto* const first = reinterpret_cast<const std::byte*>(first_);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      cp_async_or_zeros(to.at(i * kBytesApart), first + std::uint64_t{vectors_[i]} * kVectorBytes,
                        there && (!kKeepsSome || is_kept(row(i))));
    }
  }
  // Of others, element by element: of `rows` rows of which `inner_there` of the step are there.
  template <bool kKeepsSome = false>
  __device__ __forceinline__ void fetch_elements(const SharedPlace& to, std::int64_t stride, int rows,
                                                 int inner_there) const {
    const int rest = inner_there - inner();
    const T* from = first_ + row(0) * stride;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      if (row(i) >= Tile::kRows) break;
      Vector<T, kVector> values{};
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (j < rest && row(i) < rows && (!kKeepsSome || is_kept(row(i)))) values.at[j] = from[j];
      }
      store_shared(to.at(i * kBytesApart), values);
      from += kRowsAtOnce * stride;
    }
  }

 private:
  __device__ bool is_kept(int row) const { return row >= first_kept_ && row < end_of_kept_; }
  __device__ int row(int i) const { return static_cast<int>(thread_ / Stage::kVectors) + i * kRowsAtOnce; }

  const unsigned thread_;
  const T* first_;                        // in the tile's first row
  std::uint32_t vectors_[kRowsOfThread];  // from there to each of the thread's
  int first_kept_ = 0, end_of_kept_ = Tile::kRows;
};

// ---- the weight
// ------------------------------------------------------------------------------------------------------
//
// A thread has pieces of 32 neighbours of W, each of which becomes four vectors of eight 16-bit elements. Both layouts
// give: where in the step and in the tile the thread's first piece begins; where its vectors stand and which codes each
// holds; and where a lane points ldmatrix at. All eight vectors that lanes write at once, or ldmatrix reads at once,
// lie in different banks.

constexpr int kChunkBytes = kChunk / 2;
constexpr unsigned kPieceVectors = kChunk / 8;

// Decoded weights lie in lines of 128 bytes, as many as the tile has columns. Before each is room for a row of the
// table by which codes are decoded: PairTable wants its rows 256 bytes apart, and half of that is enough for 16 copies.
constexpr unsigned kLineBytes = kRowBytes, kLineVectors = kRowBytes / 2 / kVectorBytes;

// Forward: a column of the result is a row of W, which lies along the inner dimension. Decoded, each is a line of eight
// vectors, as those of the left operand. A fragment of mma has columns in pairs, kLaneCols apart: vectors change places
// by what differs among these.
template <class Tile>
struct DecodedRows {
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
struct DecodedColumns {
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

}  // namespace qlora_native::QLN_CUDA
