// A product with a quantized weight, as gemm_config wants to know it; what its kernels ask of the weight's layout.
#pragma once

#include "device/elements.cuh"
#include "device/weight_chunk.cuh"
#include "gemm_config.h"
#include "hooks.h"
#include "qlora_native/linear.h"

namespace qlora_native::QLN_CUDA {

inline bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }
inline int log2_of(int n) {
  int log2 = 0;
  while ((1 << log2) < n) ++log2;
  return log2;
}
inline WeightScales scales_of(const QuantizedWeightView& w) {
  const bool nested = w.nested_absmax != nullptr;
  const int block = log2_of(w.blocksize), chunk = block - log2_of(kGemmChunk);
  if (!nested) return {static_cast<const float*>(w.absmax), w.codes, false, block, chunk, 0};
  return {w.nested_absmax,
          static_cast<const std::uint8_t*>(w.absmax),
          true,
          block,
          chunk,
          is_power_of_two(w.nested_blocksize) ? log2_of(w.nested_blocksize) : -1};
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

// Whether 64 codes that begin at a multiple of 64 lie in one row, and share a scale.
inline bool is_aligned_64(const QuantizedWeightView& w) {
  return is_aligned(w) && w.K % kGemmStep == 0 && w.blocksize >= kGemmStep;
}

// Whether the first `cols` elements of each row are whole 16-byte vectors, and 32 bits count those of a tile.
inline bool rows_are_vectors(const ConstMatrix& matrix, std::int64_t cols) {
  const std::int64_t vector = kVectorBytes / static_cast<std::int64_t>(size_of(matrix.dtype));
  return is_aligned(matrix.data, kVectorBytes) && cols % vector == 0 &&
         (matrix.rows <= 1 || (matrix.stride % vector == 0 && matrix.stride / vector * kGemmTallRows <= 0xFFFFFFFF));
}

// `left` times W by its rows, or, backward, by its columns.
inline GemmProblem problem_of(const ConstMatrix& left, const QuantizedWeightView& w, const LoraView& lora,
                              bool backward, const Stream& stream) {
  const std::int64_t inner = backward ? w.N : w.K;
  const bool vectors = rows_are_vectors(left, inner);
  return {
      .rows = left.rows,
      .cols = backward ? w.K : w.N,
      .inner = inner,
      .dtype = left.dtype,
      .bits = w.bits,
      .backward = backward,
      .aligned = is_aligned(w) && vectors,
      .aligned_64 = is_aligned_64(w) && vectors,
      .rank = lora.rank,
      .masks = backward && lora.rank > 0 && lora.dropout > 0.0f,
      .dense_gemm = hooks().dense_gemm != nullptr,
      .multiprocessors = multiprocessors(stream),
      .smem_bytes = max_smem_bytes(stream),
      .reserved_smem_bytes = reserved_smem_bytes(stream),
  };
}
inline GemmConfig config_of(const ConstMatrix& left, const QuantizedWeightView& w, const LoraView& lora, bool backward,
                            const Stream& stream) {
  const GemmProblem problem = problem_of(left, w, lora, backward, stream);
  const GemmConfig config = gemm_config(problem);
  print_if_asked(problem, config);
  return config;
}

}  // namespace qlora_native::QLN_CUDA
