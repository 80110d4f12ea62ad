// The gradients of attention (attention_blocks-inl.h).
#pragma once

#include "cpu/attention/attention_blocks-inl.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "qlora_native/runtime.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot>
class AttentionBackward : AttentionBlocks<Dot> {
 public:
  static void run(const AttentionBackwardArgs& args) {
    const AttentionBackward of(args);
    const std::int64_t pairs = args.in.batch * args.in.k.heads;
    const Range queries{0, of.query_blocks()}, keys{0, of.key_blocks()};
    if (of.takes_all_at_once(pairs)) {
      parallel_for(pairs, [&](std::int64_t pair) { of.compute(pair, queries, keys, true, true); });
      return;
    }
    const std::int64_t of_queries = pairs * queries.end, of_keys = pairs * keys.end;
    parallel_for(of_queries + of_keys, [&](std::int64_t task) {
      if (task < of_keys) {  // the first keys are seen by the most queries
        const std::int64_t j = task / pairs;
        of.compute(task % pairs, queries, {j, j + 1}, false, true);
      } else {
        task -= of_keys;
        const std::int64_t i = queries.end - 1 - task / pairs;
        of.compute(task % pairs, {i, i + 1}, keys, true, false);
      }
    });
  }

 private:
  using Blocks = AttentionBlocks<Dot>;
  using Blocks::add_product, Blocks::block_of, Blocks::columns_floats, Blocks::finite_or_zero, Blocks::group,
      Blocks::hide, Blocks::in_, Blocks::kBlock, Blocks::kSquare, Blocks::kSquareStride, Blocks::kType,
      Blocks::key_blocks, Blocks::pack_columns, Blocks::pack_rows, Blocks::pack_square, Blocks::pack_transposed,
      Blocks::query_blocks, Blocks::rows_floats, Blocks::scores, Blocks::seen_by, Blocks::sums_floats,
      Blocks::transpose_square, Blocks::transposed_floats, Blocks::write;
  using typename Blocks::SeenByBlock, typename Blocks::Tiles;
  static constexpr std::int64_t kMostGradientFloats = 4 << 20;  // sums of dK and dV that one task may keep

  explicit AttentionBackward(const AttentionBackwardArgs& args) : Blocks(args.in), args_(args) {}

  // Whether one task for each head of K computes all its gradients, which takes 5 products a block. Two kinds of tasks,
  // for blocks of queries and for blocks of keys, take 3 and 4, but they are many.
  bool takes_all_at_once(std::int64_t pairs) const {
    const std::int64_t threads = num_threads();
    return 5 * ceil_div(pairs, threads) * threads <= 7 * pairs &&
           2 * key_blocks() * sums_floats() <= kMostGradientFloats;
  }

  // What the gradients of a block of queries need of one head.
  struct HeadOfQueries {
    float *q, *dout;                  // as rows
    float *q_columns, *dout_columns;  // for dK and dV
    float* dq;                        // sums
    float *shift, *delta;             // [64]
  };
  // What they need of a block of keys.
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
  void compute(std::int64_t pair, Range queries, Range keys, bool of_queries, bool of_keys) const {
    const std::int64_t b = pair / in_.k.heads, key_head = pair % in_.k.heads, first = key_head * group();
    const std::int64_t of_head = 2 * (rows_floats() + columns_floats() + kBlock) + sums_floats();
    const std::int64_t of_block = 2 * transposed_floats() + columns_floats();
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
        for (std::int64_t g = 0; g < group(); ++g) prepare(b, first + g, i, of_keys, head(g));
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
        for (std::int64_t g = 0; g < group(); ++g) write(head(g).dq, in_.scale, block_of(args_.dq, b, first + g, i));
    }
    if (!of_keys) return;
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      write(of_k.dk + (j - keys.begin) * sums_floats(), in_.scale, block_of(args_.dk, b, key_head, j));
      write(of_k.dv + (j - keys.begin) * sums_floats(), 1.0f, block_of(args_.dv, b, key_head, j));
    }
  }

  // Packs a block of queries of one head, and sums dO o O of each.
  void prepare(std::int64_t b, std::int64_t h, std::int64_t block, bool of_keys, const HeadOfQueries& head) const {
    const ConstMatrix q = block_of(in_.q, b, h, block), dout = block_of(args_.dout, b, h, block);
    const ConstMatrix out = block_of(args_.out, b, h, block);
    pack_rows(q, head.q);
    pack_rows(dout, head.dout);
    if (of_keys) {
      pack_columns(q, head.q_columns);
      pack_columns(dout, head.dout_columns);
    }
    const float* lse = args_.lse + (b * in_.q.heads + h) * in_.q.rows + block * kBlock;
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

  const AttentionBackwardArgs& args_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
