// The adapter's matrices and its dropout, and rows of matrices, as the products take them.
#pragma once

#include "cpu/generic/rows-inl.h"
#include "qlora_native/linear.h"

namespace qlora_native {
namespace {

// The adapter's dropped-out input: mask o x. The factor 1/(1-p) is applied to the sums.
inline Dropout dropout_of(const LoraView& lora) {
  if (lora.dropout == 0.0f) return {};
  return {dropout_threshold(lora.dropout), dropout_seed(lora.seed, lora.device_seed)};
}
inline float dropout_scale(const LoraView& lora) { return lora.dropout > 0.0f ? 1.0f / (1.0f - lora.dropout) : 1.0f; }

inline ConstMatrix lora_a(const LoraView& lora, std::int64_t K) { return {lora.a, lora.dtype, lora.rank, K, K}; }
inline ConstMatrix lora_b(const LoraView& lora, std::int64_t N) {
  return {lora.b, lora.dtype, N, lora.rank, lora.rank};
}

template <class Pointer>
inline BasicMatrix<Pointer> rows_of(BasicMatrix<Pointer> m, std::int64_t first, std::int64_t count) {
  using Byte = std::conditional_t<std::is_same_v<Pointer, const void*>, const char*, char*>;
  if (m.data != nullptr)
    m.data = static_cast<Byte>(m.data) + first * m.stride * static_cast<std::int64_t>(size_of(m.dtype));
  m.rows = count;
  return m;
}
inline ConstMatrix readable(Matrix m) { return {m.data, m.dtype, m.rows, m.cols, m.stride}; }

}  // namespace
}  // namespace qlora_native
