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
  using Blocks::accumulator_floats, Blocks::add_product, Blocks::add_transposed_product, Blocks::apply_mask,
      Blocks::block_of, Blocks::columns_floats, Blocks::each_round, Blocks::group, Blocks::in_, Blocks::kBlock,
      Blocks::key_blocks, Blocks::kInfinity, Blocks::kRoundBlocks, Blocks::kSquareColumnsFloats, Blocks::kSquareFloats,
      Blocks::kSquareRowsFloats, Blocks::kSquareStride, Blocks::kType, Blocks::kUnitRows, Blocks::kVectors,
      Blocks::mask_of, Blocks::pack_columns, Blocks::pack_rows, Blocks::pack_rows_of_transpose, Blocks::pack_transposed,
      Blocks::query_blocks, Blocks::rows_floats, Blocks::scores, Blocks::store_chunk, Blocks::transpose_floats,
      Blocks::transposed_floats, Blocks::write, Blocks::write_transpose;
  using typename Blocks::BlockMask, typename Blocks::Layout, typename Blocks::Tiles;
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
    float *q, *dout;                  // transposed
    float *q_columns, *dout_columns;  // for dK and dV
    float* dq;                        // accumulators of dQ^T
    float *shift, *delta;             // [64]: -lse and -delta
  };
  // What they need of a round of keys.
  struct Keys {
    float *k, *v;         // as rows
    float* k_transpose;   // as rows of the transpose, for dQ
    float *dk, *dv;       // accumulators
    std::int64_t stride;  // from a chunk of these to the next
  };
  // A round's scores and their gradients, and room for what is packed of them.
  struct Squares {
    float *p, *ds;
    float *p_rows, *ds_rows;  // for dV and dK
    float* ds_columns;        // for dQ
  };

  // The gradients of a head of K, and of the heads of Q that share it, that these blocks of queries and of keys give:
  // with `need_dq` all of dQ, and with `need_dkv` all of dK and dV.
  void compute(std::int64_t pair, Range queries, Range keys, bool need_dq, bool need_dkv) const {
    const std::int64_t b = pair / in_.k.heads, key_head = pair % in_.k.heads, first = key_head * group();
    const std::int64_t head_floats = 2 * (transposed_floats() + columns_floats(1) + kBlock) + accumulator_floats();
    const std::int64_t keys_floats = 2 * rows_floats(kRoundBlocks) + transpose_floats() + columns_floats(kRoundBlocks);
    const std::int64_t gradient_floats = need_dkv ? keys.count() * accumulator_floats() : 0;
    BumpAllocator memory(scratch_floats(Slot::thread, keys_floats + 2 * gradient_floats + 2 * kSquareFloats +
                                                          2 * kSquareRowsFloats + kSquareColumnsFloats +
                                                          group() * head_floats));
    const Squares squares{memory.allocate(kSquareFloats), memory.allocate(kSquareFloats),
                          memory.allocate(kSquareRowsFloats), memory.allocate(kSquareRowsFloats),
                          memory.allocate(kSquareColumnsFloats)};
    const Keys all_keys{memory.allocate(rows_floats(kRoundBlocks)), memory.allocate(rows_floats(kRoundBlocks)),
                        memory.allocate(transpose_floats()),        memory.allocate(gradient_floats),
                        memory.allocate(gradient_floats),           keys.count() * kBlock * kChunk};
    float* const k_columns = memory.allocate(columns_floats(kRoundBlocks));
    float* const head_memory = memory.allocate(0);
    const auto head = [&](std::int64_t g) {
      BumpAllocator memory(head_memory + g * head_floats);
      return HeadOfQueries{memory.allocate(transposed_floats()),
                           memory.allocate(transposed_floats()),
                           memory.allocate(columns_floats(1)),
                           memory.allocate(columns_floats(1)),
                           memory.allocate(accumulator_floats()),
                           memory.allocate(kBlock),
                           memory.allocate(kBlock)};
    };
    __builtin_memset(all_keys.dk, 0, static_cast<std::size_t>(2 * gradient_floats) * sizeof(float));
    Tiles tiles;
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      const BlockMask mask = mask_of(b, i);
      const Range seen{larger(mask.blocks.begin, keys.begin), smaller(mask.blocks.end, keys.end)};
      for (std::int64_t g = 0; g < group(); ++g) {
        if (seen.begin < seen.end) prepare(b, first + g, i, need_dkv, head(g));
        if (need_dq) __builtin_memset(head(g).dq, 0, static_cast<std::size_t>(accumulator_floats()) * sizeof(float));
      }
      each_round(seen, [&](Range blocks) {
        const ConstMatrix k = block_of(in_.k, b, key_head, blocks.begin, blocks.count());
        pack_rows(k, blocks.count(), all_keys.k);
        pack_rows(block_of(in_.v, b, key_head, blocks.begin, blocks.count()), blocks.count(), all_keys.v);
        if (need_dq) pack_rows_of_transpose(k, blocks.count(), k_columns, all_keys.k_transpose);
        Keys round = all_keys;
        round.dk += (blocks.begin - keys.begin) * kBlock * kChunk;
        round.dv += (blocks.begin - keys.begin) * kBlock * kChunk;
        for (std::int64_t g = 0; g < group(); ++g)
          add_gradients(tiles, mask, blocks, head(g), round, squares, need_dq, need_dkv);
      });
      if (!need_dq) continue;
      float scales[kBlock];
      for (float& each : scales) each = in_.scale;
      for (std::int64_t g = 0; g < group(); ++g)
        write_transpose(head(g).dq, scales, block_of(args_.dq, b, first + g, i));
    }
    if (!need_dkv) return;
    write(all_keys.dk, all_keys.stride, in_.scale, block_of(args_.dk, b, key_head, keys.begin, keys.count()));
    write(all_keys.dv, all_keys.stride, 1.0f, block_of(args_.dv, b, key_head, keys.begin, keys.count()));
  }

  // Packs a block of queries of one head, and sums dO o O of each.
  void prepare(std::int64_t b, std::int64_t h, std::int64_t block, bool need_dkv, const HeadOfQueries& head) const {
    const ConstMatrix q = block_of(in_.q, b, h, block), dout = block_of(args_.dout, b, h, block);
    const ConstMatrix out = block_of(args_.out, b, h, block);
    pack_transposed(q, head.q);
    pack_transposed(dout, head.dout);
    if (need_dkv) {
      pack_columns(q, 1, head.q_columns);
      pack_columns(dout, 1, head.dout_columns);
    }
    const float* lse = args_.lse + (b * in_.q.heads + h) * in_.q.rows + block * kBlock;
    for (std::int64_t row = 0; row < kBlock; ++row) {
      head.shift[row] = head.delta[row] = 0.0f;  // of queries that there are not, which must stay finite
      if (row >= q.rows) continue;
      if (lse[row] != -kInfinity) head.shift[row] = -lse[row];  // else no key is seen
      F32 sum = zero();
      for (std::int64_t col = 0; col < q.cols; col += kLanes) {
        const auto lanes = static_cast<int>(smaller<std::int64_t>(kLanes, q.cols - col));
        sum = fma(load_as_f32<kType>(elements_at(out.data, kType, row * out.stride + col), lanes),
                  load_as_f32<kType>(elements_at(dout.data, kType, row * dout.stride + col), lanes), sum);
      }
      head.delta[row] = -reduce_add(sum);
    }
  }

  // Adds what a block of queries and a round of keys give.
  void add_gradients(Tiles& tiles, const BlockMask& mask, Range blocks, const HeadOfQueries& head, const Keys& keys,
                     const Squares& squares, bool need_dq, bool need_dkv) const {
    const std::int64_t rows = blocks.count() * kBlock;
    scores(tiles, keys.k, rows, head.q, squares.p);
    scores(tiles, keys.v, rows, head.dout, squares.ds);
    apply_mask(mask, blocks, squares.p);
    pack_gradients(rows, head, squares, need_dq, need_dkv);
    if (need_dq) add_transposed_product(tiles, keys.k_transpose, squares.ds_columns, blocks.count(), head.dq);
    if (!need_dkv) return;
    add_product(tiles, squares.p_rows, rows, head.dout_columns, keys.dv, keys.stride);
    add_product(tiles, squares.ds_rows, rows, head.q_columns, keys.dk, keys.stride);
  }
  // Packs the probabilities of a round, and the gradients of its scores.
  void pack_gradients(std::int64_t rows, const HeadOfQueries& head, const Squares& squares, bool need_dq,
                      bool need_dkv) const {
    const F32 scale = set1(in_.scale);
    const typename Layout::WholePanel panel{{0, rows / kUnitRows}, {0, 1}, squares.ds_columns};
    for (std::int64_t unit = 0; unit < rows / kUnitRows; ++unit) {
      typename Dot::Chunk ds_chunk[kUnitRows];
      for (int r = 0; r < kUnitRows; ++r) {
        const std::int64_t row = unit * kUnitRows + r;
        F32 p[kVectors], ds[kVectors];
        for (int i = 0; i < kVectors; ++i) {
          const std::int64_t at = i * kLanes;
          // Rounding may lift the likeliest above its lse.
          const F32 score = fma(load(squares.p + row * kChunk + at), scale, load(head.shift + at));
          p[i] = exp_of_negative(min(zero(), score));
          ds[i] = mul(p[i], add(load(squares.ds + row * kChunk + at), load(head.delta + at)));
        }
        ds_chunk[r] = Dot::natural(ds);
        if (!need_dkv) continue;
        store_chunk(squares.p_rows + row * kSquareStride, Dot::natural(p));
        store_chunk(squares.ds_rows + row * kSquareStride, ds_chunk[r]);
      }
      if (need_dq) panel.template write<true>(ds_chunk, squares.ds_columns + unit * kChunk);
    }
  }

  const AttentionBackwardArgs& args_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
