// A product with a quantized weight, as gemm_config wants to know it; what its kernels ask of the weight's layout.
#pragma once

#include "device/elements.cuh"
#include "gemm_config.h"

namespace qlora_native::QLN_CUDA {

inline bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }
inline int log2_of(int n) {
  int log2 = 0;
  while ((1 << log2) < n) ++log2;
  return log2;
}
// Of the blocksize, a power of two; of the nested one, or -1 if it is none.
inline int block_shift_of(const QuantizedWeightView& w) { return log2_of(w.blocksize); }
inline int nested_shift_of(const QuantizedWeightView& w) {
  return is_power_of_two(w.nested_blocksize) ? log2_of(w.nested_blocksize) : -1;
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
      .aligned = w.K % kGemmChunk == 0 && is_aligned(w.codes, kVectorBytes) && nested_shift_of(w) >= 0 &&
                 rows_are_vectors(left, inner),
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
