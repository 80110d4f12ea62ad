// The adapters that a step of the product on tensor cores (gemm.cuh) has, where rows are in groups. In a step an
// adapter takes as many places as it has rank, rounded up to whole products of mma.
#pragma once

#include "product/product.cuh"

namespace qlora_native::QLN_CUDA {

__device__ __forceinline__ std::int64_t padded_rank(const Product& product) {
  return ceil_div(product.u.cols, kMmaInner) * kMmaInner;
}

// Which r of the rank of which adapter stands at a place. r is the rank or more where there is none.
struct AdapterRank {
  std::int64_t r;
  int adapter;
};
template <bool kGrouped>
__device__ __forceinline__ AdapterRank adapter_rank_at(const Product& product, const int* adapters,
                                                       std::int64_t place) {
  if constexpr (!kGrouped) return {place, 0};
  const std::int64_t padded = padded_rank(product);
  if (padded > kGemmStep) return {place, adapters[0]};
  const int adapter = adapters[place / padded];
  return {adapter < 0 ? product.u.cols : place % padded, adapter < 0 ? 0 : adapter};
}

}  // namespace qlora_native::QLN_CUDA
