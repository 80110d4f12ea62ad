// What the jobs of all products take: the matrices of an adapter, its dropout, rows of matrices, and the weight. And
// how a job is made for a weight's format.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/product/dense_rows-inl.h"
#include "cpu/product/linear.h"
#include "cpu/quantize/quantized_rows-inl.h"
#include "qlora_native/linear.h"

namespace qlora_native::QLN_ISA {
namespace {

// The mask of the adapter's input. The factor 1/(1-p) is applied to the sums.
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
// Prefetches rows that lie one after another.
inline void prefetch(const ConstMatrix& m) {
  const auto* bytes = static_cast<const char*>(m.data);
  const std::int64_t count = m.rows * m.stride * static_cast<std::int64_t>(size_of(m.dtype));
  for (std::int64_t i = 0; i < count; i += 64) __builtin_prefetch(bytes + i, 0, 3);
}
inline ConstMatrix readable(Matrix m) { return {m.data, m.dtype, m.rows, m.cols, m.stride}; }

inline const void* elements_at(const void* data, DType dtype, std::int64_t elements) {
  if (data == nullptr) return nullptr;
  return static_cast<const char*>(data) + elements * static_cast<std::int64_t>(size_of(dtype));
}
inline void* elements_at(void* data, DType dtype, std::int64_t elements) {
  return const_cast<void*>(elements_at(static_cast<const void*>(data), dtype, elements));
}

// One adapter and the rows that it is for, which are counted from a job's first row.
struct JobAdapter {
  LoraView lora;
  std::int64_t begin, end;
};
// The adapters of `rows` rows from part.begin on. `all` are the adapters of the call.
inline std::vector<JobAdapter> job_adapters(const LoraView& all, const WeightRows& part, std::int64_t rows,
                                            const QuantizedWeightView& weight) {
  std::vector<JobAdapter> adapters;
  for (const AdapterRows& adapter : part.adapters) {
    const std::int64_t begin = larger(adapter.begin, part.begin) - part.begin;
    const std::int64_t end = smaller(adapter.end, part.begin + rows) - part.begin;
    if (begin >= end) continue;
    LoraView lora = all;
    lora.count = 1;
    lora.a = elements_at(all.a, all.dtype, adapter.adapter * all.rank * weight.K);
    lora.b = elements_at(all.b, all.dtype, adapter.adapter * all.rank * weight.N);
    adapters.push_back({lora, begin, end});
  }
  return adapters;
}

// The arguments of a call for `rows` rows from part.begin on, with the adapters left as they are.
inline LinearForwardArgs args_of(LinearForwardArgs args, const WeightRows& part, std::int64_t rows) {
  args.x = rows_of(args.x, part.begin, rows);
  args.y = rows_of(args.y, part.begin, rows);
  args.u = rows_of(args.u, part.begin, rows);
  args.bias = elements_at(args.bias, args.x.dtype, part.weight * args.weight.N);
  return args;
}
inline LinearBackwardInputArgs args_of(LinearBackwardInputArgs args, const WeightRows& part, std::int64_t rows) {
  args.dy = rows_of(args.dy, part.begin, rows);
  args.dx = rows_of(args.dx, part.begin, rows);
  args.v = rows_of(args.v, part.begin, rows);
  return args;
}

// Makes a job of the class template kJob, over the rows of the part's weight.
template <template <class, class> class kJob, class Dot, class Args>
std::unique_ptr<Job> make_job(const Args& args, const WeightRows& part) {
  return with_rows<Dot>(args.weight, part.weight, [&](const auto& rows) -> std::unique_ptr<Job> {
    return std::make_unique<kJob<Dot, std::remove_cvref_t<decltype(rows)>>>(rows, args, part);
  });
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
