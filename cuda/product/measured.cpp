#include "product/measured.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

namespace qlora_native {
namespace {

using enum DType;
using enum MeasuredProduct::Direction;

constexpr std::initializer_list<MeasuredProduct> kRows = {
#include "product/measured.inc"
};
static_assert(std::ranges::is_sorted(kRows, {}, &MeasuredProduct::compute_capability));

// Quotients of IEEE numbers have the same bits everywhere, and so has the choice, unlike logarithms.
double ratio(std::int64_t a, std::int64_t b) {
  return static_cast<double>(std::max(a, b)) / static_cast<double>(std::min(a, b));
}

}  // namespace

std::span<const MeasuredProduct> measured_products() { return {kRows.begin(), kRows.size()}; }

std::optional<KernelOverride> measured_kernel(const ProductShape& shape, std::span<const MeasuredProduct> rows) {
  constexpr double kMaxRatio = 2.0;
  const bool as_measured =
      shape.rows > 0 && shape.bits == 4 && shape.groups == 0 && shape.aligned_64 && shape.plain_scales;
  if (!as_measured) return std::nullopt;
  const std::int64_t N = shape.backward ? shape.inner : shape.cols, K = shape.backward ? shape.cols : shape.inner;
  // Both 16-bit dtypes have the same kernels, and instructions that take the same time.
  const DType dtype = shape.dtype == f16 ? bf16 : shape.dtype;
  const MeasuredProduct* nearest = nullptr;
  double least = std::numeric_limits<double>::infinity();
  const auto of_device =
      std::ranges::equal_range(rows, shape.compute_capability, {}, &MeasuredProduct::compute_capability);
  for (const MeasuredProduct& row : of_device) {
    if (row.dtype != dtype || (row.direction == dx) != shape.backward || (row.rank > 0) != (shape.rank > 0)) continue;
    const double of_M = ratio(row.M, shape.rows), of_N = ratio(row.N, N), of_K = ratio(row.K, K);
    if (std::max({of_M, of_N, of_K}) > kMaxRatio || of_M * of_N * of_K >= least) continue;
    least = of_M * of_N * of_K;
    nearest = &row;
  }
  return nearest == nullptr ? std::nullopt : kernel_of_name(nearest->kernel);
}

}  // namespace qlora_native
