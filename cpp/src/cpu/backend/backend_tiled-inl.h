// The products of linear.h in bfloat16 by tiles. A backend.cpp includes this file after a DotBf16 and a class Tiles.
#pragma once

#include "cpu/backend/backend_bf16-inl.h"
#include "cpu/backend/isa.h"
#include "cpu/product/backward-inl.h"
#include "cpu/product/config.h"
#include "cpu/product/forward-inl.h"
#include "cpu/product/panels-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

struct DotTiles : DotBf16 {
  using Tiles = QLN_ISA::Tiles;
  // Elements of the inner dimension that are decoded at once. A and B of a block of 2 x 2 tiles are then 32 KB each, so
  // that one of them stays in a first-level cache of 48 KB while the other one passes.
  static constexpr std::int64_t kBlock = 512;
};

// A backend that multiplies bfloat16 by tiles, or by panels, and does all else as another backend does. kForwardSmallM
// multiplies few rows, where config.h chooses small_m; if it is null, tiles multiply any number of rows.
template <const CpuBackend& (*kOthers)(), decltype(Products::forward) kForwardSmallM>
struct TiledBackend {
  static std::unique_ptr<Job> forward(const LinearForwardArgs& args, const WeightRows& part) {
    switch (choose(args, part)) {
      case cpu::ProductKernel::tiles:
        return make_job<Forward, DotTiles>(args, part);
      case cpu::ProductKernel::panels:
        return make_job<ForwardPanels, DotF32<DType::bf16>>(args, part);
      case cpu::ProductKernel::small_m:
        return kForwardSmallM(args, part);
      default:
        return kOthers().bf16->forward(args, part);
    }
  }
  static std::unique_ptr<Job> backward_input(const LinearBackwardInputArgs& args, const WeightRows& part) {
    switch (choose(args, part)) {
      case cpu::ProductKernel::tiles:
        return make_job<BackwardInput, DotTiles>(args, part);
      case cpu::ProductKernel::panels:
        return make_job<BackwardInputPanels, DotF32<DType::bf16>>(args, part);
      default:
        return kOthers().bf16->backward_input(args, part);
    }
  }

  static constexpr Products kProducts{forward, backward_input, lora_gradient<DotTiles>};

  static CpuBackend backend() { return with_bf16_products<DotTiles, kProducts, kOthers>(); }

 private:
  // The other backend logs what it multiplies.
  template <class Args>
  static cpu::ProductKernel choose(const Args& args, const WeightRows& part) {
    const cpu::ProductShape shape = cpu::product_shape(args, part, true);
    cpu::ProductKernel kernel = cpu::choose_product(shape, cpu::forced_kernel());
    if (kForwardSmallM == nullptr && kernel != cpu::ProductKernel::panels) kernel = cpu::ProductKernel::tiles;
    if (kernel != cpu::ProductKernel::vectors) cpu::log_product(shape, kernel);
    return kernel;
  }
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
