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
    const AttentionBackward attention(args);
    const std::int64_t pairs = args.in.batch * args.in.k.heads;
    const Range queries{0, attention.query_blocks()}, keys{0, attention.key_blocks()};
    if (attention.takes_all_at_once(pairs)) {
      parallel_for(pairs, [&](std::int64_t pair) { attention.compute(pair, queries, keys, true, true); });
      return;
    }
    const std::int64_t query_tasks = pairs * queries.end, key_tasks = pairs * keys.end;
    parallel_for(query_tasks + key_tasks, [&](std::int64_t task) {
      if (task < key_tasks) {  // in causal attention the first keys are seen by more queries
        const std::int64_t j = task / pairs;
        attention.compute(task % pairs, queries, {j, j + 1}, false, true);
      } else {
        task -= key_tasks;
        const std::int64_t i = queries.end - 1 - task / pairs;
        attention.compute(task % pairs, {i, i + 1}, keys, true, false);
      }
    });
  }

 private:
  using Blocks = AttentionBlocks<Dot>;
  using Blocks::add_product, Blocks::block_of, Blocks::columns_floats, Blocks::finite_or_zero, Blocks::group,
      Blocks::apply_mask, Blocks::in_, Blocks::kBlock, Blocks::kSquare, Blocks::kSquareStride, Blocks::kType,
      Blocks::key_blocks, Blocks::pack_columns, Blocks::pack_rows, Blocks::pack_square, Blocks::pack_transposed,
      Blocks::query_blocks, Blocks::rows_floats, Blocks::scores, Blocks::mask_of, Blocks::accumulator_floats,
      Blocks::transpose_square, Blocks::transposed_floats, Blocks::write;
  using typename Blocks::BlockMask, typename Blocks::Tiles;
  static constexpr std::int64_t kMaxGradientFloats = 4 << 20;  // accumulators of dK and dV that one task may hold

  explicit AttentionBackward(const AttentionBackwardArgs& args) : Blocks(args.in), args_(args) {}

  // Whether one task for each head of K computes all its gradients, which takes 5 products a block. Two kinds of tasks,
  // for blocks of queries and for blocks of keys, take 3 and 4, but they are many.
  bool takes_all_at_once(std::int64_t pairs) const {
    const std::int64_t threads = num_threads();
    return 5 * ceil_div(pairs, threads) * threads <= 7 * pairs &&
           2 * key_blocks() * accumulator_floats() <= kMaxGradientFloats;
  }

  // What the gradients of a block of queries need of one head.
  struct HeadOfQueries {
    float *q, *dout;                  // as rows
    float *q_columns, *dout_columns;  // for dK and dV
    float* dq;                        // accumulators
    float *shift, *delta;             // [64]
  };
  // What they need of a block of keys.
  struct HeadOfKeys {
    float *k, *v;      // transposed
    float* k_columns;  // for dQ
    float *dk, *dv;    // accumulators of all blocks of a task
  };
  // A score and its gradient, [64][64], and room for their packed transposes.
  struct Squares {
    float *p, *ds, *transposed, *packed;
  };

  // The gradients of a head of K, and of the heads of Q that share it, that these blocks of queries and of keys give:
  // with `need_dq` all of dQ, and with `need_dkv` all of dK and dV.
  void compute(std::int64_t pair, Range queries, Range keys, bool need_dq, bool need_dkv) const {
    const std::int64_t b = pair / in_.k.heads, key_head = pair % in_.k.heads, first = key_head * group();
    const std::int64_t head_floats = 2 * (rows_floats() + columns_floats() + kBlock) + accumulator_floats();
    const std::int64_t block_floats = 2 * transposed_floats() + columns_floats();
    const std::int64_t gradient_floats = need_dkv ? 2 * keys.count() * accumulator_floats() : 0;
    BumpAllocator memory(scratch_floats(
        Slot::thread, group() * head_floats + block_floats + gradient_floats + 3 * kSquare + kBlock * kSquareStride));
    const Squares squares{memory.allocate(kSquare), memory.allocate(kSquare), memory.allocate(kSquare),
                          memory.allocate(kBlock * kSquareStride)};
    const HeadOfKeys key_block{memory.allocate(transposed_floats()), memory.allocate(transposed_floats()),
                               memory.allocate(columns_floats()), memory.allocate(gradient_floats / 2),
                               memory.allocate(gradient_floats / 2)};
    float* const head_memory = memory.allocate(0);
    const auto head = [&](std::int64_t g) {
      BumpAllocator memory(head_memory + g * head_floats);
      return HeadOfQueries{memory.allocate(rows_floats()),
                           memory.allocate(rows_floats()),
                           memory.allocate(columns_floats()),
                           memory.allocate(columns_floats()),
                           memory.allocate(accumulator_floats()),
                           memory.allocate(kBlock),
                           memory.allocate(kBlock)};
    };
    __builtin_memset(key_block.dk, 0, static_cast<std::size_t>(gradient_floats) * sizeof(float));
    Tiles tiles;
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      const BlockMask mask = mask_of(b, i);
      const Range blocks{larger(mask.blocks.begin, keys.begin), smaller(mask.blocks.end, keys.end)};
      if (blocks.begin < blocks.end)
        for (std::int64_t g = 0; g < group(); ++g) prepare(b, first + g, i, need_dkv, head(g));
      if (need_dq)
        for (std::int64_t g = 0; g < group(); ++g)
          __builtin_memset(head(g).dq, 0, static_cast<std::size_t>(accumulator_floats()) * sizeof(float));
      for (std::int64_t j = blocks.begin; j < blocks.end; ++j) {
        pack_transposed(block_of(in_.k, b, key_head, j), key_block.k);
        pack_transposed(block_of(in_.v, b, key_head, j), key_block.v);
        if (need_dq) pack_columns(block_of(in_.k, b, key_head, j), key_block.k_columns);
        HeadOfKeys here = key_block;
        here.dk += (j - keys.begin) * accumulator_floats();
        here.dv += (j - keys.begin) * accumulator_floats();
        for (std::int64_t g = 0; g < group(); ++g)
          add_gradients(tiles, mask, i, j, head(g), here, squares, need_dq, need_dkv);
      }
      if (need_dq)
        for (std::int64_t g = 0; g < group(); ++g) write(head(g).dq, in_.scale, block_of(args_.dq, b, first + g, i));
    }
    if (!need_dkv) return;
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      write(key_block.dk + (j - keys.begin) * accumulator_floats(), in_.scale, block_of(args_.dk, b, key_head, j));
      write(key_block.dv + (j - keys.begin) * accumulator_floats(), 1.0f, block_of(args_.dv, b, key_head, j));
    }
  }

  // Packs a block of queries of one head, and sums dO o O of each.
  void prepare(std::int64_t b, std::int64_t h, std::int64_t block, bool need_dkv, const HeadOfQueries& head) const {
    const ConstMatrix q = block_of(in_.q, b, h, block), dout = block_of(args_.dout, b, h, block);
    const ConstMatrix out = block_of(args_.out, b, h, block);
    pack_rows(q, head.q);
    pack_rows(dout, head.dout);
    if (need_dkv) {
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
  void add_gradients(Tiles& tiles, const BlockMask& mask, std::int64_t i, std::int64_t j, const HeadOfQueries& head,
                     const HeadOfKeys& keys, const Squares& squares, bool need_dq, bool need_dkv) const {
    const std::int64_t count = smaller(kBlock, in_.q.rows - i * kBlock);
    const std::int64_t key_count = smaller(kBlock, in_.k.rows - j * kBlock);
    scores(tiles, head.q, count, keys.k, squares.p);
    scores(tiles, head.dout, count, keys.v, squares.ds);
    for (std::int64_t row = 0; row < count; ++row) {
      float *p = squares.p + row * kBlock, *ds = squares.ds + row * kBlock;
      apply_mask(mask.rows[row], j, p);
      const F32 shift = set1(-head.shift[row]), delta = set1(-head.delta[row]);
      for (std::int64_t col = 0; col < kBlock; col += kLanes) {
        // Rounding may lift the likeliest above its lse.
        const F32 e = exp_of_negative(min(zero(), fma(load(p + col), set1(in_.scale), shift)));
        store(p + col, e);
        store(ds + col, mul(e, add(load(ds + col), delta)));
      }
    }
    if (need_dq) {
      pack_square(squares.ds, count, squares.packed);
      add_product(tiles, squares.packed, count, keys.k_columns, head.dq);
    }
    if (!need_dkv) return;
    add_transposed(tiles, squares, squares.p, count, key_count, head.dout_columns, keys.dv);
    add_transposed(tiles, squares, squares.ds, count, key_count, head.q_columns, keys.dk);
  }
  // accumulators += square^T . columns, where a square has `count` rows and `key_count` columns.
  void add_transposed(Tiles& tiles, const Squares& squares, float* square, std::int64_t count, std::int64_t key_count,
                      const float* columns, float* accumulators) const {
    __builtin_memset(square + count * kBlock, 0, static_cast<std::size_t>((kBlock - count) * kBlock) * sizeof(float));
    transpose_square(square, squares.transposed);
    pack_square(squares.transposed, key_count, squares.packed);
    add_product(tiles, squares.packed, key_count, columns, accumulators);
  }

  const AttentionBackwardArgs& args_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
