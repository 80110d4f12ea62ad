// The kernels that were the fastest on devices, as bench/tune_cuda.py has measured them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "product/config.h"
#include "qlora_native/types.h"

namespace qlora_native {

// A row of measured.inc: of all kernels that support a product of x, which has M rows, with a weight [N, K], `kernel`
// took the least time.
struct MeasuredProduct {
  enum Direction : std::uint8_t { forward, dx };
  int compute_capability;  // of the device, 90 for 9.0
  Direction direction;
  DType dtype;
  std::int64_t rank, M, N, K;
  std::string_view kernel;  // as kernel_of_name() takes it
  double us;                // what it took in microseconds, for readers
};
// All rows, sorted by the compute capability.
std::span<const MeasuredProduct> measured_products();

// The kernel of the row that is nearest to the shape: one of the same compute capability, dtype and direction, with an
// adapter or without as the shape is, each of whose M, N and K is at most twice or half that of the shape. Nothing if
// there is no such row. The choice depends on no other property of the device, such as its number of SMs.
std::optional<KernelOverride> measured_kernel(const ProductShape& shape,
                                              std::span<const MeasuredProduct> rows = measured_products());

}  // namespace qlora_native
