// The products of linear.h for activations of one dtype. Each goes the way that config.h chooses.
#pragma once

#include <memory>

#include "cpu/product/backward-inl.h"
#include "cpu/product/config.h"
#include "cpu/product/forward_small_m-inl.h"
#include "cpu/product/forward_tiles-inl.h"
#include "cpu/product/linear.h"
#include "cpu/product/panels-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

template <class Dot>
struct Linear {
  static std::unique_ptr<Job> forward(const LinearForwardArgs& args, const WeightRows& part) {
    switch (choose(WayProblem::Product::forward, args.weight, args.lora, part, args.x.dtype)) {
      case Way::few_rows:
        return make_job<Dot, ForwardFew, Dot>(args, part);
      case Way::panels:
        return make_job<Element, ForwardPanels, Dot>(args, part);
      default:
        return make_job<Dot, ForwardMany, Dot>(args, part);
    }
  }
  static std::unique_ptr<Job> backward_input(const LinearBackwardInputArgs& args, const WeightRows& part) {
    if (choose(WayProblem::Product::backward_input, args.weight, args.lora, part, args.dy.dtype) == Way::panels)
      return make_job<Element, BackwardInputPanels, Dot>(args, part);
    return make_job<Dot, BackwardInput, Dot>(args, part);
  }

 private:
  using Element = DotF32<Dot::kActivation>;  // panels hold elements in their order, rounded

  static Way choose(WayProblem::Product product, const QuantizedWeightView& weight, const LoraView& lora,
                    const WeightRows& part, DType dtype) {
    const WayProblem problem = way_problem(product, weight, lora, part, dtype, false);
    const Way way = way_of(problem);
    print_if_asked(problem, way);
    return way;
  }
};

template <class Dot>
constexpr Products kProductsOf{Linear<Dot>::forward, Linear<Dot>::backward_input, lora_gradient_a<Dot>,
                               lora_gradient_b<Dot>};

}  // namespace
}  // namespace qlora_native::QLN_ISA
