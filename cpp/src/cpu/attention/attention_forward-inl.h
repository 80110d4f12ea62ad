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
    const AttentionForward attention(args);
    const std::int64_t pairs = args.in.batch * args.in.k.heads, blocks = attention.query_blocks();
    // The last queries come first: in causal attention they see the most keys.
    parallel_for(pairs * blocks,
                 [&](std::int64_t task) { attention.compute_block(task % pairs, blocks - 1 - task / pairs); });
  }

 private:
  using Blocks = AttentionBlocks<Dot>;
  using Blocks::add_product, Blocks::block_of, Blocks::chunks, Blocks::columns_floats, Blocks::finite_or_zero,
      Blocks::group, Blocks::apply_mask, Blocks::in_, Blocks::kBlock, Blocks::kInfinity, Blocks::kSquare,
      Blocks::kSquareStride, Blocks::negative, Blocks::pack_columns, Blocks::pack_rows, Blocks::pack_square,
      Blocks::pack_transposed, Blocks::query_blocks, Blocks::rows_floats, Blocks::scores, Blocks::mask_of,
      Blocks::accumulator_floats, Blocks::transposed_floats, Blocks::write;
  using typename Blocks::BlockMask, typename Blocks::Tiles;

  explicit AttentionForward(const AttentionArgs& args) : Blocks(args.in), args_(args) {}

  // Computes the results of a block of queries, for all heads that share a head of keys.
  void compute_block(std::int64_t pair, std::int64_t block) const {
    const std::int64_t b = pair / in_.k.heads, key_head = pair % in_.k.heads, heads = group();
    const std::int64_t count = smaller(kBlock, in_.q.rows - block * kBlock);
    const BlockMask mask = mask_of(b, block);
    const std::int64_t head_floats = rows_floats() + accumulator_floats() + 2 * kBlock;
    BumpAllocator memory(scratch_floats(
        Slot::thread, heads * head_floats + transposed_floats() + columns_floats() + kSquare + kBlock * kSquareStride));
    float* const k = memory.allocate(transposed_floats());
    float* const v = memory.allocate(columns_floats());
    float* const square = memory.allocate(kSquare);
    float* const packed = memory.allocate(kBlock * kSquareStride);
    float* const q = memory.allocate(heads * rows_floats());
    float* const out = memory.allocate(heads * accumulator_floats());
    float* const largest = memory.allocate(heads * kBlock);
    float* const sum = memory.allocate(heads * kBlock);
    __builtin_memset(out, 0, static_cast<std::size_t>(heads * accumulator_floats()) * sizeof(float));
    for (std::int64_t i = 0; i < heads * kBlock; ++i) {
      largest[i] = -kInfinity;
      sum[i] = 0.0f;
    }
    for (std::int64_t g = 0; g < heads; ++g)
      pack_rows(block_of(in_.q, b, key_head * heads + g, block), q + g * rows_floats());
    Tiles tiles;
    for (std::int64_t j = mask.blocks.begin; j < mask.blocks.end; ++j) {
      pack_transposed(block_of(in_.k, b, key_head, j), k);
      pack_columns(block_of(in_.v, b, key_head, j), v);
      for (std::int64_t g = 0; g < heads; ++g) {
        scores(tiles, q + g * rows_floats(), count, k, square);
        add_exponentials(mask, j, count, square, largest + g * kBlock, sum + g * kBlock,
                         out + g * accumulator_floats());
        pack_square(square, count, packed);
        add_product(tiles, packed, count, v, out + g * accumulator_floats());
      }
    }
    for (std::int64_t g = 0; g < heads; ++g) {
      const std::int64_t h = key_head * heads + g;
      float* lse = args_.lse + (b * in_.q.heads + h) * in_.q.rows + block * kBlock;
      float factors[kBlock];
      for (std::int64_t i = 0; i < count; ++i) {
        const float row_sum = sum[g * kBlock + i];
        factors[i] = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
        lse[i] = row_sum == 0.0f ? -kInfinity : largest[g * kBlock + i] + std::log(row_sum);
      }
      write(out + g * accumulator_floats(), factors, block_of(args_.out, b, h, block));
    }
  }

  // Replaces the scores of a block of keys by e^(s S - m), where m becomes the largest score of each query so far, and
  // scales what was summed with the m before.
  void add_exponentials(const BlockMask& mask, std::int64_t j, std::int64_t count, float* square, float* largest,
                        float* sum, float* out) const {
    float factor[kBlock], shift[kBlock];
    bool grows = false;
    for (std::int64_t row = 0; row < kBlock; ++row) {
      factor[row] = largest[row];
      if (row < count && apply_mask(mask.rows[row], j, square + row * kBlock)) {
        const float block_largest = largest_of(square + row * kBlock) * in_.scale;
        if (block_largest > largest[row]) {
          grows = grows || largest[row] > -kInfinity;
          largest[row] = block_largest;
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
    F32 largest = load(row);
    for (std::int64_t i = kLanes; i < kBlock; i += kLanes) largest = max(largest, load(row + i));
    return reduce_max(largest);
  }

  const AttentionArgs& args_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
