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
    const AttentionForward of(args);
    const std::int64_t pairs = args.in.batch * args.in.k.heads, blocks = of.query_blocks();
    // The last queries come first: in causal attention they see the most keys.
    parallel_for(pairs * blocks, [&](std::int64_t task) { of.compute_block(task % pairs, blocks - 1 - task / pairs); });
  }

 private:
  using Blocks = AttentionBlocks<Dot>;
  using Blocks::add_product, Blocks::block_of, Blocks::chunks, Blocks::columns_floats, Blocks::finite_or_zero,
      Blocks::group, Blocks::hide, Blocks::in_, Blocks::kBlock, Blocks::kInfinity, Blocks::kSquare,
      Blocks::kSquareStride, Blocks::negative, Blocks::pack_columns, Blocks::pack_rows, Blocks::pack_square,
      Blocks::pack_transposed, Blocks::query_blocks, Blocks::rows_floats, Blocks::scores, Blocks::seen_by,
      Blocks::sums_floats, Blocks::transposed_floats, Blocks::write;
  using typename Blocks::SeenByBlock, typename Blocks::Tiles;

  explicit AttentionForward(const AttentionArgs& args) : Blocks(args.in), args_(args) {}

  // Computes the results of a block of queries, for all heads that share a head of keys.
  void compute_block(std::int64_t pair, std::int64_t block) const {
    const std::int64_t b = pair / in_.k.heads, key_head = pair % in_.k.heads, heads = group();
    const std::int64_t count = smaller(kBlock, in_.q.rows - block * kBlock);
    const SeenByBlock seen = seen_by(b, block);
    const std::int64_t of_head = rows_floats() + sums_floats() + 2 * kBlock;
    Parts parts(scratch_floats(
        Slot::thread, heads * of_head + transposed_floats() + columns_floats() + kSquare + kBlock * kSquareStride));
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
      float* lse = args_.lse + (b * in_.q.heads + h) * in_.q.rows + block * kBlock;
      float factors[kBlock];
      for (std::int64_t i = 0; i < count; ++i) {
        const float of_row = sum[g * kBlock + i];
        factors[i] = of_row == 0.0f ? 0.0f : 1.0f / of_row;
        lse[i] = of_row == 0.0f ? -kInfinity : largest[g * kBlock + i] + std::log(of_row);
      }
      write(out + g * sums_floats(), factors, block_of(args_.out, b, h, block));
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

  const AttentionArgs& args_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
