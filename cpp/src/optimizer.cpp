#include "qlora_native/optimizer.h"

#include "backend.h"
#include "check.h"
#include "common/optimizer.h"

namespace qlora_native {
namespace {

// Returns a function that names a field of an item of a list. The name becomes a text only if there is an error.
auto field_of(const char* list, std::int64_t index) {
  return
      [=](const char* field) { return [=] { return std::string(list) + "[" + std::to_string(index) + "]." + field; }; };
}

void check_group(const Optimizer8bitGroup& group, Algorithm algorithm, const Stream& stream, std::int64_t index) {
  const auto field = field_of("groups", index);
  const auto is_rate = [](double beta) { return beta >= 0.0 && beta < 1.0; };
  const auto check_size = [&](double value, const char* name) {
    check(is_finite_size(value), field(name), "a finite number >= 0", value);
  };
  // If only the device can read *device_lr, it checks the value itself and skips the step if that is bad.
  if (group.device_lr == nullptr || stream.device == Device::cpu) check_size(lr_of(group), "lr");
  check(is_rate(group.beta1), field("beta1"), "a number in [0, 1)", group.beta1);
  check(is_rate(group.beta2), field("beta2"), "a number in [0, 1)", group.beta2);
  check_size(group.eps, "eps");
  check_size(group.weight_decay, "weight_decay");
  if (algorithm != Algorithm::ademamix) return;
  check(is_rate(group.beta3), field("beta3"), "a number in [0, 1)", group.beta3);
  check_size(group.alpha, "alpha");
  check_size(group.t_alpha, "t_alpha");
  check_size(group.t_beta3, "t_beta3");
  if (group.t_beta3 == 0.0) return;
  check(group.beta1 > 0.0, field("beta1"), "a number in (0, 1), as t_beta3 takes its logarithm", group.beta1);
  check(group.beta3 > 0.0, field("beta3"), "a number in (0, 1), as t_beta3 takes its logarithm", group.beta3);
}

void check_tensor(const Optimizer8bitTensor& tensor, Algorithm algorithm, int group_count, const Stream& stream,
                  std::int64_t index) {
  const auto field = field_of("tensors", index);
  check(tensor.elements >= 0, field("elements"), ">= 0", tensor.elements);
  check_elements(tensor.elements, 1, field("elements"));
  check_dtype(tensor.param_dtype, field("param_dtype"));
  check_dtype(tensor.grad_dtype, field("grad_dtype"));
  check(
      tensor.group >= 0 && tensor.group < group_count, field("group"),
      [&] { return "below " + std::to_string(group_count); }, tensor.group);
  check_pointer(tensor.step, true, field("step"));
  if (stream.device == Device::cpu) {
    constexpr std::int64_t kMaxSteps = std::numeric_limits<std::int64_t>::max();  // the counter cannot exceed this
    check(*tensor.step >= 0, field("step"), ">= 0", *tensor.step);
    check(*tensor.step < kMaxSteps, field("step"), "fewer than 2^63 - 1 steps", *tensor.step);
  }
  const bool any = tensor.elements > 0;
  check_pointer(tensor.param, any, field("param"));
  check_pointer(tensor.grad, any, field("grad"));
  constexpr const char* kStates[kMaxMoments] = {"state1", "state2", "state3"};
  constexpr const char* kScales[kMaxMoments] = {"absmax1", "absmax2", "absmax3"};
  const int moments = moments_of(algorithm);
  bool in_8_bits = false;
  for (int i = 0; i < moments; ++i) in_8_bits |= absmax_of(tensor, i) != nullptr;
  for (int i = 0; i < moments; ++i) {
    check_pointer(state_of(tensor, i), any, field(kStates[i]));
    check_pointer(absmax_of(tensor, i), any && in_8_bits, field(kScales[i]));
  }
}

}  // namespace

void optimizer_8bit_step(const Optimizer8bitArgs& args, const Stream& stream) {
  check(args.algorithm >= Algorithm::adamw && args.algorithm <= Algorithm::ademamix, "algorithm", "an Algorithm",
        static_cast<int>(args.algorithm));
  check(args.count >= 0, "count", ">= 0", args.count);
  check_pointer(args.tensors, args.count > 0, "tensors");
  check(args.group_count >= 0, "group_count", ">= 0", args.group_count);
  check_pointer(args.groups, args.group_count > 0, "groups");
  check_pointer(args.skipped, true, "skipped");
  for (int i = 0; i < args.group_count; ++i) check_group(args.groups[i], args.algorithm, stream, i);
  for (std::int64_t i = 0; i < args.count; ++i) {
    check_tensor(args.tensors[i], args.algorithm, args.group_count, stream, i);
  }
  backend_for(stream).optimizer_8bit_step(args, stream);
}

}  // namespace qlora_native
