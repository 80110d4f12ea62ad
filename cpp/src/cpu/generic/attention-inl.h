// attention.h, a block of 64 queries and 64 keys at a time:
//
//   forward    S = Q K^T    P = e^(s S - m)    O = O e^(m' - m) + P V                  m: the largest score so far
//   backward   S = Q K^T    P = e^(s S - lse)  dP = dO V^T    dS = P o (dP - delta)    delta: the sum of dO o O
//              dV += P^T dO    dK += dS^T Q    dQ += dS K
//
// Each product takes its left factor as packed rows and its right one as chunks of 64 columns
// (product_nn_layout-inl.h), so a matrix is packed in up to three forms:
//
//   rows         [row][unit of columns]             left factors
//   columns      [chunk][unit of rows][64 columns]  right factors
//   transposed   [unit of columns][64 rows]         right factors, of which the transpose multiplies
//
// Sums are [chunk][row][64 columns]. Blocks of queries and of keys come in one order for each sum, whatever the tasks
// and the threads are.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/generic/exp-inl.h"
#include "cpu/generic/lora-inl.h"
#include "cpu/generic/product_nn-inl.h"
#include "cpu/generic/product_nt-inl.h"
#include "cpu/parallel.h"
#include "qlora_native/attention.h"
#include "qlora_native/runtime.h"

namespace qlora_native::QLN_ISA {
namespace {

// Memory that is handed out part after part.
class Parts {
 public:
  explicit Parts(float* memory) : next_(memory) {}
  float* take(std::int64_t floats) {
    float* const part = next_;
    next_ += ceil_div(floats, kLanes) * kLanes;
    return part;
  }

 private:
  float* next_;
};

template <class Dot>
class Attention {
 public:
  explicit Attention(const AttentionInputs& in) : in_(in) {}

  static void forward(const AttentionArgs& args) {
    const Attention of(args.in);
    const std::int64_t pairs = of.in_.batch * of.in_.k.heads, blocks = of.query_blocks();
    // The last queries come first: in causal attention they see the most keys.
    parallel_for(pairs * blocks,
                 [&](std::int64_t task) { of.forward_block(args, task % pairs, blocks - 1 - task / pairs); });
  }

  static void backward(const AttentionBackwardArgs& args) {
    const Attention of(args.in);
    const std::int64_t pairs = of.in_.batch * of.in_.k.heads;
    const Range queries{0, of.query_blocks()}, keys{0, of.key_blocks()};
    if (of.gradients_at_once(pairs)) {
      parallel_for(pairs, [&](std::int64_t pair) { of.gradients(args, pair, queries, keys, true, true); });
      return;
    }
    const std::int64_t of_queries = pairs * queries.end, of_keys = pairs * keys.end;
    parallel_for(of_queries + of_keys, [&](std::int64_t task) {
      if (task < of_keys) {  // the first keys are seen by the most queries
        const std::int64_t j = task / pairs;
        of.gradients(args, task % pairs, queries, {j, j + 1}, false, true);
      } else {
        task -= of_keys;
        const std::int64_t i = queries.end - 1 - task / pairs;
        of.gradients(args, task % pairs, {i, i + 1}, keys, true, false);
      }
    });
  }

 private:
  using Nn = ProductNn<Dot>;
  using Nt = ProductNt<Dot>;
  using Layout = LayoutNn<Dot>;
  using Tiles = typename Nn::Tiles;
  using Rows = DenseRows<Dot, true>;
  static constexpr DType kType = Dot::kActivation;
  static constexpr std::int64_t kBlock = kChunk;  // queries, and keys
  static constexpr std::int64_t kSquare = kBlock * kBlock;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  // Sums of dK and dV that one task may keep.
  static constexpr std::int64_t kMostGradientFloats = 4 << 20;

  std::int64_t query_blocks() const { return ceil_div(in_.q.rows, kBlock); }
  std::int64_t key_blocks() const { return ceil_div(in_.k.rows, kBlock); }
  std::int64_t group() const { return in_.q.heads / in_.k.heads; }  // heads of q that share one of k
  std::int64_t chunks() const { return ceil_div(in_.head_dim, kChunk); }
  // Floats of a block: its sums, and its three forms.
  std::int64_t sums_floats() const { return chunks() * kSquare; }
  std::int64_t rows_floats() const { return kBlock * Layout::packed_stride(Layout::units_of(in_.head_dim)); }
  std::int64_t columns_floats() const { return chunks() * kBlockUnits * kChunk; }
  std::int64_t transposed_floats() const { return inner_units() * kChunk; }
  static constexpr std::int64_t kBlockUnits = kBlock / Dot::kElementsPerUnit;  // units of 64 rows
  static constexpr std::int64_t kSquareStride = kBlockUnits + kLanes;          // of packed rows of 64 elements
  std::int64_t inner_units() const { return Layout::whole_steps(Layout::units_of(in_.head_dim)); }

  // Whether one task for each head of K computes all its gradients, which takes 5 products a block. Two kinds of tasks,
  // for blocks of queries and for blocks of keys, take 3 and 4, but they are many.
  bool gradients_at_once(std::int64_t pairs) const {
    const std::int64_t threads = num_threads();
    return 5 * ceil_div(pairs, threads) * threads <= 7 * pairs &&
           2 * key_blocks() * sums_floats() <= kMostGradientFloats;
  }

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
  // sums += square . columns
  void add_product(Tiles& tiles, const float* square, std::int64_t count, const float* columns, float* sums) const {
    for (std::int64_t c = 0; c < chunks(); ++c) {
      const auto vectors = static_cast<int>(ceil_div(smaller<std::int64_t>(kChunk, in_.head_dim - c * kChunk), kLanes));
      Nn::multiply_rows(tiles, square, kSquareStride, count, columns + c * kBlockUnits * kChunk, kBlockUnits, vectors,
                        sums + c * kSquare, true);
    }
  }

  // ---- what queries see ----

  struct Seen {
    std::int32_t begin, end;
  };
  // Of one block of queries: what each sees, and the blocks of keys that have any of it.
  struct SeenByBlock {
    Seen of[kBlock];
    Range blocks;
  };
  SeenByBlock seen_by(std::int64_t b, std::int64_t block) const {
    SeenByBlock seen;
    const std::int64_t count = smaller(kBlock, in_.q.rows - block * kBlock);
    std::int64_t begin = in_.k.rows, end = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      Seen& one = seen.of[i] = {0, static_cast<std::int32_t>(in_.k.rows)};
      if (in_.key_ranges != nullptr) {
        const std::int32_t* range = in_.key_ranges + b * in_.key_ranges_stride + 2 * (block * kBlock + i);
        one = {range[0], range[1]};
      }
      if (one.begin >= one.end) continue;
      begin = smaller<std::int64_t>(begin, one.begin);
      end = larger<std::int64_t>(end, one.end);
    }
    seen.blocks = {begin / kBlock, begin < end ? ceil_div(end, kBlock) : 0};
    return seen;
  }
  // Gives the keys that a query does not see the score -inf. Returns whether it sees any of the block.
  static bool hide(Seen seen, std::int64_t block, float* row) {
    const std::int64_t first = larger<std::int64_t>(seen.begin - block * kBlock, 0);
    const std::int64_t end = smaller(seen.end - block * kBlock, kBlock);
    for (std::int64_t i = 0; i < smaller(first, kBlock); ++i) row[i] = -kInfinity;
    for (std::int64_t i = larger<std::int64_t>(end, 0); i < kBlock; ++i) row[i] = -kInfinity;
    return first < end;
  }

  // ---- forward ----

  void forward_block(const AttentionArgs& args, std::int64_t pair, std::int64_t block) const {
    const std::int64_t b = pair / in_.k.heads, key_head = pair % in_.k.heads, heads = group();
    const std::int64_t count = smaller(kBlock, in_.q.rows - block * kBlock);
    const SeenByBlock seen = seen_by(b, block);
    const std::int64_t of_head = rows_floats() + sums_floats() + 2 * kBlock;
    Parts parts(scratch_floats(Slot::thread, heads * of_head + transposed_floats() + columns_floats() + kSquare +
                                                 kBlock * kSquareStride + (3 * heads + 4) * kLanes));
    float* const k = parts.take(transposed_floats());
    float* const v = parts.take(columns_floats());
    float* const square = parts.take(kSquare);
    float* const packed = parts.take(kBlock * kSquareStride);
    float* const q = parts.take(heads * rows_floats());
    float* const out = parts.take(heads * sums_floats());
    float* const largest = parts.take(heads * kBlock);
    float* const sum = parts.take(heads * kBlock);
    __builtin_memset(out, 0, static_cast<std::size_t>(heads * sums_floats()) * sizeof(float));
    for (std::int64_t i = 0; i < heads * kBlock; ++i) {
      largest[i] = -kInfinity;
      sum[i] = 0.0f;
    }
    for (std::int64_t g = 0; g < heads; ++g)
      pack_rows(block_of(in_.q, b, key_head * heads + g, block), q + g * rows_floats());
    Tiles tiles;
    for (std::int64_t j = seen.blocks.begin; j < seen.blocks.end; ++j) {
      pack_transposed(block_of(in_.k, b, key_head, j), k);
      pack_columns(block_of(in_.v, b, key_head, j), v);
      for (std::int64_t g = 0; g < heads; ++g) {
        scores(tiles, q + g * rows_floats(), count, k, square);
        add_exponentials(seen, j, count, square, largest + g * kBlock, sum + g * kBlock, out + g * sums_floats());
        pack_square(square, count, packed);
        add_product(tiles, packed, count, v, out + g * sums_floats());
      }
    }
    for (std::int64_t g = 0; g < heads; ++g) {
      const std::int64_t h = key_head * heads + g;
      float* lse = args.lse + (b * in_.q.heads + h) * in_.q.rows + block * kBlock;
      float factors[kBlock];
      for (std::int64_t i = 0; i < count; ++i) {
        const float of_row = sum[g * kBlock + i];
        factors[i] = of_row == 0.0f ? 0.0f : 1.0f / of_row;
        lse[i] = of_row == 0.0f ? -kInfinity : largest[g * kBlock + i] + std::log(of_row);
      }
      write(out + g * sums_floats(), factors, block_of(args.out, b, h, block));
    }
  }

  // Replaces the scores of a block of keys by e^(s S - m), where m becomes the largest score of each query so far, and
  // scales what was summed with the m before.
  void add_exponentials(const SeenByBlock& seen, std::int64_t j, std::int64_t count, float* square, float* largest,
                        float* sum, float* out) const {
    float factor[kBlock], shift[kBlock];
    bool grows = false;
    for (std::int64_t row = 0; row < kBlock; ++row) {
      factor[row] = largest[row];
      if (row < count && hide(seen.of[row], j, square + row * kBlock)) {
        const float of_block = largest_of(square + row * kBlock) * in_.scale;
        if (of_block > largest[row]) {
          grows = grows || largest[row] > -kInfinity;
          largest[row] = of_block;
        }
      }
      shift[row] = finite_or_zero(largest[row]);
    }
    if (grows) {
      for (std::int64_t row = 0; row < kBlock; row += kLanes)
        store(factor + row, exp_of_negative(add(load(factor + row), negative(load(shift + row)))));
      for (std::int64_t row = 0; row < count; ++row) {
        if (factor[row] == 1.0f) continue;
        sum[row] *= factor[row];
        for (std::int64_t c = 0; c < chunks(); ++c)
          for (std::int64_t i = 0; i < kChunk; i += kLanes) {
            float* p = out + c * kSquare + row * kChunk + i;
            store(p, mul(load(p), set1(factor[row])));
          }
      }
    }
    for (std::int64_t row = 0; row < count; ++row) {
      float* s = square + row * kBlock;
      F32 total = zero();
      for (std::int64_t i = 0; i < kBlock; i += kLanes) {
        const F32 e = exp_of_negative(fma(load(s + i), set1(in_.scale), set1(-shift[row])));
        store(s + i, e);
        total = add(total, e);
      }
      sum[row] += reduce_add(total);
    }
  }
  static float largest_of(const float* row) {
    F32 most = load(row);
    for (std::int64_t i = kLanes; i < kBlock; i += kLanes) most = max(most, load(row + i));
    return reduce_max(most);
  }
  // What is subtracted from scores. A query that has seen no key has -inf, and -inf - -inf would be NaN.
  static float finite_or_zero(float x) { return x == -kInfinity ? 0.0f : x; }
  static F32 negative(F32 x) { return mul(x, set1(-1.0f)); }

  // Writes sums times a factor for each row.
  static void write(const float* sums, const float* factors, const Matrix& out) {
    for (std::int64_t row = 0; row < out.rows; ++row)
      for (std::int64_t col = 0; col < out.cols; col += kLanes) {
        const float* p = sums + col / kChunk * kSquare + row * kChunk + col % kChunk;
        store_from_f32<kType>(elements_at(out.data, kType, row * out.stride + col), mul(load(p), set1(factors[row])),
                              static_cast<int>(smaller<std::int64_t>(kLanes, out.cols - col)));
      }
  }
  static void write(const float* sums, float factor, const Matrix& out) {
    float factors[kBlock];
    for (float& each : factors) each = factor;
    write(sums, factors, out);
  }

  // ---- backward ----

  // What the gradients of a block of queries need of one head.
  struct HeadOfQueries {
    float *q, *dout;                  // as rows
    float *q_columns, *dout_columns;  // for dK and dV
    float* dq;                        // sums
    float *shift, *delta;             // [64]
  };
  // Of a block of keys.
  struct HeadOfKeys {
    float *k, *v;      // transposed
    float* k_columns;  // for dQ
    float *dk, *dv;    // sums of all blocks of a task
  };
  // A score and its gradient, [64][64], and room for their packed transposes.
  struct Squares {
    float *p, *ds, *transposed, *packed;
  };

  // The gradients of a head of K, and of the heads of Q that share it, that these blocks of queries and of keys give:
  // with `of_queries` they are all that there is for dQ, and with `of_keys` for dK and dV.
  void gradients(const AttentionBackwardArgs& args, std::int64_t pair, Range queries, Range keys, bool of_queries,
                 bool of_keys) const {
    const std::int64_t b = pair / in_.k.heads, key_head = pair % in_.k.heads, first = key_head * group();
    const std::int64_t of_head = 2 * (rows_floats() + columns_floats() + kBlock) + sums_floats() + 7 * kLanes;
    const std::int64_t of_block = 2 * transposed_floats() + columns_floats() + 3 * kLanes;
    const std::int64_t of_gradients = of_keys ? 2 * keys.count() * sums_floats() : 0;
    Parts parts(scratch_floats(Slot::thread,
                               group() * of_head + of_block + of_gradients + 3 * kSquare + kBlock * kSquareStride));
    const Squares squares{parts.take(kSquare), parts.take(kSquare), parts.take(kSquare),
                          parts.take(kBlock * kSquareStride)};
    const HeadOfKeys of_k{parts.take(transposed_floats()), parts.take(transposed_floats()),
                          parts.take(columns_floats()), parts.take(of_gradients / 2), parts.take(of_gradients / 2)};
    float* const of_heads = parts.take(0);
    const auto head = [&](std::int64_t g) {
      Parts of(of_heads + g * of_head);
      return HeadOfQueries{of.take(rows_floats()),
                           of.take(rows_floats()),
                           of.take(columns_floats()),
                           of.take(columns_floats()),
                           of.take(sums_floats()),
                           of.take(kBlock),
                           of.take(kBlock)};
    };
    __builtin_memset(of_k.dk, 0, static_cast<std::size_t>(of_gradients) * sizeof(float));
    Tiles tiles;
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      const SeenByBlock seen = seen_by(b, i);
      const Range blocks{larger(seen.blocks.begin, keys.begin), smaller(seen.blocks.end, keys.end)};
      if (blocks.begin < blocks.end)
        for (std::int64_t g = 0; g < group(); ++g) prepare(args, b, first + g, i, of_keys, head(g));
      if (of_queries)
        for (std::int64_t g = 0; g < group(); ++g)
          __builtin_memset(head(g).dq, 0, static_cast<std::size_t>(sums_floats()) * sizeof(float));
      for (std::int64_t j = blocks.begin; j < blocks.end; ++j) {
        pack_transposed(block_of(in_.k, b, key_head, j), of_k.k);
        pack_transposed(block_of(in_.v, b, key_head, j), of_k.v);
        if (of_queries) pack_columns(block_of(in_.k, b, key_head, j), of_k.k_columns);
        HeadOfKeys here = of_k;
        here.dk += (j - keys.begin) * sums_floats();
        here.dv += (j - keys.begin) * sums_floats();
        for (std::int64_t g = 0; g < group(); ++g)
          add_gradients(tiles, seen, i, j, head(g), here, squares, of_queries, of_keys);
      }
      if (of_queries)
        for (std::int64_t g = 0; g < group(); ++g) write(head(g).dq, in_.scale, block_of(args.dq, b, first + g, i));
    }
    if (!of_keys) return;
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      write(of_k.dk + (j - keys.begin) * sums_floats(), in_.scale, block_of(args.dk, b, key_head, j));
      write(of_k.dv + (j - keys.begin) * sums_floats(), 1.0f, block_of(args.dv, b, key_head, j));
    }
  }

  void prepare(const AttentionBackwardArgs& args, std::int64_t b, std::int64_t h, std::int64_t block, bool of_keys,
               const HeadOfQueries& head) const {
    const ConstMatrix q = block_of(in_.q, b, h, block), dout = block_of(args.dout, b, h, block);
    const ConstMatrix out = block_of(args.out, b, h, block);
    pack_rows(q, head.q);
    pack_rows(dout, head.dout);
    if (of_keys) {
      pack_columns(q, head.q_columns);
      pack_columns(dout, head.dout_columns);
    }
    const float* lse = args.lse + (b * in_.q.heads + h) * in_.q.rows + block * kBlock;
    for (std::int64_t row = 0; row < q.rows; ++row) {
      head.shift[row] = finite_or_zero(lse[row]);
      F32 sum = zero();
      for (std::int64_t col = 0; col < q.cols; col += kLanes) {
        const auto lanes = static_cast<int>(smaller<std::int64_t>(kLanes, q.cols - col));
        sum = fma(load_as_f32<kType>(elements_at(out.data, kType, row * out.stride + col), lanes),
                  load_as_f32<kType>(elements_at(dout.data, kType, row * dout.stride + col), lanes), sum);
      }
      head.delta[row] = reduce_add(sum);
    }
  }

  // Adds what a block of queries and a block of keys give.
  void add_gradients(Tiles& tiles, const SeenByBlock& seen, std::int64_t i, std::int64_t j, const HeadOfQueries& head,
                     const HeadOfKeys& keys, const Squares& squares, bool of_queries, bool of_keys) const {
    const std::int64_t count = smaller(kBlock, in_.q.rows - i * kBlock);
    const std::int64_t key_count = smaller(kBlock, in_.k.rows - j * kBlock);
    scores(tiles, head.q, count, keys.k, squares.p);
    scores(tiles, head.dout, count, keys.v, squares.ds);
    for (std::int64_t row = 0; row < count; ++row) {
      float *p = squares.p + row * kBlock, *ds = squares.ds + row * kBlock;
      hide(seen.of[row], j, p);
      const F32 shift = set1(-head.shift[row]), delta = set1(-head.delta[row]);
      for (std::int64_t col = 0; col < kBlock; col += kLanes) {
        // Rounding may lift the likeliest above its lse.
        const F32 e = exp_of_negative(min(zero(), fma(load(p + col), set1(in_.scale), shift)));
        store(p + col, e);
        store(ds + col, mul(e, add(load(ds + col), delta)));
      }
    }
    if (of_queries) {
      pack_square(squares.ds, count, squares.packed);
      add_product(tiles, squares.packed, count, keys.k_columns, head.dq);
    }
    if (!of_keys) return;
    add_transposed(tiles, squares, squares.p, count, key_count, head.dout_columns, keys.dv);
    add_transposed(tiles, squares, squares.ds, count, key_count, head.q_columns, keys.dk);
  }
  // sums += square^T . columns, where a square has `count` rows and `key_count` columns.
  void add_transposed(Tiles& tiles, const Squares& squares, float* square, std::int64_t count, std::int64_t key_count,
                      const float* columns, float* sums) const {
    __builtin_memset(square + count * kBlock, 0, static_cast<std::size_t>((kBlock - count) * kBlock) * sizeof(float));
    transpose_square(square, squares.transposed);
    pack_square(squares.transposed, key_count, squares.packed);
    add_product(tiles, squares.packed, key_count, columns, sums);
  }

  const AttentionInputs& in_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
