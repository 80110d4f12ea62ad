#include "linear.h"

#include <cmath>
#include <stdexcept>

namespace qn = qlora_native;

namespace trainer {
namespace {

// What bitsandbytes writes beside the codes, as JSON in a tensor of bytes.
Json quant_state(const Checkpoint& checkpoint, const std::string& weight) {
  const Tensor& bytes = checkpoint.at(checkpoint.starting_with(weight + ".quant_state.bitsandbytes__"));
  return Json::parse({reinterpret_cast<const char*>(bytes.data), bytes.bytes});
}

std::int64_t size(const Json& state, std::size_t i) { return state["shape"].array().at(i).integer(); }

constexpr qn::DType kF32 = qn::DType::f32;

}  // namespace

Parameter::Parameter(std::size_t elements) : value(elements), grad(elements), step_(1) {
  constexpr std::size_t kSmallest8bit = 4096;  // bitsandbytes' min_8bit_size
  if (elements >= kSmallest8bit) {
    const std::size_t blocks = (elements + qn::kAdamW8bitBlocksize - 1) / qn::kAdamW8bitBlocksize;
    absmax1_.resize(blocks);
    absmax2_.resize(blocks);
  }
  const std::size_t bytes = elements * (absmax1_.empty() ? sizeof(float) : 1);
  state1_.resize(bytes);
  state2_.resize(bytes);
}

qn::AdamW8bitTensor Parameter::optimizer_view() {
  const bool in_8bit = !absmax1_.empty();
  return {.param = value.data(),
          .grad = grad.data(),
          .elements = static_cast<std::int64_t>(value.size()),
          .state1 = state1_.data(),
          .state2 = state2_.data(),
          .absmax1 = in_8bit ? absmax1_.data() : nullptr,
          .absmax2 = in_8bit ? absmax2_.data() : nullptr,
          .step = step_.data()};
}

QloraLinear::QloraLinear(const Checkpoint& checkpoint, std::string name, const LoraConfig& lora, std::mt19937& random)
    : name_(std::move(name)), config_(lora), a_(0), b_(0) {
  const std::string weight = name_ + ".weight";
  const Json state = quant_state(checkpoint, weight);
  weight_.N = size(state, 0);
  weight_.K = size(state, 1);
  weight_.blocksize = static_cast<int>(state["blocksize"].integer());
  const auto read = [&](const char* suffix, Floats& out, std::int64_t expected) -> const float* {
    const std::vector<float> values = checkpoint.floats(weight + suffix);
    out.assign(values.begin(), values.end());
    if (static_cast<std::int64_t>(out.size()) != expected)
      throw std::runtime_error(weight + suffix + ": expected " + std::to_string(expected) + " values");
    return out.data();
  };
  const auto read_bytes = [&](const std::string& tensor, Shared<std::uint8_t>& out, std::int64_t expected) {
    const Tensor& bytes = checkpoint.at(tensor);
    if (bytes.dtype != "U8" || bytes.elements() != expected)
      throw std::runtime_error(tensor + ": expected " + std::to_string(expected) + " bytes");
    const auto* first = reinterpret_cast<const std::uint8_t*>(bytes.data);
    out.assign(first, first + bytes.bytes);
    return out.data();
  };
  weight_.codes = read_bytes(weight, codes_, (weight_.elements() + 1) / 2);
  weight_.code = read(".quant_map", code_, 16);
  if (checkpoint.contains(weight + ".nested_absmax")) {
    weight_.nested_blocksize = static_cast<int>(state["nested_blocksize"].integer());
    offset_.assign(1, static_cast<float>(state["nested_offset"].number()));
    weight_.offset = offset_.data();
    weight_.absmax = read_bytes(weight + ".absmax", absmax_codes_, weight_.blocks());
    weight_.nested_code = read(".nested_quant_map", nested_code_, 256);
    weight_.nested_absmax = read(".nested_absmax", nested_absmax_,
                                 (weight_.blocks() + weight_.nested_blocksize - 1) / weight_.nested_blocksize);
  } else {
    weight_.absmax = read(".absmax", absmax_, weight_.blocks());
  }

  a_ = Parameter(static_cast<std::size_t>(config_.rank * in()));
  b_ = Parameter(static_cast<std::size_t>(out() * config_.rank));
  // PEFT's: Kaiming-uniform with a = sqrt(5), which is uniform within 1 / sqrt(K).
  const float limit = 1.0f / std::sqrt(static_cast<float>(in()));
  for (float& value : a_.value) value = limit * (2.0f * std::ldexp(static_cast<float>(random() >> 8), -24) - 1.0f);
}

qn::LoraView QloraLinear::lora() const {
  return {.rank = config_.rank,
          .a = a_.value.data(),
          .b = b_.value.data(),
          .scaling = config_.alpha / static_cast<float>(config_.rank),
          .dropout = seed_ == 0 ? 0.0f : config_.dropout,
          .seed = seed_};
}

void QloraLinear::forward(const float* x, std::int64_t rows, float* y, std::uint64_t seed) {
  x_ = x;
  seed_ = seed;
  u_.resize(static_cast<std::size_t>(rows * config_.rank));
  qn::linear_forward({.weight = weight_,
                      .lora = lora(),
                      .x = {x, kF32, rows, in(), in()},
                      .y = {y, kF32, rows, out(), out()},
                      .u = {u_.data(), kF32, rows, config_.rank, config_.rank}},
                     device().stream());
}

void QloraLinear::backward(const float* dy, std::int64_t rows, float* dx) {
  v_.resize(static_cast<std::size_t>(rows * config_.rank));
  const qn::Matrix v{v_.data(), kF32, rows, config_.rank, config_.rank};
  const qn::ConstMatrix gradient{dy, kF32, rows, out(), out()};
  qn::linear_backward_input(
      {.weight = weight_, .lora = lora(), .dy = gradient, .dx = {dx, kF32, rows, in(), in()}, .v = v},
      device().stream());
  qn::lora_gradients({.lora = lora(),
                      .x = {x_, kF32, rows, in(), in()},
                      .dy = gradient,
                      .u = {u_.data(), kF32, rows, config_.rank, config_.rank},
                      .v = {v_.data(), kF32, rows, config_.rank, config_.rank},
                      .da = a_.grad.data(),
                      .db = b_.grad.data()},
                     device().stream());
}

}  // namespace trainer
