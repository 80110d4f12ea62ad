// The operands of the tensor-core product (gemm.cuh): how a step of X and of the weight lies in shared memory, and
// which part of it a thread loads.
#pragma once

#include "device/elements.cuh"
#include "device/weight_chunk.cuh"
#include "product/tile.cuh"

namespace qlora_native::QLN_CUDA {

// ---- X, or dY ------------------------------------------------------------------------------------------------------

// A step of each row of X of a tile, as 16-byte vectors. Lanes read the same vector of several rows at once.
// It stands at a different place in each of these rows, so that all of them lie in different banks.
template <class T, class Tile>
struct XStage {
  static constexpr unsigned kVector = kVectorBytes / sizeof(T);
  static constexpr unsigned kVectors = Tile::kStep / kVector, kRowBytes = kVectors * kVectorBytes;
  alignas(kStageAlignment) T at[Tile::kRows * Tile::kStep];

  // Counted in vectors: where a row's vector stands, and which vector of its row stands at a place.
  static constexpr unsigned place(unsigned row, unsigned vector) { return row * kVectors + (vector ^ row % 8); }
  static constexpr unsigned vector_at(unsigned place) { return place % kVectors ^ place / kVectors % 8; }
  // In bytes: where a lane points ldmatrix, which loads both halves of 16 of the inner dimension in 16 rows, in the
  // order that mma takes.
  __device__ static unsigned first_operand(const Lane& lane) {
    return place(lane.warp_row<Tile>() + lane.lane % kMmaRows, lane.lane / kMmaRows) * kVectorBytes;
  }
  // Where the lane points ldmatrix for the k-th 16 of the inner dimension and the i-th 16 rows.
  __device__ __forceinline__ static SharedAddress operand(const SharedAddress& first, unsigned k, unsigned i) {
    return first.xor_swizzled(2 * kVectorBytes * k).at(i * kMmaRows * kRowBytes);
  }
};

// A thread's slice of a tile's rows, step after step: the same 16-byte vector of every 32nd row. `to` is its place in a
// stage, which follows from the thread's number, so that a warp writes adjacent vectors.
template <class T, class Tile>
class XRows {
  using Stage = XStage<T, Tile>;
  static constexpr int kVector = Stage::kVector;
  static constexpr int kRowsAtOnce = kGemmThreads / Stage::kVectors;
  static constexpr int kRowsOfThread = (Tile::kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr std::uint32_t kStrideBytes = kRowsAtOnce * Stage::kRowBytes;

 public:
  // Where in a step the thread's vector begins.
  __device__ static int inner_of(const Lane& lane) { return static_cast<int>(Stage::vector_at(lane.thread)) * kVector; }
  __device__ int inner() const { return static_cast<int>(Stage::vector_at(thread_)) * kVector; }

  // Begins with row `row0` of the matrix, of whose rows `rows` exist, and at `inner0` of the inner dimension.
  __device__ __forceinline__ XRows(const Lane& lane, const ConstMatrix& matrix, std::int64_t row0, int rows,
                                   std::int64_t inner0)
      : thread_(lane.thread), first_(static_cast<const T*>(matrix.data) + row0 * matrix.stride + inner0 + inner()) {
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      // A row beyond the last is loaded as the last one is; its results are not stored.
      const int loaded_row = row(i) < rows ? row(i) : rows - 1;
      vectors_[i] = static_cast<std::uint32_t>(loaded_row) * static_cast<std::uint32_t>(matrix.stride / kVector);
    }
  }
  __device__ __forceinline__ void next_step() { first_ += Tile::kStep; }

  // Lets only rows begin ... end-1 of the tile be loaded; the others become zeros.
  __device__ __forceinline__ void mask_rows(int begin, int end) {
    first_row_ = begin;
    end_row_ = end;
  }

  // Copies rows that are vectors. Where the vector does not exist, or its row is masked, zeros are stored.
  template <bool kMasksRows = false>
  __device__ __forceinline__ void fetch_vectors(const SharedAddress& to, bool exists) const {
    if (Tile::kRows < kRowsAtOnce && row(0) >= Tile::kRows) return;
    const auto* const first = reinterpret_cast<const std::byte*>(first_);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      cp_async_or_zeros(to.at(i * kStrideBytes), first + std::uint64_t{vectors_[i]} * kVectorBytes,
                        exists && (!kMasksRows || is_unmasked(row(i))));
    }
  }
  // Loads other rows element by element. `rows` rows exist, and `step_inner` of the step.
  template <bool kMasksRows = false>
  __device__ __forceinline__ void fetch_elements(const SharedAddress& to, std::int64_t stride, int rows,
                                                 int step_inner) const {
    const int rest = step_inner - inner();
    const T* from = first_ + row(0) * stride;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      if (row(i) >= Tile::kRows) break;
      Vector<T, kVector> values{};
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (j < rest && row(i) < rows && (!kMasksRows || is_unmasked(row(i)))) values.at[j] = from[j];
      }
      store_shared(to.at(i * kStrideBytes), values);
      from += kRowsAtOnce * stride;
    }
  }

 private:
  __device__ bool is_unmasked(int row) const { return row >= first_row_ && row < end_row_; }
  __device__ int row(int i) const { return static_cast<int>(thread_ / Stage::kVectors) + i * kRowsAtOnce; }

  const unsigned thread_;
  const T* first_;                        // in the tile's first row
  std::uint32_t vectors_[kRowsOfThread];  // from there to each of the thread's rows
  int first_row_ = 0, end_row_ = Tile::kRows;
};

// ---- the weight ----------------------------------------------------------------------------------------------------
//
// A thread has chunks of 32 adjacent elements of W, and each chunk becomes four vectors of eight 16-bit elements. Both
// layouts below say where in the step and in the tile the thread's first chunk begins, where its vectors stand, which
// codes each vector holds, and where a lane points ldmatrix. Eight vectors that lanes write at once, or that ldmatrix
// reads at once, always lie in different banks.

constexpr int kChunkBytes = kChunk / 2;
constexpr unsigned kChunkVectors = kChunk / 8;

// Decoded weights lie in lines of 128 bytes, as many as the tile has columns, 256 bytes apart. The 128 bytes before
// each line have room for a row of the table that decodes codes: PairTable wants its rows 256 bytes apart, and 16
// copies of a pair take half of that.
constexpr unsigned kLineBytes = kRowBytes, kLineVectors = kRowBytes / 2 / kVectorBytes;

// Forward: a column of the result is a row of W, which lies along the inner dimension. When it is decoded, it is a line
// of eight vectors, as the rows of X are. The columns of an mma fragment come in pairs that lie
// kLaneCols apart, so vectors change places by the numbers in which these columns differ.
template <class Tile>
struct DecodedRows : ByRows {
  static constexpr unsigned kColThreads = kGemmStep / Tile::kThreadWeights;

  // Where a vector of a column stands, in bytes, as all places of this struct.
  static constexpr unsigned place(unsigned col, unsigned vector) {
    return col * kLineBytes + (vector ^ (col % 2 + col / Tile::kLaneCols % 4 * 2)) * kVectorBytes;
  }

  // The thread's weights begin here. Each eight adjacent threads write vectors that lie in different banks.
  static constexpr unsigned col_of(unsigned thread) {
    constexpr unsigned kPairs = Tile::kLaneCols / 2;
    const unsigned i = thread / kColThreads, pair = i / 8 % kPairs, group = i / 8 / kPairs;
    return group * Tile::kGroupCols + i / 2 % 4 * Tile::kLaneCols + pair * 2 + i % 2;
  }
  static constexpr unsigned inner_of(unsigned thread) { return thread % kColThreads * Tile::kThreadWeights; }
  // The thread's first vector stands here. The places of its other vectors differ from this in some bits, by xor.
  static constexpr unsigned first_place(unsigned thread) { return place(col_of(thread), inner_of(thread) / 8); }
  // Which byte of a chunk's codes becomes word `i` of a vector.
  static constexpr unsigned byte_of_chunk(unsigned vector, unsigned i) { return 4 * vector + i; }

  // Where a lane points ldmatrix at first; it loads both halves of 16 of the inner dimension in two fragments.
  __device__ static unsigned first_operand(const Lane& lane) {
    const unsigned row = lane.lane % 8, half = lane.lane / 8 % 2, other = lane.lane / 16;
    const unsigned col = row / 2 * Tile::kLaneCols + row % 2 + 2 * other;
    return place(lane.warp_col<Tile>() + col, half);
  }
  // Where the lane points ldmatrix for the k-th 16 of the inner dimension and the p-th two fragments.
  __device__ __forceinline__ static SharedAddress operands(const SharedAddress& first, unsigned k, unsigned p) {
    const unsigned col = 2 * p / Tile::kGroupFragments * Tile::kGroupCols + 2 * p % Tile::kGroupFragments * 2;
    return first.xor_swizzled(2 * kVectorBytes * k).at(col * kLineBytes);
  }
  __device__ __forceinline__ static void load(std::uint32_t (&b)[4], const SharedAddress& from) {
    ldmatrix_x4(b, from);
  }
};

// Backward: a column of the result is a column of W, whose rows are the inner dimension. When a row is decoded, it is
// one or more lines of vectors. A vector has the eight columns of a fragment, and ldmatrix transposes it. A chunk has
// the columns of one group of fragments, or of two, and its pairs are distributed to the vectors of these fragments.
template <class Tile>
struct DecodedColumns : ByColumns {
  static constexpr unsigned kRowVectors = Tile::kCols / kMmaCols;
  static constexpr unsigned kRowThreads = Tile::kCols / Tile::kThreadWeights;
  static constexpr unsigned kLineThreads = kLineVectors * kMmaCols / Tile::kThreadWeights;
  static constexpr unsigned kRowLines = kRowVectors / kLineVectors;

  static constexpr unsigned place(unsigned inner, unsigned vector) {
    return (inner * kRowLines + vector / kLineVectors) * kLineBytes +
           (vector % kLineVectors ^ inner % 8) * kVectorBytes;
  }

  // The thread's weights begin here. kLineThreads adjacent threads fill a line, and eight threads fill the same
  // line of 8 / kLineThreads rows:
  //
  //   tile of 128 columns    columns 0 ... 63    columns 64 ... 127
  //   row 0                  threads 0, 1        threads 8, 9
  //   row 1                  threads 2, 3        threads 10, 11
  //   row 3                  threads 6, 7        threads 14, 15
  //   row 4                  threads 16, 17      threads 24, 25
  static constexpr unsigned col_of(unsigned thread) {
    return (thread / 8 % (kRowThreads / kLineThreads) * kLineThreads + thread % kLineThreads) * Tile::kThreadWeights;
  }
  static constexpr unsigned inner_of(unsigned thread) {
    constexpr unsigned kRows = 8 / kLineThreads;
    return thread / 8 / (kRowThreads / kLineThreads) * kRows + thread / kLineThreads % kRows;
  }
  static constexpr unsigned first_place(unsigned thread) { return place(inner_of(thread), col_of(thread) / kMmaCols); }
  static constexpr unsigned byte_of_chunk(unsigned vector, unsigned i) {
    return vector / Tile::kGroupFragments * Tile::kGroupCols / 2 + Tile::kGroupFragments * i +
           vector % Tile::kGroupFragments;
  }

  __device__ static unsigned first_operand(const Lane& lane) {
    const unsigned row = lane.lane % 8, half = lane.lane / 8 % 2, other = lane.lane / 16;
    return place(8 * half + row, lane.warp_col<Tile>() / kMmaCols + other);
  }
  __device__ __forceinline__ static SharedAddress operands(const SharedAddress& first, unsigned k, unsigned p) {
    return first.xor_swizzled(2 * kVectorBytes * p).at(k * kMmaInner * kRowLines * kLineBytes);
  }
  __device__ __forceinline__ static void load(std::uint32_t (&b)[4], const SharedAddress& from) {
    ldmatrix_x4_transposed(b, from);
  }
};

// ---- decoding -------------------------------------------------------------------------------------------------------

// The codes of a step that a thread has copied, and decodes.
template <class Tile>
struct GemmCodes {
  Vector<std::uint32_t, kCodeWords> chunks[Tile::kThreadChunks];
};
template <class Tile>
__device__ __forceinline__ GemmCodes<Tile> load_codes(const SharedAddress& from) {
  GemmCodes<Tile> codes;
#pragma unroll
  for (int i = 0; i < Tile::kThreadChunks; ++i) {
    codes.chunks[i] = load_shared<Vector<std::uint32_t, kCodeWords>>(from.at(i * kGemmThreads * kChunkBytes));
  }
  return codes;
}
// Decodes one vector of each of the thread's chunks. `to`: where the first vector of the first chunk stands.
template <class T, class Weights, class Table, class Tile, class Scale>
__device__ __forceinline__ void decode(const Table& table, const SharedAddress& to, const GemmCodes<Tile>& codes,
                                       const Scale& scale, unsigned vector) {
#pragma unroll
  for (unsigned i = 0; i < Tile::kThreadChunks; ++i) {
    Vec8 values;
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      const unsigned byte = Weights::byte_of_chunk(vector, j);
      const auto pair = table.pair_of_byte(codes.chunks[i].at[byte / 4], byte % 4);
      const int e = static_cast<int>(2 * byte);
      values.at[j] = pack_pair<T>(pair.at[0] * scale.at(e), pair.at[1] * scale.at(e + 1));
    }
    store_shared(to.xor_swizzled((i * kChunkVectors + vector) * kVectorBytes), values);
  }
}

}  // namespace qlora_native::QLN_CUDA
