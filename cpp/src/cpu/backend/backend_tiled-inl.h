// The products of linear.h in bfloat16 by tiles. A backend.cpp includes this file after a DotBf16 and a class Tiles.
#pragma once

#include "cpu/backend/backend_bf16-inl.h"
#include "cpu/backend/isa.h"
#include "cpu/product/backward-inl.h"
#include "cpu/product/config.h"
#include "cpu/product/forward_tiles-inl.h"
#include "cpu/product/make_job-inl.h"
#include "cpu/product/panels-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

struct DotTiles : DotBf16 {
  using Tiles = QLN_ISA::Tiles;
  // Elements of the inner dimension that are decoded at once. A and B of a block of 2 x 2 tiles are then 32 KB each, so
  // that one of them stays in a first-level cache of 48 KB while the other one passes.
  static constexpr std::int64_t kBlock = 512;
};

// A backend that multiplies bfloat16 by tiles, or by panels, and does all else as another backend does. With kOtherWays
// that one multiplies bfloat16 too where config.h chooses neither; without, tiles multiply few rows too.
template <const CpuBackend& (*kOthers)(), bool kOtherWays>
struct TiledBackend {
  static std::unique_ptr<Job> forward(const LinearForwardArgs& args, const WeightRows& part) {
    switch (choose(WayProblem::Product::forward, args.weight, args.lora, part, args.x.dtype)) {
      case Way::tiles:
        return make_job<DotTiles, ForwardMany, DotTiles>(args, part);
      case Way::panels:
        return make_job<DotF32<DType::bf16>, ForwardPanels, DotTiles>(args, part);
      default:
        return kOthers().bf16->forward(args, part);
    }
  }
  static std::unique_ptr<Job> backward_input(const LinearBackwardInputArgs& args, const WeightRows& part) {
    switch (choose(WayProblem::Product::backward_input, args.weight, args.lora, part, args.dy.dtype)) {
      case Way::tiles:
        return make_job<DotTiles, BackwardInput, DotTiles>(args, part);
      case Way::panels:
        return make_job<DotF32<DType::bf16>, BackwardInputPanels, DotTiles>(args, part);
      default:
        return kOthers().bf16->backward_input(args, part);
    }
  }

  static constexpr Products kProducts{forward, backward_input, lora_gradient_a<DotTiles>, lora_gradient_b<DotTiles>};

  static CpuBackend backend() { return with_bf16_products<DotTiles, kProducts, kOthers>(); }

 private:
  // The other backend chooses between the ways that are left, and prints its choice.
  static Way choose(WayProblem::Product product, const QuantizedWeightView& weight, const LoraView& lora,
                    const WeightRows& part, DType dtype) {
    const WayProblem problem = way_problem(product, weight, lora, part, dtype, true);
    Way way = way_of(problem);
    if (!kOtherWays && way != Way::panels) way = Way::tiles;
    if (way == Way::tiles || way == Way::panels) print_if_asked(problem, way);
    return way;
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
