// The three functions of linear.h for activations of one dtype, each by the way that way.h chooses.
#pragma once

#include "cpu/generic/backward-inl.h"
#include "cpu/generic/forward_few-inl.h"
#include "cpu/generic/forward_many-inl.h"
#include "cpu/generic/panels-inl.h"
#include "cpu/way.h"

namespace qlora_native {
namespace {

template <class Dot>
struct Linear {
  static void forward(const LinearForwardArgs& args) {
    if (args.x.rows == 0) return;
    switch (choose(WayProblem::Product::forward, args.weight, args.lora, args.x)) {
      case Way::few_rows:
        return with_rows<Dot>(args.weight, [&](const auto& rows) { FewRows<Dot>::forward(rows, args); });
      case Way::panels:
        return with_rows<Element>(args.weight, [&](const auto& rows) { Panels<Dot>::forward(rows, args); });
      default:
        return with_rows<Dot>(args.weight, [&](const auto& rows) { ManyRows<Dot>::forward(rows, args); });
    }
  }
  static void backward_input(const LinearBackwardInputArgs& args) {
    if (args.dy.rows == 0) return;
    if (choose(WayProblem::Product::backward_input, args.weight, args.lora, args.dy) == Way::panels)
      with_rows<Element>(args.weight, [&](const auto& rows) { Panels<Dot>::backward_input(rows, args); });
    else
      with_rows<Dot>(args.weight, [&](const auto& rows) { Backward<Dot>::input(rows, args); });
  }
  // Panels have no part in it, for both matrices are dense; the inner dimension is the rows of x.
  static void lora_gradients(const LoraGradientsArgs& args) { Backward<Dot>::gradients(args); }

 private:
  using Element = DotF32<Dot::kActivation>;  // what panels decode: one element after the other, rounded

  static Way choose(WayProblem::Product product, const QuantizedWeightView& weight, const LoraView& lora,
                    const ConstMatrix& activations) {
    const WayProblem problem = way_problem(product, weight, lora, activations, false);
    const Way way = way_of(problem);
    print_if_asked(problem, way);
    return way;
  }
};

}  // namespace
}  // namespace qlora_native
