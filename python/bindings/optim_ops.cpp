// The torch op of the optimizer, as ops.cpp has those of the products. Its fake is in python/qlora_native/_ops.py.
#include <cstdint>
#include <vector>

#include "qlora_native/adamw.h"
#include "tensors.h"

namespace qlora_native {
namespace {

using Tensors = std::vector<Tensor>;

void check_length(std::size_t length, std::size_t expected, const char* list) {
  check(length == expected, list, [&] { return std::to_string(expected) + " items"; }, length);
}

// How many tensors come from each group: together `count`.
std::vector<int> groups_of(const std::vector<std::int64_t>& group_sizes, std::size_t count) {
  std::vector<int> groups;
  groups.reserve(count);
  for (std::size_t i = 0; i < group_sizes.size(); ++i) {
    const std::int64_t size = group_sizes[i];
    check(
        size >= 0 && static_cast<std::size_t>(size) <= count - groups.size(), "group_sizes",
        [&] { return "a sum of " + std::to_string(count); }, "more, or a negative size");
    groups.insert(groups.end(), static_cast<std::size_t>(size), static_cast<int>(i));
  }
  check(groups.size() == count, "group_sizes", [&] { return "a sum of " + std::to_string(count); }, groups.size());
  return groups;
}

void adamw_8bit_step_op(const Tensors& params, const Tensors& grads, const Tensors& state1, const Tensors& state2,
                        const Tensors& absmax1, const Tensors& absmax2, const Tensors& steps,
                        const std::vector<std::int64_t>& group_sizes, const std::vector<double>& lr,
                        const std::vector<double>& beta1, const std::vector<double>& beta2,
                        const std::vector<double>& eps, const std::vector<double>& weight_decay,
                        const OptionalTensor& inv_scale, const OptionalTensor& found_inf, const Tensor& skipped) {
  const std::size_t count = params.size();
  check_length(grads.size(), count, "grads");
  check_length(state1.size(), count, "state1");
  check_length(state2.size(), count, "state2");
  check_length(steps.size(), count, "steps");
  check_length(absmax2.size(), absmax1.size(), "absmax2");
  for (const auto* values : {&lr, &beta1, &beta2, &eps, &weight_decay}) {
    check_length(values->size(), group_sizes.size(), "lr, beta1, beta2, eps and weight_decay");
  }
  const std::vector<int> group_of = groups_of(group_sizes, count);
  std::vector<AdamW8bitGroup> groups(group_sizes.size());
  for (std::size_t i = 0; i < groups.size(); ++i) {
    groups[i] = {.lr = lr[i], .beta1 = beta1[i], .beta2 = beta2[i], .eps = eps[i], .weight_decay = weight_decay[i]};
  }

  std::vector<AdamW8bitTensor> tensors(count);
  std::size_t in_8_bits = 0;  // of the tensors before
  for (std::size_t i = 0; i < count; ++i) {
    AdamW8bitTensor& tensor = tensors[i];
    const auto name = [&](const char* list) { return ListItem{list, static_cast<std::int64_t>(i)}; };
    const ScalarType param_type = params[i].scalar_type(), grad_type = grads[i].scalar_type();
    const ScalarType state_type = state1[i].scalar_type();
    const std::int64_t elements = params[i].numel();
    tensor.elements = elements;
    tensor.group = group_of[i];
    tensor.param_dtype = dtype_of(param_type, name("params"));
    tensor.grad_dtype = dtype_of(grad_type, name("grads"));
    tensor.param = data_of(params[i], param_type, elements, skipped, name("params"));
    tensor.grad = data_of(grads[i], grad_type, elements, skipped, name("grads"));
    check(state_type == ScalarType::Byte || state_type == ScalarType::Float, name("state1"), "uint8 or float32",
          [&] { return name_of_type(state_type); });
    tensor.state1 = data_of(state1[i], state_type, elements, skipped, name("state1"));
    tensor.state2 = data_of(state2[i], state_type, elements, skipped, name("state2"));
    if (state_type == ScalarType::Byte) {
      check(in_8_bits < absmax1.size(), "absmax1", "one for each uint8 state", "fewer");
      const std::int64_t blocks = (elements + kAdamW8bitBlocksize - 1) / kAdamW8bitBlocksize;
      const auto absmax = [&](const Tensors& list, const char* argument) {
        const ListItem item{argument, static_cast<std::int64_t>(in_8_bits)};
        return static_cast<float*>(data_of(list[in_8_bits], ScalarType::Float, blocks, skipped, item));
      };
      tensor.absmax1 = absmax(absmax1, "absmax1");
      tensor.absmax2 = absmax(absmax2, "absmax2");
      ++in_8_bits;
    }
    tensor.step = static_cast<std::int64_t*>(data_of(steps[i], ScalarType::Long, 1, skipped, name("steps")));
  }
  check_length(absmax1.size(), in_8_bits, "absmax1");

  AdamW8bitArgs args;
  args.tensors = tensors.data();
  args.count = static_cast<std::int64_t>(count);
  args.groups = groups.data();
  args.group_count = static_cast<int>(groups.size());
  const auto scalar = [&](const OptionalTensor& tensor, const char* argument) {
    return tensor ? static_cast<const float*>(data_of(*tensor, ScalarType::Float, 1, skipped, argument)) : nullptr;
  };
  args.inv_scale = scalar(inv_scale, "inv_scale");
  args.found_inf = scalar(found_inf, "found_inf");
  args.skipped = static_cast<std::int64_t*>(data_of(skipped, ScalarType::Long, 1, skipped, "skipped"));
  adamw_8bit_step(args, stream_of(skipped));
}

template <class Library>
void implement_optimizer(Library& library) {
  library.impl("adamw_8bit_step", TORCH_BOX(&adamw_8bit_step_op));
}

}  // namespace
}  // namespace qlora_native

// Tensors stand in the order of their groups; absmax1 and absmax2 are those of the tensors whose state is uint8, in
// order. Everything mutated is written in place, or nothing but `skipped` (adamw.h).
STABLE_TORCH_LIBRARY_FRAGMENT(qlora_native, library) {
  library.def(
      "adamw_8bit_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, "
      "Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor(f!)[] steps, int[] group_sizes, float[] lr, float[] beta1, "
      "float[] beta2, float[] eps, float[] weight_decay, Tensor? inv_scale, Tensor? found_inf, Tensor(g!) skipped) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_native, CPU, library) { qlora_native::implement_optimizer(library); }
STABLE_TORCH_LIBRARY_IMPL(qlora_native, CUDA, library) { qlora_native::implement_optimizer(library); }
