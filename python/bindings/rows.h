// Tensors whose last dimension is a row, as matrices: views of a caller's, and new ones.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace qlora_native {

// A [..., cols] tensor as a matrix. It is copied if its last stride is not 1 or its leading dimensions do not
// collapse into one; `storage` keeps the copy.
struct Rows {
  Tensor storage;
  ConstMatrix matrix;
};

inline std::optional<std::int64_t> row_stride(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const std::int64_t last = tensor.dim() - 1;
  const std::int64_t cols = sizes[last];
  if (cols > 1 && strides[last] != 1) return std::nullopt;
  std::int64_t stride = cols, next = 0;  // `next`: what the stride of the dimension to the left must be
  for (std::int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (next == 0) {
      stride = strides[i];
      if (stride < cols) return std::nullopt;  // an expanded tensor
    } else if (strides[i] != next) {
      return std::nullopt;
    }
    next = strides[i] * sizes[i];
  }
  return stride;
}

inline Rows rows_of(const Tensor& tensor, std::int64_t cols, const char* argument) {
  check(
      tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) == cols, argument,
      [&] { return "a last dimension of " + std::to_string(cols); },
      [&] { return tensor.dim() < 1 ? "no dimension" : std::to_string(tensor.size(tensor.dim() - 1)); });
  const DType dtype = dtype_of(tensor.scalar_type(), argument);
  const std::int64_t rows = cols == 0 ? 0 : tensor.numel() / cols;
  const std::optional<std::int64_t> stride = rows == 0 ? cols : row_stride(tensor);
  check_memory(tensor, argument);
  Tensor storage = stride ? tensor : torch::stable::contiguous(tensor);
  const void* data = storage.data_ptr();
  return {std::move(storage), {data, dtype, rows, cols, stride.value_or(cols)}};
}

// The first touch of a fresh page costs more than what is written to it: decoding into 32 MB that the allocator has
// just got takes several times as long as into 32 MB that it kept. Linux gives pages of 2 MB on request, so results
// request them, as numpy's arrays do, from the same size on.
inline void request_huge_pages([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::int64_t kMinBytes = 4 << 20;
  if (bytes < kMinBytes || !tensor.is_cpu()) return;
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data_ptr());
  const std::uintptr_t first = (begin + page - 1) / page * page, end = begin + static_cast<std::uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(first), (end - first) / page * page, MADV_HUGEPAGE);  // a refusal costs only time
#endif
}

// torch's `new_empty` would look up an operator by its name, and take as long as a small product.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t i = sizes.size(); i > 1; --i)
    strides[i - 2] = strides[i - 1] * std::max<std::int64_t>(sizes[i - 1], 1);
  std::int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dtype = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device_type, like.get_device_index(),
                                                         &handle));
  Tensor tensor(handle);
  request_huge_pages(tensor, tensor.numel() * static_cast<std::int64_t>(tensor.element_size()));
  return tensor;
}
inline Tensor new_tensor(const Tensor& like, std::initializer_list<std::int64_t> sizes, ScalarType type) {
  return new_tensor(like, {sizes.begin(), sizes.size()}, type);
}

// A new [..., cols] tensor with the leading dimensions of `like`, and its matrix.
inline std::tuple<Tensor, Matrix> new_rows(const Tensor& like, const ConstMatrix& rows, std::int64_t cols) {
  std::vector<std::int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = cols;
  Tensor tensor = new_tensor(like, {sizes.data(), sizes.size()}, like.scalar_type());
  return {tensor, {tensor.data_ptr(), rows.dtype, rows.rows, cols, cols}};
}

}  // namespace qlora_native
