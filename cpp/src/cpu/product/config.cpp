#include "cpu/product/config.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "backend.h"
#include "cpu/runtime/processor.h"
#include "hooks.h"
#include "qlora_native/error.h"

namespace qlora_native {
namespace {

// A product takes the last way in its line of this table whose number of rows it reaches.
//
//   this instruction set has      few_rows    vectors   tiles   panels
//   vectors                       1 (Y)       9         -       -
//   vectors; the dense tiles      1 (Y)       9         -       33
//   vectors; dense is ahead       1 (Y)       9         -       1024, without dropout, of 448 columns or more
//   tiles                         1 (Y)       1 (dX)    4       1024, without dropout
//
// "The dense tiles" is fp16 on a processor with AMX-FP16, whose tiles only the host program's product uses here. "Dense
// is ahead" is fp32 with AVX-512 without BF16 (dense_product_is_ahead).
// Neither the weight's shape nor the number of threads decides: every way costs in proportion to N * K, and results
// must be the same for any number of threads.
struct Thresholds {
  std::int64_t vectors, tiles, panels;
};
constexpr std::int64_t kNever = INT64_MAX;

// For each row vectors cost as much as a dense product, and W is decoded once, as it is before a dense product.
constexpr Thresholds kByVectors{kMostFewRows + 1, kNever, kNever};
// On the processors that have both, tiles multiply 14 times as fast as fp32 vectors (3500 against 243 GFLOP/s a core).
// So decoding W to memory and multiplying 16 rows by it costs little more than the decoding, which takes 3 ms for 4096
// x 4096 there. In 3 ms vectors multiply 33 rows.
constexpr Thresholds kDenseTiles{kMostFewRows + 1, kNever, 33};
// The dense product packs its left operand anew for each panel. On an AMD EPYC (Zen 4) panels of 512 columns took 0.99
// to 1.06 times as long as torch's product of 1024 or 2048 rows with all of W, and panels of 128 columns 1.26 times. An
// inner dimension of 4096 leaves 512 columns in fp32.
constexpr Thresholds kDenseAhead{kMostFewRows + 1, kNever, 1024};
constexpr std::int64_t kWidePanel = 448;
// With 4096 x 4096 weights, vectors of pairs take 0.48 ms for the first row of x, which is how long memory takes, and
// 0.14 for each other one; a tile product takes 0.8 ms for 1 ... 16 rows. From 1024 rows on the host's dense product is
// faster than one that decodes on the way by more than it costs to decode panels: 15.7 against 18.5 ms, and 29 against
// 39 for 2048 rows (measured with a first kernel).
constexpr Thresholds kByTiles{4, 4, 1024};

std::int64_t columns_of_panel(const WayProblem& p) {
  const std::int64_t inner = p.product == WayProblem::Product::forward ? p.K : p.N;
  return panel_columns(std::max(inner, p.rank), p.dtype);
}

bool can_take(const WayProblem& p, Way way) {
  switch (way) {
    case Way::few_rows:
      return p.product == WayProblem::Product::forward && p.M <= kMostFewRows;
    case Way::vectors:
      return true;
    case Way::tiles:
      return p.tiles;
    case Way::panels:
      return p.dense_gemm && !p.dropout && p.one_adapter && columns_of_panel(p) > 0;
  }
  return false;
}

const char* name_of(Way way) {
  switch (way) {
    case Way::few_rows:
      return "few_rows";
    case Way::vectors:
      return "vectors";
    case Way::tiles:
      return "tiles";
    case Way::panels:
      return "panels";
  }
  return "";
}

std::optional<Way> forced_way() {
  const char* forced = std::getenv("QLN_FORCE_WAY");
  if (forced == nullptr || *forced == '\0') return std::nullopt;
  for (const Way way : {Way::few_rows, Way::vectors, Way::tiles, Way::panels})
    if (std::string(forced) == name_of(way)) return way;
  throw Unavailable("QLN_FORCE_WAY: expected few_rows, vectors, tiles or panels, got \"" + std::string(forced) + "\"");
}

// Whether the host program's dense product has tile products of this dtype. An instruction set that QLN_FORCE_ISA names
// stands for a machine that has no better one.
bool dense_product_has_tiles(DType dtype) {
  static const bool in_use = cpu_isa() == "amx_bf16", fp16 = has_amx_fp16();
  return in_use && (dtype == DType::bf16 || (dtype == DType::f16 && fp16));
}
// Whether a dense product of 1024 rows or more is faster than the vectors of this instruction set by more than it costs
// to decode panels. That is so of fp32 and AVX-512 without BF16: on an Intel Xeon (Cascade Lake) vectors took 1.20
// times as long as torch's product, for they decode W again for each 480 rows, and there a permutation takes the place
// of a product. On an AMD EPYC (Zen 4) vectors are faster than torch's product.
bool dense_product_is_ahead(DType dtype) {
  static const bool in_use = cpu_isa() == "avx512";
  return in_use && dtype == DType::f32;
}

}  // namespace

Way choose_way(const WayProblem& p) {
  const bool dense_is_ahead = p.dense_ahead && columns_of_panel(p) >= kWidePanel;
  const Thresholds from = p.tiles ? kByTiles : p.dense_tiles ? kDenseTiles : dense_is_ahead ? kDenseAhead : kByVectors;
  if (p.M >= from.panels && can_take(p, Way::panels)) return Way::panels;
  if (p.M >= from.tiles && can_take(p, Way::tiles)) return Way::tiles;
  if (p.M < from.vectors && can_take(p, Way::few_rows)) return Way::few_rows;
  return Way::vectors;
}

Way way_of(const WayProblem& problem) {
  static const std::optional<Way> forced = forced_way();  // tried again at the next call if it throws
  return forced && can_take(problem, *forced) ? *forced : choose_way(problem);
}

WayProblem way_problem(WayProblem::Product product, const QuantizedWeightView& weight, const LoraView& lora,
                       const WeightRows& rows, DType dtype, bool tiles) {
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
          .tiles = tiles,
          .dense_gemm = hooks().dense_gemm != nullptr,
          .dense_tiles = dense_product_has_tiles(dtype),
          .dense_ahead = dense_product_is_ahead(dtype)};
}

std::string text_of(const WayProblem& p, Way way) {
  const auto number = [](std::int64_t n) { return std::to_string(n); };
  const bool forward = p.product == WayProblem::Product::forward;
  std::string text = forward ? "Y" : "dX";
  text += " [" + number(p.M) + ", " + number(forward ? p.N : p.K) + "] of W [" + number(p.N) + ", " + number(p.K) +
          "] in " + qlora_native::name_of(p.dtype);
  if (p.rank > 0) text += ", rank " + number(p.rank);
  if (!p.one_adapter) text += ", several adapters";
  if (p.dropout) text += ", dropout";
  return text + ": " + name_of(way);
}

void print_if_asked(const WayProblem& problem, Way way) {
  static const bool asked = [] {
    const char* value = std::getenv("QLN_PRINT_CONFIG");
    return value != nullptr && *value == '1';
  }();
  if (asked) std::fprintf(stderr, "%s\n", text_of(problem, way).c_str());
}

}  // namespace qlora_native
