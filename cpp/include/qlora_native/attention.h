// Attention, and the rotation of positions before it, both forward and backward. Only the CPU has them: on a GPU, the
// libraries of its vendor do.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native {

// A matrix [rows, head_dim] for each head of each sequence, a row being a token. Element (b, h, i, j) is
// data[b * batch_stride + h * head_stride + i * row_stride + j]. Rows must not overlap in what is written.
template <class Pointer>
struct BasicHeads {
  Pointer data = nullptr;
  std::int64_t heads = 0;
  std::int64_t rows = 0;
  std::int64_t batch_stride = 0;  // elements, as all strides
  std::int64_t head_stride = 0;
  std::int64_t row_stride = 0;
};
using ConstHeads = BasicHeads<const void*>;
using Heads = BasicHeads<void*>;

// Attention, out = softmax(scale * q k^T) v of each head. The scores exist a block at a time, so memory does not grow
// with the square of the sequence (Dao et al., "FlashAttention", algorithms 1 and 4).
struct AttentionInputs {
  DType dtype = DType::f32;  // of all heads, gradients too
  std::int64_t batch = 0;
  std::int64_t head_dim = 0;
  ConstHeads q;  // [batch, heads, queries, head_dim]
  // [batch, key_heads, keys, head_dim]. Head h of q belongs to head h / (heads / key_heads) of k and v, as in
  // grouped-query attention (Ainslie et al., "GQA").
  ConstHeads k;
  ConstHeads v;
  float scale = 1.0f;  // finite, > 0
  // Query i of sequence b sees keys r[0] ... r[1]-1 with r = key_ranges + b * key_ranges_stride + 2 * i, and
  // 0 <= r[0], r[1] <= keys; null lets each see all keys. So causal attention, sliding windows, padding on either side
  // and sequences that share a row are all one case.
  const std::int32_t* key_ranges = nullptr;  // [batch, queries, 2]
  std::int64_t key_ranges_stride = 0;        // 0 if all sequences share the first ranges
};

// Scores and sums are fp32; probabilities are rounded to the dtype before they multiply v.
struct AttentionArgs {
  AttentionInputs in;
  Heads out;             // [batch, heads, queries, head_dim]; zero for a query that sees no key
  float* lse = nullptr;  // [batch, heads, queries], out: log of the sum of e^score; -inf for a query that sees no key
};
QLN_API void attention(const AttentionArgs& args, const Stream& stream = {});

struct AttentionBackwardArgs {
  AttentionInputs in;
  ConstHeads out;  // as attention gave it, and lse too
  const float* lse = nullptr;
  ConstHeads dout;  // [batch, heads, queries, head_dim], the gradient of out
  Heads dq;         // as q, out
  Heads dk;         // as k, out
  Heads dv;         // as v, out
};
QLN_API void attention_backward(const AttentionBackwardArgs& args, const Stream& stream = {});

// Rotary position embedding (Su et al., "RoFormer"), with the halves of a row as pairs, as in GPT-NeoX and Llama:
// y = x o cos + (-x2, x1) o sin for x = (x1, x2), computed in fp32 and rounded once. With `transposed` y is the
// gradient of x where x is that of y.
struct RotaryArgs {
  DType dtype = DType::f32;  // of all
  std::int64_t batch = 0;
  std::int64_t head_dim = 0;  // even
  ConstHeads x;               // [batch, heads, rows, head_dim]
  const void* cos = nullptr;  // [batch, rows, head_dim]
  const void* sin = nullptr;  // [batch, rows, head_dim]
  bool shared = false;        // whether all sequences have the cos and sin of the first
  bool transposed = false;
  Heads y;  // as x, out
};
QLN_API void rotary(const RotaryArgs& args, const Stream& stream = {});

}  // namespace qlora_native
