// The torch op of the optimizers: schema and implementation. Its fake kernel is in python/qlora_native/_core/ops.py.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "algorithm.h"
#include "common/layout.h"
#include "common/optimizer.h"
#include "tensors.h"

namespace qlora_native {
namespace {

using Tensors = std::vector<Tensor>;

void check_length(std::size_t length, std::size_t expected, const char* list) {
  check(length == expected, list, [&] { return std::to_string(expected) + " items"; }, length);
}

// The group of each of the `count` parameters, from the number of parameters in each group.
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

// Walks through a list of state tensors, one parameter after the other. A tensor belongs to one parameter, or is flat
// and belongs to several, one after another. In a flat one each parameter has whole blocks of kOptimizer8bitBlocksize
// elements, at least one.
class StateCursor {
 public:
  StateCursor(const Tensors& tensors, const char* list, const Tensor& like)
      : tensors_(tensors), list_(list), like_(like) {}

  ScalarType type() const {
    check(index_ < tensors_.size(), list_, "one for each parameter", "fewer");
    return tensors_[index_].scalar_type();
  }

  ListItem name() const { return {list_, static_cast<std::int64_t>(index_)}; }

  // The `count` elements of the next parameter. In a flat tensor it has `per_block` elements for each of its blocks.
  void* next(ScalarType type, std::int64_t count, std::int64_t blocks, std::int64_t per_block) {
    check(index_ < tensors_.size(), list_, "one for each parameter", "fewer");
    const Tensor& tensor = tensors_[index_];
    if (used_ == 0) {
      numel_ = tensor.numel();
      data_ = static_cast<std::byte*>(data_of(tensor, type, numel_ > count ? numel_ : count, like_, name()));
      type_ = type;
    }
    check(type == type_, name(), [&] { return name_of_type(type); }, [&] { return name_of_type(type_); });
    const bool alone = used_ == 0 && numel_ == count;
    const std::int64_t length = alone ? count : (blocks > 0 ? blocks : 1) * per_block;
    check(length <= numel_ - used_, name(), [&] { return std::to_string(used_ + length) + " elements"; }, numel_);
    std::byte* const taken = data_ + used_ * size_of_type(type);
    used_ += length;
    if (used_ == numel_) {
      ++index_;
      used_ = 0;
    }
    return taken;
  }

  void check_end() const { check(index_ == tensors_.size(), list_, "what belongs to the parameters", "more"); }

 private:
  static std::int64_t size_of_type(ScalarType type) {
    return type == ScalarType::Byte ? 1 : type == ScalarType::Float ? 4 : 8;
  }

  const Tensors& tensors_;
  const char* list_;
  const Tensor& like_;
  std::size_t index_ = 0;  // of the current tensor
  std::byte* data_ = nullptr;
  std::int64_t numel_ = 0, used_ = 0;
  ScalarType type_ = ScalarType::Undefined;
};

// Whether each element has memory of its own: ordered by size, each stride leads past all that the smaller ones reach.
bool has_distinct_elements(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // (stride, size)
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] > 1) dims.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dims.begin(), dims.end());
  std::int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

template <class Ints>
std::string shape_text(const Ints& sizes) {
  std::string text = "[";
  for (std::size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "]";
}

template <class Name>
void check_same_shape(const Tensor& grad, const Tensor& param, const Name& argument) {
  const auto sizes = grad.sizes(), expected = param.sizes();
  check(
      sizes.size() == expected.size() && std::equal(sizes.begin(), sizes.end(), expected.begin()), argument,
      [&] { return "shape " + shape_text(expected) + ", as the parameter's"; }, [&] { return shape_text(sizes); });
}

using Numbers = std::vector<double>;

void optimizer_8bit_step_op(StringHandle algorithm_name, const Tensors& params, const Tensors& grads,
                            const Tensors& state1, const Tensors& state2, const Tensors& absmax1,
                            const Tensors& absmax2, const Tensors& steps, const std::vector<std::int64_t>& group_sizes,
                            const Numbers& lr, const Numbers& beta1, const Numbers& beta2, const Numbers& eps,
                            const Numbers& weight_decay, const OptionalTensor& inv_scale,
                            const OptionalTensor& found_inf, const Tensor& skipped, const Tensors& lr_tensors,
                            const std::vector<std::int64_t>& lr_groups, const Numbers& beta3, const Numbers& alpha,
                            const Numbers& t_alpha, const Numbers& t_beta3, bool check_only) {
  const Algorithm algorithm = algorithm_of(take_text(algorithm_name));
  const std::size_t count = params.size();
  check_length(grads.size(), count, "grads");
  for (const auto* values : {&lr, &beta1, &beta2, &eps, &weight_decay}) {
    check_length(values->size(), group_sizes.size(), "lr, beta1, beta2, eps and weight_decay");
  }
  const std::vector<int> group_of = groups_of(group_sizes, count);
  std::vector<Optimizer8bitGroup> groups(group_sizes.size());
  for (std::size_t i = 0; i < groups.size(); ++i) {
    groups[i] = {.lr = lr[i], .beta1 = beta1[i], .beta2 = beta2[i], .eps = eps[i], .weight_decay = weight_decay[i]};
  }
  if (algorithm == Algorithm::ademamix) {
    for (const auto* values : {&beta3, &alpha, &t_alpha, &t_beta3}) {
      check_length(values->size(), groups.size(), "beta3, alpha, t_alpha and t_beta3");
    }
    for (std::size_t i = 0; i < groups.size(); ++i) {
      groups[i].beta3 = beta3[i];
      groups[i].alpha = alpha[i];
      groups[i].t_alpha = t_alpha[i];
      groups[i].t_beta3 = t_beta3[i];
    }
  }
  check_length(lr_tensors.size(), lr_groups.size(), "lr_tensors");
  for (std::size_t i = 0; i < lr_groups.size(); ++i) {
    const auto group = static_cast<std::size_t>(lr_groups[i]);  // a negative index becomes a large one
    check(
        group < groups.size(), "lr_groups", [&] { return "indices below " + std::to_string(groups.size()); },
        lr_groups[i]);
    groups[group].device_lr = static_cast<const float*>(
        data_of(lr_tensors[i], ScalarType::Float, 1, skipped, ListItem{"lr_tensors", static_cast<std::int64_t>(i)}));
  }

  // Contiguous copies of parameters and gradients that have other strides.
  Tensors copies;
  std::vector<std::pair<Tensor, Tensor>> written;  // (parameter, its copy, which the core updates)
  std::vector<Optimizer8bitTensor> tensors(count);
  StateCursor states1(state1, "state1", skipped), states2(state2, "state2", skipped),
      all_steps(steps, "steps", skipped);
  StateCursor absmaxes1(absmax1, "absmax1", skipped), absmaxes2(absmax2, "absmax2", skipped);
  const int moments = moments_of(algorithm), moments_in_state1 = moments == 3 ? 2 : 1;  // the third is there
  for (std::size_t i = 0; i < count; ++i) {
    Optimizer8bitTensor& tensor = tensors[i];
    const auto name = [&](const char* list) { return ListItem{list, static_cast<std::int64_t>(i)}; };
    const ScalarType param_type = params[i].scalar_type(), grad_type = grads[i].scalar_type();
    const std::int64_t elements = params[i].numel();
    const std::int64_t blocks = ceil_div(elements, kOptimizer8bitBlocksize);
    tensor.elements = elements;
    tensor.group = group_of[i];
    tensor.param_dtype = dtype_of(param_type, name("params"));
    tensor.grad_dtype = dtype_of(grad_type, name("grads"));
    const auto contiguous = [&](const Tensor& from, const char* list) {
      if (from.is_contiguous()) return from;
      check_memory(from, name(list));
      return copies.emplace_back(torch::stable::contiguous(from));
    };
    check_same_shape(grads[i], params[i], name("grads"));
    const Tensor param = contiguous(params[i], "params");
    if (!params[i].is_contiguous()) {
      check(has_distinct_elements(params[i]), name("params"), "elements that each have memory of their own", [&] {
        return "shape " + shape_text(params[i].sizes()) + " with strides " + shape_text(params[i].strides());
      });
      written.emplace_back(params[i], param);
    }
    tensor.param = data_of(param, param_type, elements, skipped, name("params"));
    tensor.grad = data_of(contiguous(grads[i], "grads"), grad_type, elements, skipped, name("grads"));
    const ScalarType state_type = states1.type();
    check(state_type == ScalarType::Byte || state_type == ScalarType::Float, states1.name(), "uint8 or float32",
          [&] { return name_of_type(state_type); });
    const bool in_8_bits = state_type == ScalarType::Byte;
    tensor.state1 =
        states1.next(state_type, moments_in_state1 * elements, blocks, moments_in_state1 * kOptimizer8bitBlocksize);
    if (moments > 1) tensor.state2 = states2.next(state_type, elements, blocks, kOptimizer8bitBlocksize);
    if (in_8_bits) {
      tensor.absmax1 =
          static_cast<float*>(absmaxes1.next(ScalarType::Float, moments_in_state1 * blocks, blocks, moments_in_state1));
      if (moments > 1) tensor.absmax2 = static_cast<float*>(absmaxes2.next(ScalarType::Float, blocks, blocks, 1));
    }
    if (moments == 3) {
      tensor.state3 = static_cast<std::byte*>(tensor.state1) + elements * (in_8_bits ? 1 : 4);
      if (in_8_bits) tensor.absmax3 = tensor.absmax1 + blocks;
    }
    tensor.step = static_cast<std::int64_t*>(all_steps.next(ScalarType::Long, 1, 1, 1));
  }
  for (const StateCursor* list : {&states1, &states2, &absmaxes1, &absmaxes2, &all_steps}) list->check_end();

  Optimizer8bitArgs args;
  args.algorithm = algorithm;
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
  Operands operands;
  const auto add = [&](const Tensors& list, const char* name, bool written) {
    for (std::size_t i = 0; i < list.size(); ++i) operands.add(list[i], {name, static_cast<std::int64_t>(i)}, written);
  };
  add(params, "params", true);
  add(grads, "grads", false);
  add(state1, "state1", true);
  add(state2, "state2", true);
  add(absmax1, "absmax1", true);
  add(absmax2, "absmax2", true);
  add(steps, "steps", true);
  add(lr_tensors, "lr_tensors", false);
  if (inv_scale) operands.add(*inv_scale, {"inv_scale"}, false);
  if (found_inf) operands.add(*found_inf, {"found_inf"}, false);
  operands.add(skipped, {"skipped"}, true);
  operands.check_apart();
  const auto write = [&] {
    for (auto& [param, copy] : written) torch::stable::copy_(param, copy);
  };
  write();  // the values that are there: what torch refuses to write, it refuses before anything has changed
  if (check_only) return;
  optimizer_8bit_step(args, stream_of(skipped));
  write();
}

template <class Library>
void implement_optimizer(Library& library) {
  library.impl("optimizer_8bit_step", TORCH_BOX(&optimizer_8bit_step_op));
}

}  // namespace
}  // namespace qlora_native

// algorithm: adamw; lion, which has no state2 and no absmax2; or ademamix, where state1 is [2, elements] and absmax1
// [2, blocks], for the fast moment and then the slow one. Only ademamix reads beta3, alpha, t_alpha and t_beta3.
//
// Parameters are in the order of their groups. absmax1 and absmax2 list the parameters whose state is uint8, in order.
// lr_tensors[i], one fp32 value, replaces lr[lr_groups[i]]. A tensor of state1, state2, absmax1, absmax2 or steps may
// be flat and belong to several parameters (StateCursor). A step that is skipped writes nothing but `skipped`
// (optimizer.h). One that raises has written nothing. With check_only the tensors are checked, and no step is made.
STABLE_TORCH_LIBRARY_FRAGMENT(qlora_native, library) {
  library.def(
      "optimizer_8bit_step(str algorithm, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, "
      "Tensor(c!)[] state2, Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor(f!)[] steps, int[] group_sizes, "
      "float[] lr, float[] beta1, float[] beta2, float[] eps, float[] weight_decay, Tensor? inv_scale, "
      "Tensor? found_inf, Tensor(g!) skipped, Tensor[] lr_tensors, int[] lr_groups, float[] beta3=[], "
      "float[] alpha=[], float[] t_alpha=[], float[] t_beta3=[], bool check_only=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_native, CPU, library) { qlora_native::implement_optimizer(library); }
STABLE_TORCH_LIBRARY_IMPL(qlora_native, CUDA, library) { qlora_native::implement_optimizer(library); }
