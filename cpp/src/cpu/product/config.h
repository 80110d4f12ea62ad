// Which way a product over a quantized weight takes on the cpu. The choice is a plain function of what is known
// beforehand, so that it can be read and tested. Its aim: no product takes longer than 1.05 times decoding all of W and
// multiplying by the host program's dense product. bench/growth.py measures that.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/product/linear.h"
#include "qlora_native/linear.h"

namespace qlora_native {

enum class Way {
  few_rows,  // forward_small_m-inl.h: lanes along K, each weight decoded where it is used
  vectors,   // product_nt-inl.h and product_nn-inl.h
  tiles,     // the same two, by tile products (tiles-inl.h)
  panels,    // panels-inl.h: panels of decoded W for the host program's dense product (set_dense_gemm)
};

struct WayProblem {
  enum class Product { forward, backward_input } product = Product::forward;
  DType dtype = DType::f32;
  std::int64_t M = 0, N = 0, K = 0;
  std::int64_t rank = 0;
  bool one_adapter = true;  // all rows have the same, or none
  bool dropout = false;
  bool tiles = false;        // the instruction set multiplies this dtype by tiles
  bool dense_gemm = false;   // the host program has a dense product
  bool dense_tiles = false;  // and it multiplies this dtype by tiles
  bool dense_ahead = false;  // or it is faster than the vectors that multiply this dtype here, if there are many rows
};
// The problem of the rows that one weight multiplies, on this machine.
WayProblem way_problem(WayProblem::Product product, const QuantizedWeightView& weight, const LoraView& lora,
                       const WeightRows& rows, DType dtype, bool tiles);

// Rows of x that few_rows can multiply.
constexpr std::int64_t kMostFewRows = 8;

// Columns of a panel whose columns have `inner` elements: a multiple of 64, or 0 where kPanelBytes do not hold so many.
constexpr std::int64_t kPanelBytes = std::int64_t{8} << 20;
constexpr std::int64_t panel_columns(std::int64_t inner, DType dtype) {
  return kPanelBytes / (inner * static_cast<std::int64_t>(size_of(dtype))) / 64 * 64;
}
// Bytes of rows of U or V that are computed at once where the caller does not want them.
constexpr std::int64_t kLowRankBytes = std::int64_t{1} << 20;

Way choose_way(const WayProblem& problem);

// The same, or the way that QLN_FORCE_WAY names (few_rows, vectors, tiles, panels) where the problem allows it: for
// tests and measurements.
Way way_of(const WayProblem& problem);

// QLN_PRINT_CONFIG=1 prints this for each product.
std::string text_of(const WayProblem& problem, Way way);
void print_if_asked(const WayProblem& problem, Way way);

}  // namespace qlora_native
