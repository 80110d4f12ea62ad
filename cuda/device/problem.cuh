// A product with a quantized weight, as gemm_config wants to know it; what its kernels ask of the weight's layout.
#pragma once

#include "device/elements.cuh"
#include "device/weight_chunk.cuh"
#include "gemm_config.h"

namespace qlora_native::QLN_CUDA {

inline bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }
inline int log2_of(int n) {
  int log2 = 0;
  while ((1 << log2) < n) ++log2;
  return log2;
}
inline WeightShifts shifts_of(const QuantizedWeightView& w) {
  const bool nested = w.nested_absmax != nullptr && is_power_of_two(w.nested_blocksize);
  const int block = log2_of(w.blocksize);
  return {block, block - log2_of(kGemmChunk), nested ? log2_of(w.nested_blocksize) : -1};
}
inline std::int64_t chunks_of(const QuantizedWeightView& w) { return w.elements() / kGemmChunk; }
inline std::uint32_t last_chunk_of(const QuantizedWeightView& w) {
  return static_cast<std::uint32_t>(chunks_of(w) - 1);
}
// Whether the weight is made of whole chunks that lie at multiples of 16 bytes, and 32 bits count them.
inline bool is_aligned(const QuantizedWeightView& w) {
  return w.K % kGemmChunk == 0 && is_aligned(w.codes, kVectorBytes) && chunks_of(w) <= 0xFFFFFFFF &&
         (w.nested_absmax == nullptr || is_power_of_two(w.nested_blocksize));
}

// Whether the first `cols` elements of each row are whole 16-byte vectors.
inline bool rows_are_vectors(const ConstMatrix& matrix, std::int64_t cols) {
  const std::int64_t vector = kVectorBytes / static_cast<std::int64_t>(size_of(matrix.dtype));
  return is_aligned(matrix.data, kVectorBytes) && cols % vector == 0 &&
         (matrix.rows <= 1 || matrix.stride % vector == 0);
}

// `left` times W by its rows, or, backward, by its columns.
inline GemmProblem problem_of(const ConstMatrix& left, const QuantizedWeightView& w, bool backward,
                              const Stream& stream) {
  const std::int64_t inner = backward ? w.N : w.K;
  return {
      .rows = left.rows,
      .cols = backward ? w.K : w.N,
      .inner = inner,
      .dtype = left.dtype,
      .bits = w.bits,
      .backward = backward,
      .aligned = is_aligned(w) && rows_are_vectors(left, inner),
      .multiprocessors = multiprocessors(stream),
  };
}
inline GemmConfig config_of(const ConstMatrix& left, const QuantizedWeightView& w, bool backward,
                            const Stream& stream) {
  const GemmProblem problem = problem_of(left, w, backward, stream);
  const GemmConfig config = gemm_config(problem);
  print_if_asked(problem, config);
  return config;
}

}  // namespace qlora_native::QLN_CUDA
