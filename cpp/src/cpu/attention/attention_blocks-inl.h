// attention.h, for 64 queries and up to 128 keys, a round, at a time. Keys are rows here and queries are columns, so
// that a query has a lane of its own, and no sum over its keys is one of lanes:
//
//   forward    S^T = K Q^T    P^T = e^(s S^T - m)      O^T = O^T e^(m' - m) + V^T P^T     m: the largest score so far
//   backward   S^T = K Q^T    P^T = e^(s S^T - lse)    dP^T = V dO^T                      delta: the sum of dO o O
//              dS^T = P^T o (dP^T - delta)
//              dV += P^T dO   dK += dS^T Q             dQ^T += K^T dS^T
//
// Each product takes its first operand as packed rows and its second one as chunks of 64 columns
// (product_nn_layout-inl.h), so a matrix is packed in up to four forms:
//
//   rows                   [row][unit of columns]              first operands: K, V
//   rows of the transpose  [column][unit of rows]              K^T, V^T
//   columns                [chunk][unit of rows][64 columns]   second operands: Q, dO
//   transposed             [unit of columns][64 rows]          Q^T, dO^T
//
// P^T and dS^T are squares, [key][64 queries] in fp32, until they are packed as rows or as columns. Accumulators are
// [chunk][row][64 columns]. What adds to one comes in the same order, whatever the tasks and the threads are.
#pragma once

#include <limits>

#include "cpu/isa/exp-inl.h"
#include "cpu/product/job_operands-inl.h"
#include "cpu/product/product_nn-inl.h"
#include "cpu/product/product_nt-inl.h"
#include "qlora_native/attention.h"

namespace qlora_native::QLN_ISA {
namespace {

// Gives out memory, one array after another, each a multiple of a vector.
class BumpAllocator {
 public:
  explicit BumpAllocator(float* memory) : next_(memory) {}
  float* allocate(std::int64_t floats) {
    float* const part = next_;
    next_ += floats;
    return part;
  }

 private:
  float* next_;
};

// What forward and backward do with blocks.
template <class Dot>
class AttentionBlocks {
 protected:
  explicit AttentionBlocks(const AttentionInputs& in) : in_(in) {}

  using Nn = ProductNn<Dot>;
  using Nt = ProductNt<Dot>;
  using Layout = LayoutNn<Dot>;
  using Tiles = typename Nn::Tiles;
  using Rows = DenseRows<Dot, true>;
  static constexpr DType kType = Dot::kActivation;
  static constexpr std::int64_t kBlock = kChunk;    // queries, and keys
  static constexpr std::int64_t kRoundBlocks = 2;   // blocks of keys in a round, at most
  static constexpr int kVectors = kChunk / kLanes;  // of the queries of a block
  static constexpr std::int64_t kFewQueries = 16;
  static constexpr int kFewVectors = kFewQueries / kLanes;
  static constexpr int kUnitRows = Dot::kElementsPerUnit;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  std::int64_t query_blocks() const { return ceil_div(in_.q.rows, kBlock); }
  std::int64_t key_blocks() const { return ceil_div(in_.k.rows, kBlock); }
  std::int64_t group() const { return in_.q.heads / in_.k.heads; }  // heads of q that share one of k
  std::int64_t chunks() const { return ceil_div(in_.head_dim, kChunk); }
  std::int64_t inner_units() const { return Layout::whole_steps(Layout::units_of(in_.head_dim)); }

  // Floats of accumulators, and of a matrix of so many blocks of rows in its forms.
  std::int64_t accumulator_floats() const { return chunks() * kBlock * kChunk; }
  std::int64_t rows_floats(std::int64_t blocks) const { return blocks * kBlock * rows_stride(); }
  std::int64_t transpose_floats() const { return chunks() * kChunk * kRoundStride; }
  std::int64_t columns_floats(std::int64_t blocks) const { return chunks() * blocks * kBlockUnits * kChunk; }
  std::int64_t transposed_floats() const { return inner_units() * kChunk; }
  static constexpr std::int64_t kBlockUnits = kBlock / kUnitRows;  // units of 64 rows
  static constexpr std::int64_t kSquareFloats = kRoundBlocks * kBlock * kChunk;
  // From one packed row to the next: of rows, of a round's rows of the transpose, and of a packed square's rows.
  std::int64_t rows_stride() const { return Layout::packed_stride(Layout::units_of(in_.head_dim)); }
  static constexpr std::int64_t kRoundStride = kRoundBlocks * kBlockUnits + kLanes;
  static constexpr std::int64_t kSquareStride = kBlockUnits + kLanes;
  // Floats of a square that is packed as rows, and as columns.
  static constexpr std::int64_t kSquareRowsFloats = kRoundBlocks * kBlock * kSquareStride;
  static constexpr std::int64_t kSquareColumnsFloats = kRoundBlocks * kBlockUnits * kChunk;

  // The rows of some blocks.
  template <class Pointer>
  BasicMatrix<Pointer> block_of(const BasicHeads<Pointer>& x, std::int64_t b, std::int64_t h, std::int64_t block,
                                std::int64_t blocks = 1) const {
    const std::int64_t row = block * kBlock;
    return {elements_at(x.data, kType, b * x.batch_stride + h * x.head_stride + row * x.row_stride), kType,
            smaller(blocks * kBlock, x.rows - row), in_.head_dim, x.row_stride};
  }

  // ---- the four forms, with zeros in rows that x does not have ----

  void pack_rows(const ConstMatrix& x, std::int64_t blocks, float* out) const {
    Layout::pack(x, {0, blocks * kBlock}, out);
  }
  void pack_columns(const ConstMatrix& x, std::int64_t blocks, float* out) const {
    decode_panel(Rows(x), typename Layout::WholePanel{{0, blocks * kBlockUnits}, {0, chunks()}, out});
  }
  void pack_transposed(const ConstMatrix& x, float* out) const {
    Nt::pack_strip(Rows(x), 0, kVectors, {0, chunks()}, out);
  }
  // `columns` is room for that form of x.
  void pack_rows_of_transpose(const ConstMatrix& x, std::int64_t blocks, float* columns, float* out) const {
    pack_columns(x, blocks, columns);
    Layout::transpose_panel(columns, blocks * kBlockUnits, chunks(), out, kRoundStride);
  }
  static void store_chunk(float* out, const typename Dot::Chunk& chunk) {
    for (int i = 0; i < Dot::kVectors; ++i) store(out + i * kLanes, chunk.v[i]);
  }

  // ---- products ----

  // rows . transposed: a square of `count` rows, or so many vectors of each.
  void scores(Tiles& tiles, const float* rows, std::int64_t count, const float* transposed, float* square,
              int vectors = kVectors) const {
    Nn::multiply_rows(tiles, rows, rows_stride(), count, transposed, inner_units(), vectors, square, false);
  }
  // accumulators += rows of the transpose . a square that is packed as columns, over some blocks of keys.
  void add_transposed_product(Tiles& tiles, const float* rows, const float* square, std::int64_t blocks,
                              float* accumulators, int vectors = kVectors) const {
    Nn::multiply_rows(tiles, rows, kRoundStride, in_.head_dim, square, blocks * kBlockUnits, vectors, accumulators,
                      true);
  }
  // accumulators += a square that is packed as `count` rows . columns, where chunks of accumulators lie `stride` apart.
  void add_product(Tiles& tiles, const float* square, std::int64_t count, const float* columns, float* accumulators,
                   std::int64_t stride) const {
    for (std::int64_t c = 0; c < chunks(); ++c) {
      const auto vectors = static_cast<int>(ceil_div(smaller<std::int64_t>(kChunk, in_.head_dim - c * kChunk), kLanes));
      Nn::multiply_rows(tiles, square, kSquareStride, count, columns + c * kBlockUnits * kChunk, kBlockUnits, vectors,
                        accumulators + c * stride, true);
    }
  }

  // ---- masks ----

  struct KeyRange {
    std::int32_t begin, end;
  };
  // The keys that each query of a block sees, and the blocks that contain them.
  struct BlockMask {
    KeyRange rows[kBlock];
    std::int64_t count;  // of queries
    Range blocks;
  };
  BlockMask mask_of(std::int64_t b, std::int64_t block) const {
    BlockMask mask;
    mask.count = smaller(kBlock, in_.q.rows - block * kBlock);
    std::int64_t begin = in_.k.rows, end = 0;
    for (std::int64_t i = 0; i < mask.count; ++i) {
      KeyRange& one = mask.rows[i] = {0, static_cast<std::int32_t>(in_.k.rows)};
      if (in_.key_ranges != nullptr) {
        const std::int32_t* range = in_.key_ranges + b * in_.key_ranges_stride + 2 * (block * kBlock + i);
        one = {range[0], range[1]};
      }
      if (one.begin >= one.end) continue;
      begin = smaller<std::int64_t>(begin, one.begin);
      end = larger<std::int64_t>(end, one.end);
    }
    mask.blocks = {begin / kBlock, begin < end ? ceil_div(end, kBlock) : 0};
    return mask;
  }
  // Calls f(blocks) for each round of these blocks of keys.
  template <class F>
  static void each_round(Range blocks, const F& f) {
    for (std::int64_t j = blocks.begin; j < blocks.end; j += kRoundBlocks)
      f(Range{j, smaller(j + kRoundBlocks, blocks.end)});
  }
  // Sets the scores of keys that a query does not see to -inf.
  static void apply_mask(const BlockMask& mask, Range blocks, float* square) {
    const std::int64_t first = blocks.begin * kBlock, rows = blocks.count() * kBlock;
    for (std::int64_t i = 0; i < mask.count; ++i) {
      const std::int64_t begin = smaller(mask.rows[i].begin - first, rows), end = mask.rows[i].end - first;
      for (std::int64_t row = 0; row < begin; ++row) square[row * kChunk + i] = -kInfinity;
      for (std::int64_t row = larger<std::int64_t>(end, 0); row < rows; ++row) square[row * kChunk + i] = -kInfinity;
    }
  }

  // ---- accumulators ----

  // Writes accumulators of out, whose chunks lie `stride` apart, times a factor.
  static void write(const float* accumulators, std::int64_t stride, float factor, const Matrix& out) {
    for (std::int64_t row = 0; row < out.rows; ++row)
      for (std::int64_t col = 0; col < out.cols; col += kLanes)
        write_vector(mul(load(accumulators + col / kChunk * stride + row * kChunk + col % kChunk), set1(factor)), row,
                     col, out);
  }
  // Writes accumulators of the transpose of out, times a factor for each row of out.
  static void write_transpose(const float* accumulators, const float* factors, const Matrix& out) {
    for (std::int64_t row = 0; row < out.rows; row += kLanes)
      for (std::int64_t col = 0; col < out.cols; col += kLanes) {
        F32 tile[kLanes];
        for (int i = 0; i < kLanes; ++i)
          tile[i] = mul(load(accumulators + (col + i) * kChunk + row), load(factors + row));
        transpose(tile);
        for (int i = 0; i < kLanes && row + i < out.rows; ++i) write_vector(tile[i], row + i, col, out);
      }
  }

  const AttentionInputs& in_;

 private:
  static void write_vector(F32 values, std::int64_t row, std::int64_t col, const Matrix& out) {
    store_from_f32<kType>(elements_at(out.data, kType, row * out.stride + col), values,
                          static_cast<int>(smaller<std::int64_t>(kLanes, out.cols - col)));
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
