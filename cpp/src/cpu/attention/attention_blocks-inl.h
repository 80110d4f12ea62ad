// attention.h, a block of 64 queries and 64 keys at a time:
//
//   forward    S = Q K^T    P = e^(s S - m)    O = O e^(m' - m) + P V                  m: the largest score so far
//   backward   S = Q K^T    P = e^(s S - lse)  dP = dO V^T    dS = P o (dP - delta)    delta: the sum of dO o O
//              dV += P^T dO    dK += dS^T Q    dQ += dS K
//
// Each product takes its first operand as packed rows and its second one as chunks of 64 columns
// (product_nn_layout-inl.h), so a matrix is packed in up to three forms:
//
//   rows         [row][unit of columns]             first operands
//   columns      [chunk][unit of rows][64 columns]  second operands
//   transposed   [unit of columns][64 rows]         second operands that are multiplied transposed
//
// Accumulators are [chunk][row][64 columns]. The blocks that add to one come in the same order, whatever the tasks and
// the threads are.
#pragma once

#include <limits>

#include "cpu/isa/exp-inl.h"
#include "cpu/product/lora-inl.h"
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
  static constexpr std::int64_t kBlock = kChunk;  // queries, and keys
  static constexpr std::int64_t kSquare = kBlock * kBlock;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  std::int64_t query_blocks() const { return ceil_div(in_.q.rows, kBlock); }
  std::int64_t key_blocks() const { return ceil_div(in_.k.rows, kBlock); }
  std::int64_t group() const { return in_.q.heads / in_.k.heads; }  // heads of q that share one of k
  std::int64_t chunks() const { return ceil_div(in_.head_dim, kChunk); }
  // Floats of a block: its accumulators, and its three forms.
  std::int64_t accumulator_floats() const { return chunks() * kSquare; }
  std::int64_t rows_floats() const { return kBlock * Layout::packed_stride(Layout::units_of(in_.head_dim)); }
  std::int64_t columns_floats() const { return chunks() * kBlockUnits * kChunk; }
  std::int64_t transposed_floats() const { return inner_units() * kChunk; }
  static constexpr std::int64_t kBlockUnits = kBlock / Dot::kElementsPerUnit;  // units of 64 rows
  static constexpr std::int64_t kSquareStride = kBlockUnits + kLanes;          // of packed rows of 64 elements
  std::int64_t inner_units() const { return Layout::whole_steps(Layout::units_of(in_.head_dim)); }

  // The rows of a block.
  template <class Pointer>
  BasicMatrix<Pointer> block_of(const BasicHeads<Pointer>& x, std::int64_t b, std::int64_t h,
                                std::int64_t block) const {
    const std::int64_t row = block * kBlock;
    return {elements_at(x.data, kType, b * x.batch_stride + h * x.head_stride + row * x.row_stride), kType,
            smaller(kBlock, x.rows - row), in_.head_dim, x.row_stride};
  }

  // ---- the three forms ----

  void pack_rows(const ConstMatrix& x, float* out) const { Layout::pack(x, {0, kBlock}, out); }
  void pack_columns(const ConstMatrix& x, float* out) const {
    decode_panel(Rows(x), typename Layout::Panel{{0, kBlockUnits}, {0, chunks()}, out});
  }
  void pack_transposed(const ConstMatrix& x, float* out) const {
    Nt::pack_strip(Rows(x), 0, kChunk / kLanes, {0, chunks()}, out);
  }
  // A square of fp32, as rows.
  static void pack_square(const float* square, std::int64_t rows, float* out) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const typename Dot::Chunk chunk =
          Dot::template dense_natural<DType::f32>(square + row * kBlock, 1.0f, static_cast<int>(kBlock));
      for (int i = 0; i < Dot::kVectors; ++i) store(out + row * kSquareStride + i * kLanes, chunk.v[i]);
    }
  }
  static void transpose_square(const float* square, float* out) {
    for (std::int64_t row = 0; row < kBlock; row += kLanes)
      for (std::int64_t col = 0; col < kBlock; col += kLanes) {
        F32 tile[kLanes];
        for (int i = 0; i < kLanes; ++i) tile[i] = load(square + (row + i) * kBlock + col);
        transpose(tile);
        for (int i = 0; i < kLanes; ++i) store(out + (col + i) * kBlock + row, tile[i]);
      }
  }

  // ---- products ----

  // rows . transposed^T: [64][64]
  void scores(Tiles& tiles, const float* rows, std::int64_t count, const float* transposed, float* out) const {
    Nn::multiply_rows(tiles, rows, Layout::packed_stride(Layout::units_of(in_.head_dim)), count, transposed,
                      inner_units(), kChunk / kLanes, out, false);
  }
  // accumulators += square . columns
  void add_product(Tiles& tiles, const float* square, std::int64_t count, const float* columns,
                   float* accumulators) const {
    for (std::int64_t c = 0; c < chunks(); ++c) {
      const auto vectors = static_cast<int>(ceil_div(smaller<std::int64_t>(kChunk, in_.head_dim - c * kChunk), kLanes));
      Nn::multiply_rows(tiles, square, kSquareStride, count, columns + c * kBlockUnits * kChunk, kBlockUnits, vectors,
                        accumulators + c * kSquare, true);
    }
  }

  // ---- masks ----

  struct KeyRange {
    std::int32_t begin, end;
  };
  // The keys that each query of a block sees, and the blocks that contain them.
  struct BlockMask {
    KeyRange rows[kBlock];
    Range blocks;
  };
  BlockMask mask_of(std::int64_t b, std::int64_t block) const {
    BlockMask mask;
    const std::int64_t count = smaller(kBlock, in_.q.rows - block * kBlock);
    std::int64_t begin = in_.k.rows, end = 0;
    for (std::int64_t i = 0; i < count; ++i) {
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
  // Sets the score of each key outside the range to -inf. Returns whether the block has any key of the range.
  static bool apply_mask(KeyRange range, std::int64_t block, float* row) {
    const std::int64_t first = larger<std::int64_t>(range.begin - block * kBlock, 0);
    const std::int64_t end = smaller(range.end - block * kBlock, kBlock);
    for (std::int64_t i = 0; i < smaller(first, kBlock); ++i) row[i] = -kInfinity;
    for (std::int64_t i = larger<std::int64_t>(end, 0); i < kBlock; ++i) row[i] = -kInfinity;
    return first < end;
  }

  // ---- accumulators and scores ----

  // This is subtracted from scores. A query that has seen no key has -inf, and -inf - -inf would be NaN.
  static float finite_or_zero(float x) { return x == -kInfinity ? 0.0f : x; }
  static F32 negative(F32 x) { return mul(x, set1(-1.0f)); }

  // Writes accumulators times a factor for each row.
  static void write(const float* accumulators, const float* factors, const Matrix& out) {
    for (std::int64_t row = 0; row < out.rows; ++row)
      for (std::int64_t col = 0; col < out.cols; col += kLanes) {
        const float* p = accumulators + col / kChunk * kSquare + row * kChunk + col % kChunk;
        store_from_f32<kType>(elements_at(out.data, kType, row * out.stride + col), mul(load(p), set1(factors[row])),
                              static_cast<int>(smaller<std::int64_t>(kLanes, out.cols - col)));
      }
  }
  static void write(const float* accumulators, float factor, const Matrix& out) {
    float factors[kBlock];
    for (float& each : factors) each = factor;
    write(accumulators, factors, out);
  }

  const AttentionInputs& in_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
