// linear.h's products of bfloat16 by tiles. To be included after a DotBf16 and a class Tiles.
#pragma once

#include "backend.h"
#include "cpu/generic/backward-inl.h"
#include "cpu/generic/forward_many-inl.h"
#include "cpu/way.h"

namespace qlora_native {
namespace {

struct DotTiles : DotBf16 {
  using Tiles = qlora_native::Tiles;
  // Elements of the inner dimension that are decoded at once. Of a block of 2 x 2 tiles, A and B are 32 KB each: one of
  // them stays in a first-level cache of 48 KB while the other one passes.
  static constexpr std::int64_t kBlock = 512;
};

// A backend that multiplies bfloat16 by tiles, and does all else as another one. kOtherWays: that one multiplies
// bfloat16 too, wherever way.h does not choose tiles; else tiles multiply any number of rows.
template <const Backend& (*kOthers)(), bool kOtherWays>
struct TiledBackend {
  static void forward(const LinearForwardArgs& args, const Stream& stream) {
    if (!takes_tiles(WayProblem::Product::forward, args.weight, args.lora, args.x))
      return kOthers().linear_forward(args, stream);
    with_rows<DotTiles>(args.weight, [&](const auto& rows) { ManyRows<DotTiles>::forward(rows, args); });
  }
  static void backward_input(const LinearBackwardInputArgs& args, const Stream& stream) {
    if (!takes_tiles(WayProblem::Product::backward_input, args.weight, args.lora, args.dy))
      return kOthers().linear_backward_input(args, stream);
    with_rows<DotTiles>(args.weight, [&](const auto& rows) { Backward<DotTiles>::input(rows, args); });
  }
  static void gradients(const LoraGradientsArgs& args, const Stream& stream) {
    if (args.x.dtype != DType::bf16) return kOthers().lora_gradients(args, stream);
    Backward<DotTiles>::gradients(args);
  }

  static Backend backend() {
    Backend backend = kOthers();
    backend.linear_forward = forward;
    backend.linear_backward_input = backward_input;
    backend.lora_gradients = gradients;
    return backend;
  }

 private:
  // The other backend chooses among the ways that are left, and prints which it takes.
  static bool takes_tiles(WayProblem::Product product, const QuantizedWeightView& weight, const LoraView& lora,
                          const ConstMatrix& activations) {
    if (activations.dtype != DType::bf16 || activations.rows == 0) return false;
    const WayProblem problem = way_problem(product, weight, lora, activations, true);
    if (kOtherWays && way_of(problem) != Way::tiles) return false;
    print_if_asked(problem, Way::tiles);
    return true;
  }
};

}  // namespace
}  // namespace qlora_native
