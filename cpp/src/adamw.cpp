#include "qlora_native/adamw.h"

#include "backend.h"
#include "check.h"

namespace qlora_native {
namespace {

void check_group(const AdamW8bitGroup& group, const std::string& name) {
  const auto is_rate = [](double beta) { return beta >= 0.0 && beta < 1.0; };
  const auto is_size = [](double value) { return std::isfinite(value) && value >= 0.0; };
  check(is_size(group.lr), name + ".lr", "a finite number >= 0", std::to_string(group.lr));
  check(is_rate(group.beta1), name + ".beta1", "a number in [0, 1)", std::to_string(group.beta1));
  check(is_rate(group.beta2), name + ".beta2", "a number in [0, 1)", std::to_string(group.beta2));
  check(is_size(group.eps), name + ".eps", "a finite number >= 0", std::to_string(group.eps));
  check(is_size(group.weight_decay), name + ".weight_decay", "a finite number >= 0",
        std::to_string(group.weight_decay));
}

void check_tensor(const AdamW8bitTensor& tensor, int group_count, const Stream& stream, const std::string& name) {
  check(tensor.elements >= 0, name + ".elements", ">= 0", std::to_string(tensor.elements));
  check(tensor.group >= 0 && tensor.group < group_count, name + ".group", "below " + std::to_string(group_count),
        std::to_string(tensor.group));
  check_pointer(tensor.step, true, name + ".step");
  if (stream.device == Device::cpu) check(*tensor.step >= 0, name + ".step", ">= 0", std::to_string(*tensor.step));
  const bool any = tensor.elements > 0;
  check_pointer(tensor.param, any, name + ".param");
  check_pointer(tensor.grad, any, name + ".grad");
  check_pointer(tensor.state1, any, name + ".state1");
  check_pointer(tensor.state2, any, name + ".state2");
  check_pointer(tensor.absmax1, any && tensor.absmax2 != nullptr, name + ".absmax1");
  check_pointer(tensor.absmax2, any && tensor.absmax1 != nullptr, name + ".absmax2");
}

}  // namespace

void adamw_8bit_step(const AdamW8bitArgs& args, const Stream& stream) {
  check(args.count >= 0, "count", ">= 0", std::to_string(args.count));
  check_pointer(args.tensors, args.count > 0, "tensors");
  check_pointer(args.groups, args.count > 0, "groups");
  check_pointer(args.skipped, true, "skipped");
  for (int i = 0; i < args.group_count; ++i) check_group(args.groups[i], "groups[" + std::to_string(i) + "]");
  for (std::int64_t i = 0; i < args.count; ++i) {
    check_tensor(args.tensors[i], args.group_count, stream, "tensors[" + std::to_string(i) + "]");
  }
  backend_for(stream).adamw_8bit_step(args, stream);
}

}  // namespace qlora_native
