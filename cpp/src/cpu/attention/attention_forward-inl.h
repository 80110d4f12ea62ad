// The forward pass of attention (attention_blocks-inl.h).
#pragma once

#include <cmath>

#include "cpu/attention/attention_blocks-inl.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot>
class AttentionForward : AttentionBlocks<Dot> {
 public:
  static void run(const AttentionArgs& args) {
    const AttentionArgs merged = with_heads_as_queries(args);
    const AttentionForward attention(merged);
    const std::int64_t pairs = args.in.batch * args.in.k.heads, blocks = attention.query_blocks();
    // The last queries come first: in causal attention they see the most keys.
    parallel_for(pairs * blocks,
                 [&](std::int64_t task) { attention.compute_block(task % pairs, blocks - 1 - task / pairs); });
  }

 private:
  using Blocks = AttentionBlocks<Dot>;
  using Blocks::accumulator_floats, Blocks::add_transposed_product, Blocks::apply_mask, Blocks::block_of,
      Blocks::columns_floats, Blocks::each_round, Blocks::group, Blocks::in_, Blocks::kBlock, Blocks::kFewQueries,
      Blocks::kFewVectors, Blocks::kInfinity, Blocks::kRoundBlocks, Blocks::kSquareColumnsFloats, Blocks::kSquareFloats,
      Blocks::kUnitRows, Blocks::kVectors, Blocks::mask_of, Blocks::pack_rows, Blocks::pack_rows_of_transpose,
      Blocks::pack_transposed, Blocks::query_blocks, Blocks::rows_floats, Blocks::scores, Blocks::transpose_floats,
      Blocks::transposed_floats, Blocks::write_transpose;
  using typename Blocks::BlockMask, typename Blocks::Layout, typename Blocks::Tiles;

  explicit AttentionForward(const AttentionArgs& args) : Blocks(args.in), args_(args) {}

  // One query, as of the next token: the heads of q that share a head of keys become queries of one head, and share its
  // rows. Then all of them are a block.
  static AttentionArgs with_heads_as_queries(const AttentionArgs& args) {
    AttentionArgs merged = args;
    const std::int64_t group = args.in.q.heads / args.in.k.heads;
    if (args.in.q.rows != 1 || args.in.key_ranges != nullptr) return merged;
    const auto merge = [group](auto& heads) {
      heads.heads /= group;
      heads.rows = group;
      heads.row_stride = heads.head_stride;
      heads.head_stride *= group;
    };
    merge(merged.in.q);
    merge(merged.out);
    return merged;
  }

  // What a block of queries of one head needs, and what it has summed.
  struct Head {
    float* q;              // transposed
    float* out;            // accumulators of O^T
    float *largest, *sum;  // [64]: the largest scaled score so far, and the sum of e^(score - largest)
  };

  // Computes the results of a block of queries, for all heads that share a head of keys.
  void compute_block(std::int64_t pair, std::int64_t block) const {
    const std::int64_t b = pair / in_.k.heads, key_head = pair % in_.k.heads;
    const BlockMask mask = mask_of(b, block);
    const int vectors = mask.count <= kFewQueries ? kFewVectors : kVectors;
    const std::int64_t head_floats = transposed_floats() + accumulator_floats() + 2 * kBlock;
    BumpAllocator memory(scratch_floats(Slot::thread, rows_floats(kRoundBlocks) + transpose_floats() +
                                                          columns_floats(kRoundBlocks) + kSquareFloats +
                                                          kSquareColumnsFloats + group() * head_floats));
    float* const k = memory.allocate(rows_floats(kRoundBlocks));
    float* const v = memory.allocate(transpose_floats());
    float* const v_columns = memory.allocate(columns_floats(kRoundBlocks));
    float* const square = memory.allocate(kSquareFloats);
    float* const packed = memory.allocate(kSquareColumnsFloats);
    float* const head_memory = memory.allocate(0);
    const auto head_of = [&](std::int64_t g) {
      BumpAllocator memory(head_memory + g * head_floats);
      return Head{memory.allocate(transposed_floats()), memory.allocate(accumulator_floats()), memory.allocate(kBlock),
                  memory.allocate(kBlock)};
    };
    for (std::int64_t g = 0; g < group(); ++g) {
      const Head head = head_of(g);
      pack_transposed(block_of(in_.q, b, key_head * group() + g, block), head.q);
      __builtin_memset(head.out, 0, static_cast<std::size_t>(accumulator_floats()) * sizeof(float));
      for (std::int64_t i = 0; i < kBlock; ++i) {
        head.largest[i] = -kInfinity;
        head.sum[i] = 0.0f;
      }
    }
    Tiles tiles;
    each_round(mask.blocks, [&](Range blocks) {
      pack_rows(block_of(in_.k, b, key_head, blocks.begin, blocks.count()), blocks.count(), k);
      pack_rows_of_transpose(block_of(in_.v, b, key_head, blocks.begin, blocks.count()), blocks.count(), v_columns, v);
      for (std::int64_t g = 0; g < group(); ++g) {
        const Head head = head_of(g);
        scores(tiles, k, blocks.count() * kBlock, head.q, square, vectors);
        apply_mask(mask, blocks, square);
        if (vectors == kFewVectors)
          pack_exponentials<kFewVectors>(square, blocks.count() * kBlock, head, packed);
        else
          pack_exponentials<kVectors>(square, blocks.count() * kBlock, head, packed);
        add_transposed_product(tiles, v, packed, blocks.count(), head.out, vectors);
      }
    });
    for (std::int64_t g = 0; g < group(); ++g) {
      const Head head = head_of(g);
      const std::int64_t h = key_head * group() + g;
      float* lse = args_.lse + (b * in_.q.heads + h) * in_.q.rows + block * kBlock;
      float factors[kBlock] = {};
      for (std::int64_t i = 0; i < mask.count; ++i) {
        if (head.sum[i] != 0.0f) factors[i] = 1.0f / head.sum[i];
        lse[i] = head.sum[i] == 0.0f ? -kInfinity : head.largest[i] + std::log(head.sum[i]);
      }
      write_transpose(head.out, factors, block_of(args_.out, b, h, block));
    }
  }

  // Packs e^(s S - m) of a round's scores as columns, where m becomes the largest scaled score of each query so far,
  // and scales what was summed with the m before. A block of few queries has kCount vectors of them.
  template <int kCount>
  void pack_exponentials(const float* square, std::int64_t rows, const Head& head, float* packed) const {
    const F32 scale = set1(in_.scale);
    F32 largest[kCount], shift[kCount], sum[kCount];
    for (F32& each : largest) each = set1(-kInfinity);
    for (std::int64_t row = 0; row < rows; ++row)
      for (int i = 0; i < kCount; ++i) largest[i] = max(load(square + row * kChunk + i * kLanes), largest[i]);
    F32 least_factor = set1(1.0f);
    float factors[kBlock];
    for (int i = 0; i < kCount; ++i) {
      const F32 before = load(head.largest + i * kLanes);
      largest[i] = max(mul(largest[i], scale), before);
      store(head.largest + i * kLanes, largest[i]);
      // A query that has seen no key has -inf, and -inf - -inf would be NaN.
      shift[i] = mul(max(largest[i], set1(std::numeric_limits<float>::lowest())), set1(-1.0f));
      const F32 factor = exp_of_negative(add(before, shift[i]));
      least_factor = min(least_factor, factor);
      store(factors + i * kLanes, factor);
      sum[i] = zero();
    }
    if (reduce_max(mul(least_factor, set1(-1.0f))) > -1.0f) scale_sums<kCount>(factors, head);
    const typename Layout::WholePanel panel{{0, rows / kUnitRows}, {0, 1}, packed};
    for (std::int64_t unit = 0; unit < rows / kUnitRows; ++unit) {
      typename Dot::Chunk chunk[kUnitRows];
      for (int r = 0; r < kUnitRows; ++r) {
        const float* scores = square + (unit * kUnitRows + r) * kChunk;
        F32 e[kVectors] = {};
        for (int i = 0; i < kCount; ++i) {
          e[i] = exp_of_negative(fma(load(scores + i * kLanes), scale, shift[i]));
          sum[i] = add(sum[i], e[i]);
        }
        chunk[r] = Dot::natural(e);
      }
      panel.template write<true>(chunk, packed + unit * kChunk);
    }
    for (int i = 0; i < kCount; ++i) store(head.sum + i * kLanes, add(load(head.sum + i * kLanes), sum[i]));
  }
  template <int kCount>
  void scale_sums(const float* factors, const Head& head) const {
    for (int i = 0; i < kCount; ++i) {
      const F32 factor = load(factors + i * kLanes);
      store(head.sum + i * kLanes, mul(load(head.sum + i * kLanes), factor));
      for (std::int64_t row = 0; row < in_.head_dim; ++row) {
        float* p = head.out + row * kChunk + i * kLanes;
        store(p, mul(load(p), factor));
      }
    }
  }

  const AttentionArgs& args_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
