// Guards the choice of the kernel of a product on the CPU (cpu/product/config.h).
#include "cpu/product/config.h"

#include <cstdio>
#include <string>

#include "expect.h"

namespace qn = qlora_native;
using qn::cpu::ProductKernel;
using qn::cpu::ProductShape;
using Product = ProductShape::Product;

namespace {

constexpr Product kBoth[] = {Product::forward, Product::backward_input};

ProductShape shape_of(Product product, qn::DType dtype, std::int64_t M) {
  return {.product = product, .dtype = dtype, .M = M, .N = 4096, .K = 4096};
}

// The number of rows, 1 ... 5000, from which on the kernel is chosen; 0 if it never is.
std::int64_t first_rows(ProductKernel kernel, ProductShape p) {
  for (p.M = 1; p.M <= 5000; ++p.M)
    if (qn::cpu::choose_product(p) == kernel) return p.M;
  return 0;
}

TEST(vectors_multiply_more_than_eight_rows) {
  for (const qn::DType dtype : {qn::DType::f32, qn::DType::bf16, qn::DType::f16})
    for (const bool dense_gemm : {false, true}) {
      ProductShape p = shape_of(Product::forward, dtype, 0);
      p.has_dense_gemm = dense_gemm;
      EXPECT(first_rows(ProductKernel::small_m, p) == 1 && first_rows(ProductKernel::vectors, p) == 9);
      EXPECT(first_rows(ProductKernel::tiles, p) == 0 && first_rows(ProductKernel::panels, p) == 0);
      p.product = Product::backward_input;
      EXPECT(first_rows(ProductKernel::vectors, p) == 1 && first_rows(ProductKernel::small_m, p) == 0);
    }
}

TEST(small_m_multiplies_as_many_rows_as_are_faster_in_pieces) {
  ProductShape p = shape_of(Product::forward, qn::DType::bf16, 0);
  p.rows_in_pieces = 12;
  EXPECT(first_rows(ProductKernel::small_m, p) == 1 && first_rows(ProductKernel::vectors, p) == 13);
  p.rows_in_pieces = qn::cpu::kMaxSmallM;
  EXPECT(first_rows(ProductKernel::small_m, p) == 1 && first_rows(ProductKernel::vectors, p) == 25);
  p.product = Product::backward_input;
  EXPECT(first_rows(ProductKernel::vectors, p) == 1 && first_rows(ProductKernel::small_m, p) == 0);
}

TEST(tiles_multiply_from_three_rows_on) {
  for (const Product product : kBoth) {
    ProductShape p = shape_of(product, qn::DType::bf16, 0);
    p.isa_has_tiles = p.dense_gemm_has_tiles = true;
    for (const bool dense_gemm : {false, true}) {
      p.has_dense_gemm = dense_gemm;
      EXPECT(first_rows(ProductKernel::tiles, p) == 3 && first_rows(ProductKernel::panels, p) == 0);
      EXPECT(first_rows(product == Product::forward ? ProductKernel::small_m : ProductKernel::vectors, p) == 1);
    }
  }
}

TEST(fp16_goes_by_panels_where_the_dense_product_alone_has_tiles) {
  for (const Product product : kBoth) {
    ProductShape p = shape_of(product, qn::DType::f16, 0);
    p.has_dense_gemm = p.dense_gemm_has_tiles = true;
    EXPECT(first_rows(ProductKernel::panels, p) == 33);
    p.dropout = true;
    EXPECT(first_rows(ProductKernel::panels, p) == 0);
  }
}

TEST(fp32_goes_by_wide_panels_where_the_dense_product_is_faster) {
  for (const Product product : kBoth) {
    ProductShape p = shape_of(product, qn::DType::f32, 0);
    p.dense_gemm_is_faster = true;
    EXPECT(first_rows(ProductKernel::panels, p) == 0);  // there is no dense product
    p.has_dense_gemm = true;
    EXPECT(first_rows(ProductKernel::panels, p) == 1024);
    p.rank = 64;
    EXPECT(first_rows(ProductKernel::panels, p) == 1024);
    p.dropout = true;
    EXPECT(first_rows(ProductKernel::panels, p) == 0);
    p.dropout = false;
    (product == Product::forward ? p.K : p.N) = 11008;  // its panels have 128 columns
    EXPECT(first_rows(ProductKernel::panels, p) == 0);
  }
}

// A panel of 64 columns or rows of W must fit its memory.
TEST(panels_are_left_where_they_would_not_fit) {
  ProductShape p = shape_of(Product::backward_input, qn::DType::f16, 2048);
  p.has_dense_gemm = p.dense_gemm_has_tiles = true;
  p.N = 65536;
  EXPECT(qn::cpu::choose_product(p) == ProductKernel::panels && qn::cpu::panel_columns(p.N, p.dtype) == 64);
  p.N = 151936;
  EXPECT(qn::cpu::choose_product(p) == ProductKernel::vectors);
  p.product = Product::forward;
  EXPECT(qn::cpu::choose_product(p) == ProductKernel::panels);
}

TEST(description_has_the_shape_and_the_kernel) {
  ProductShape p = shape_of(Product::backward_input, qn::DType::bf16, 7);
  p.rank = 16;
  p.dropout = true;
  EXPECT(qn::cpu::describe(p, ProductKernel::tiles) ==
         "dX [7, 4096] of W [4096, 4096] in bfloat16, rank 16, dropout: tiles");
  p = shape_of(Product::forward, qn::DType::f32, 1);
  EXPECT(qn::cpu::describe(p, ProductKernel::small_m) == "Y [1, 4096] of W [4096, 4096] in float32: small_m");
}

}  // namespace

int main() { return run_tests(); }
