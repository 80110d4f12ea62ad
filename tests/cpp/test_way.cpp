// Guards the rule that chooses the way of a product on the CPU (cpu/product/config.h).
#include "cpu/product/config.h"

#include <cstdio>
#include <string>

#include "expect.h"

namespace qn = qlora_native;
using qn::Way;
using Product = qn::WayProblem::Product;

namespace {

constexpr Product kBoth[] = {Product::forward, Product::backward_input};

qn::WayProblem problem(Product product, qn::DType dtype, std::int64_t M) {
  return {.product = product, .dtype = dtype, .M = M, .N = 4096, .K = 4096};
}

// The number of rows, 1 ... 5000, from which on the way is taken; 0 if it never is.
std::int64_t first_rows(Way way, qn::WayProblem p) {
  for (p.M = 1; p.M <= 5000; ++p.M)
    if (qn::choose_way(p) == way) return p.M;
  return 0;
}

void vectors_multiply_all_but_few_rows() {
  for (const qn::DType dtype : {qn::DType::f32, qn::DType::bf16, qn::DType::f16})
    for (const bool dense_gemm : {false, true}) {
      qn::WayProblem p = problem(Product::forward, dtype, 0);
      p.dense_gemm = dense_gemm;
      EXPECT(first_rows(Way::few_rows, p) == 1 && first_rows(Way::vectors, p) == 9);
      EXPECT(first_rows(Way::tiles, p) == 0 && first_rows(Way::panels, p) == 0);
      p.product = Product::backward_input;
      EXPECT(first_rows(Way::vectors, p) == 1 && first_rows(Way::few_rows, p) == 0);
    }
}

void tiles_multiply_from_four_rows_on() {
  for (const Product product : kBoth) {
    qn::WayProblem p = problem(product, qn::DType::bf16, 0);
    p.tiles = p.dense_tiles = true;
    EXPECT(first_rows(Way::tiles, p) == 4 && first_rows(Way::panels, p) == 0);  // there is no dense product
    EXPECT(first_rows(product == Product::forward ? Way::few_rows : Way::vectors, p) == 1);
    p.dense_gemm = true;
    EXPECT(first_rows(Way::tiles, p) == 4 && first_rows(Way::panels, p) == 1024);
    p.rank = 16;
    p.dropout = true;  // it applies to parts of sums, which a dense product does not separate
    EXPECT(first_rows(Way::tiles, p) == 4 && first_rows(Way::panels, p) == 0);
  }
}

void fp16_goes_by_panels_where_the_dense_product_alone_has_tiles() {
  for (const Product product : kBoth) {
    qn::WayProblem p = problem(product, qn::DType::f16, 0);
    p.dense_gemm = p.dense_tiles = true;
    EXPECT(first_rows(Way::panels, p) == 33);
    p.dropout = true;
    EXPECT(first_rows(Way::panels, p) == 0);
  }
}

void fp32_goes_by_wide_panels_where_the_dense_product_is_ahead() {
  for (const Product product : kBoth) {
    qn::WayProblem p = problem(product, qn::DType::f32, 0);
    p.dense_ahead = true;
    EXPECT(first_rows(Way::panels, p) == 0);  // there is no dense product
    p.dense_gemm = true;
    EXPECT(first_rows(Way::panels, p) == 1024);
    p.rank = 64;
    EXPECT(first_rows(Way::panels, p) == 1024);
    p.dropout = true;
    EXPECT(first_rows(Way::panels, p) == 0);
    p.dropout = false;
    (product == Product::forward ? p.K : p.N) = 11008;  // its panels have 128 columns
    EXPECT(first_rows(Way::panels, p) == 0);
  }
}

// A panel of 64 columns or rows of W must fit its memory.
void panels_are_left_where_they_would_not_fit() {
  qn::WayProblem p = problem(Product::backward_input, qn::DType::bf16, 2048);
  p.tiles = p.dense_gemm = p.dense_tiles = true;
  p.N = 65536;
  EXPECT(qn::choose_way(p) == Way::panels && qn::panel_columns(p.N, p.dtype) == 64);
  p.N = 151936;
  EXPECT(qn::choose_way(p) == Way::tiles);
  p.product = Product::forward;
  EXPECT(qn::choose_way(p) == Way::panels);
}

void text_says_the_problem_and_its_way() {
  qn::WayProblem p = problem(Product::backward_input, qn::DType::bf16, 7);
  p.rank = 16;
  p.dropout = true;
  EXPECT(qn::text_of(p, Way::tiles) == "dX [7, 4096] of W [4096, 4096] in bfloat16, rank 16, dropout: tiles");
  p = problem(Product::forward, qn::DType::f32, 1);
  EXPECT(qn::text_of(p, Way::few_rows) == "Y [1, 4096] of W [4096, 4096] in float32: few_rows");
}

}  // namespace

int main() {
  vectors_multiply_all_but_few_rows();
  tiles_multiply_from_four_rows_on();
  fp16_goes_by_panels_where_the_dense_product_alone_has_tiles();
  fp32_goes_by_wide_panels_where_the_dense_product_is_ahead();
  panels_are_left_where_they_would_not_fit();
  text_says_the_problem_and_its_way();
  return report();
}
