// Chooses the kernel that computes a product with a quantized weight on the CPU. The choice is a plain function of what
// is known beforehand, so that it can be read and tested. Its aim: no product takes longer than 1.05 times decoding all
// of W and multiplying by the application's dense product. bench/run.py --peers torch_dense decoded measures that.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cpu/product/linear.h"
#include "qlora_native/linear.h"

namespace qlora_native::cpu {

enum class ProductKernel {
  small_m,  // product_small_m-inl.h: lanes along K; a few rows decode each weight where they use it
  vectors,  // product_nt-inl.h and product_nn-inl.h, by panels of decoded W; dX in fp32 without them, by stage_nn-inl.h
  tiles,   // the same two by tile products (tiles-inl.h); few rows without panels, by strip_nt-inl.h and strip_nn-inl.h
  panels,  // panels-inl.h: panels of decoded W for the application's dense product (set_dense_gemm)
};

// The rows that one weight multiplies, on this machine.
struct ProductShape {
  enum class Product { forward, backward_input } product = Product::forward;
  DType dtype = DType::f32;
  std::int64_t M = 0, N = 0, K = 0;
  std::int64_t rank = 0;
  bool one_adapter = true;  // all rows have the same adapter, or none
  bool dropout = false;
  bool isa_has_tiles = false;         // the instruction set multiplies this dtype by tiles
  bool has_dense_gemm = false;        // the application has a dense product
  bool dense_gemm_has_tiles = false;  // and it multiplies this dtype by tiles
  bool dense_gemm_is_faster = false;  // or, for many rows, it is faster than the vectors that multiply this dtype here
  std::int64_t rows_in_pieces = 0;    // so many rows small_m multiplies by pieces, faster than vectors do
};
ProductShape product_shape(const LinearForwardArgs& args, const WeightRows& rows, bool isa_has_tiles);
ProductShape product_shape(const LinearBackwardInputArgs& args, const WeightRows& rows, bool isa_has_tiles);

constexpr std::int64_t kMaxSmallM = 24;  // rows of x that small_m takes
constexpr int kMaxPieceRows = 8;         // as many of them as it can multiply while a weight is in registers

// Columns of a panel whose columns have `inner` elements: a multiple of 64, or 0 where kPanelBytes do not hold so many.
constexpr std::int64_t kPanelBytes = std::int64_t{8} << 20;
constexpr std::int64_t panel_columns(std::int64_t inner, DType dtype) {
  return kPanelBytes / (inner * static_cast<std::int64_t>(size_of(dtype))) / 64 * 64;
}
// Bytes of rows of U or V that are computed at once where the caller does not want them.
constexpr std::int64_t kLowRankBytes = std::int64_t{1} << 20;

// The kernel that QLN_FORCE_KERNEL names for tests and measurements: small_m, vectors, tiles or panels.
std::optional<ProductKernel> forced_kernel();

// The kernel `forced` if it supports the shape, or else the one that the table of config.cpp has.
ProductKernel choose_product(const ProductShape& shape, std::optional<ProductKernel> forced = std::nullopt);

// QLN_PRINT_CONFIG=1 prints this for each product.
std::string describe(const ProductShape& shape, ProductKernel kernel);
void log_product(const ProductShape& shape, ProductKernel kernel);

}  // namespace qlora_native::cpu
