#include "cpu/product/config.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <optional>

#include "backend.h"
#include "cpu/runtime/processor.h"
#include "hooks.h"
#include "qlora_native/error.h"

namespace qlora_native::cpu {
namespace {

// A product takes the last kernel in its line of this table whose number of rows it reaches.
//
//   this instruction set has         small_m     vectors   tiles   panels
//   vectors                          1 (Y)       9         -       -
//   vectors; the dense tiles         1 (Y)       9         -       33
//   vectors; the dense is faster     1 (Y)       9         -       1024, without dropout, of 448 columns or more
//   tiles                            1 (Y)       1 (dX)    3       -
//
// Where small_m is faster by pieces, vectors take Y from more rows on in the place of 9 (rows_in_pieces). On two cores
// of an Intel Xeon (Ice Lake), with a 4096 x 4096 weight, it took 0.64 to 0.69 of their time for 9 rows, 0.55 to 0.86
// for 16 and 0.84 for 24. For 32 it took as long. On two cores of an AMD EPYC (Zen 5) it took 0.72 to 0.83 of their
// time for 9 rows, 0.8 to 0.86 for 12, and as long for 16 to 24; by 4096 x 1024 0.9 to 1.07 for 9 and 12. No Zen 4 has
// timed it with AVX-512: there vectors take 1.86 ms for up to 16 rows by 4096 x 4096, and the multiply-adds of 12 rows
// alone take 1.04. With AVX2 alone an AMD EPYC (Zen 4) took 0.54 to 0.79 of their time for 9 rows and 0.68 to 1.01 for
// 12, bf16 and fp32, by 4096 x 4096, 4096 x 1024, 1536 x 576 and 576 x 1536; for 16 to 24 rows it took 0.81 to 1.38.
//
// "The dense tiles" is fp16 on a processor with AMX-FP16, whose tiles only the application's product uses here. "The
// dense is faster" is fp32 with AVX-512 without BF16 (dense_gemm_is_faster). The number of threads does not decide:
// results must be the same for any.
struct MinRows {
  std::int64_t vectors, tiles, panels;
};
constexpr std::int64_t kNever = INT64_MAX;
// For each row vectors cost as much as a dense product, and W is decoded once, as it is before a dense product.
constexpr MinRows kWithVectors{kMaxPieceRows + 1, kNever, kNever};
// On the processors that have both, tiles multiply 14 times as fast as fp32 vectors (3500 against 243 GFLOP/s a core).
// So decoding W to memory and multiplying 16 rows by it costs little more than the decoding, which takes 3 ms for 4096
// x 4096 there. In 3 ms vectors multiply 33 rows.
constexpr MinRows kWithDenseTiles{kMaxPieceRows + 1, kNever, 33};
// The dense product packs X anew for each panel. On an AMD EPYC (Zen 4) panels of 512 columns took 0.99 to 1.06 times
// as long as torch's product of 1024 or 2048 rows with all of W, and panels of 128 columns 1.26 times. An inner
// dimension of 4096 leaves 512 columns in fp32.
constexpr MinRows kWithFasterDense{kMaxPieceRows + 1, kNever, 1024};
constexpr std::int64_t kMinFasterColumns = 448;
// On one core of an Intel Xeon (Emerald Rapids), with 4096 x 4096 weights, vectors take 1.0 ms for the first row of x,
// which is how long memory takes, and 0.2 for each other one; a tile product takes 1.2 ms for 1 ... 16 rows. Backward
// they took 1.8, 2.0 and 2.3 ms for 1, 2 and 3 rows by panels, and tiles 1.9; without panels (stage_nn-inl.h) no
// such processor has timed them. For 256 to 2048 rows tiles took 0.53 to 1.04 times as long as torch's product with all
// of W, which panels would decode first.
constexpr MinRows kWithTiles{3, 3, kNever};

std::int64_t columns_of_panel(const ProductShape& shape) {
  const std::int64_t inner = shape.product == ProductShape::Product::forward ? shape.K : shape.N;
  return panel_columns(std::max(inner, shape.rank), shape.dtype);
}

bool supports_small_m(const ProductShape& shape) {
  return shape.product == ProductShape::Product::forward && shape.M <= kMaxSmallM;
}
bool supports_tiles(const ProductShape& shape) { return shape.isa_has_tiles; }
bool supports_panels(const ProductShape& shape) {
  return shape.has_dense_gemm && !shape.dropout && shape.one_adapter && columns_of_panel(shape) > 0;
}

struct Kernel {
  const char* name;
  bool (*supports)(const ProductShape& shape);
};
constexpr Kernel kKernels[] = {
    // in the order of ProductKernel
    {"small_m", supports_small_m},
    {"vectors", [](const ProductShape&) { return true; }},
    {"tiles", supports_tiles},
    {"panels", supports_panels},
};

std::optional<ProductKernel> read_forced_kernel() {
  const char* name = std::getenv("QLN_FORCE_KERNEL");
  if (name == nullptr || *name == '\0') return std::nullopt;
  for (std::size_t i = 0; i < std::size(kKernels); ++i)
    if (std::string(name) == kKernels[i].name) return static_cast<ProductKernel>(i);
  throw Unavailable("QLN_FORCE_KERNEL: expected small_m, vectors, tiles or panels, got \"" + std::string(name) + "\"");
}

// Whether the application's dense product has tile products of a dtype that this instruction set multiplies by vectors.
// One that QLN_FORCE_ISA names stands for a machine that has no better one.
bool dense_gemm_has_tiles(DType dtype) {
  static const bool in_use = cpu_isa() == "amx_bf16" && has_amx_fp16();
  return in_use && dtype == DType::f16;
}
// Whether a dense product of 1024 rows or more is faster than the vectors of this instruction set by more than it costs
// to decode panels. That is so of fp32 and AVX-512 without BF16: on an Intel Xeon (Cascade Lake) vectors took 1.20
// times as long as torch's product, because they decode W again for each 480 rows, and there a permutation takes the
// place of a product. On an AMD EPYC (Zen 4) vectors are faster than torch's product.
bool dense_gemm_is_faster(DType dtype) {
  static const bool in_use = cpu_isa() == "avx512";
  return in_use && dtype == DType::f32;
}

// Small_m's multiply-add takes half a load, so that it is faster than vectors for some more rows. For these up to 16
// rows of x are one vector, however few they are, and each element of W is loaded for a single multiply-add: on an
// Intel Xeon (Ice Lake) two multiply-adds of 512 bits begin in a cycle but 1.1 loads, those that broadcast an element
// too. Each result of small_m ends with a sum over lanes, which a small inner dimension does not hide where
// instructions for bf16 make the rest short. With AVX-512 only bf16 has been timed.
std::int64_t rows_in_pieces(DType dtype, std::int64_t inner) {
  static const std::string isa = cpu_isa();
  if (isa == "avx2") return 12;
  if (dtype != DType::bf16) return 0;
  return isa == "avx512" ? kMaxSmallM : isa == "avx512_bf16" && inner >= 1536 ? 12 : 0;
}

ProductShape shape_of(ProductShape::Product product, const QuantizedWeightView& weight, const LoraView& lora,
                      const WeightRows& rows, DType dtype, bool isa_has_tiles) {
  const auto& adapters = rows.adapters;
  return {.product = product,
          .dtype = dtype,
          .M = rows.end - rows.begin,
          .N = weight.N,
          .K = weight.K,
          .rank = adapters.empty() ? 0 : lora.rank,
          .one_adapter = adapters.empty() || (adapters.size() == 1 && adapters.front().begin <= rows.begin &&
                                              adapters.front().end >= rows.end),
          .dropout = !adapters.empty() && lora.dropout > 0.0f,
          .isa_has_tiles = isa_has_tiles,
          .has_dense_gemm = hooks().dense_gemm != nullptr,
          .dense_gemm_has_tiles = dense_gemm_has_tiles(dtype),
          .dense_gemm_is_faster = dense_gemm_is_faster(dtype),
          .rows_in_pieces = rows_in_pieces(dtype, weight.K)};
}

}  // namespace

std::optional<ProductKernel> forced_kernel() {
  static const std::optional<ProductKernel> forced = read_forced_kernel();  // if it throws, the next call tries again
  return forced;
}

ProductKernel choose_product(const ProductShape& shape, std::optional<ProductKernel> forced) {
  if (forced && kKernels[static_cast<int>(*forced)].supports(shape)) return *forced;
  const bool faster = shape.dense_gemm_is_faster && columns_of_panel(shape) >= kMinFasterColumns;
  MinRows min = shape.isa_has_tiles          ? kWithTiles
                : shape.dense_gemm_has_tiles ? kWithDenseTiles
                : faster                     ? kWithFasterDense
                                             : kWithVectors;
  min.vectors = std::max(min.vectors, shape.rows_in_pieces + 1);
  if (shape.M >= min.panels && supports_panels(shape)) return ProductKernel::panels;
  if (shape.M >= min.tiles && supports_tiles(shape)) return ProductKernel::tiles;
  if (shape.M < min.vectors && supports_small_m(shape)) return ProductKernel::small_m;
  return ProductKernel::vectors;
}

ProductShape product_shape(const LinearForwardArgs& args, const WeightRows& rows, bool isa_has_tiles) {
  return shape_of(ProductShape::Product::forward, args.weight, args.lora, rows, args.x.dtype, isa_has_tiles);
}
ProductShape product_shape(const LinearBackwardInputArgs& args, const WeightRows& rows, bool isa_has_tiles) {
  return shape_of(ProductShape::Product::backward_input, args.weight, args.lora, rows, args.dy.dtype, isa_has_tiles);
}

std::string describe(const ProductShape& shape, ProductKernel kernel) {
  const auto matrix = [](std::int64_t rows, std::int64_t cols) {
    return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
  };
  const bool forward = shape.product == ProductShape::Product::forward;
  std::string text = (forward ? "Y " : "dX ") + matrix(shape.M, forward ? shape.N : shape.K) + " of W " +
                     matrix(shape.N, shape.K) + " in " + name_of(shape.dtype);
  if (shape.rank > 0) text += ", rank " + std::to_string(shape.rank);
  if (!shape.one_adapter) text += ", several adapters";
  if (shape.dropout) text += ", dropout";
  return text + ": " + kKernels[static_cast<int>(kernel)].name;
}

void log_product(const ProductShape& shape, ProductKernel kernel) {
  static const bool enabled = [] {
    const char* value = std::getenv("QLN_PRINT_CONFIG");
    return value != nullptr && *value == '1';
  }();
  if (enabled) std::fprintf(stderr, "%s\n", describe(shape, kernel).c_str());
}

}  // namespace qlora_native::cpu
