#include "linear.h"

#include <cmath>
#include <limits>
#include <span>
#include <stdexcept>

#include "json.h"

namespace qn = qlora_native;

namespace trainer {
namespace {

// bitsandbytes writes the settings of a weight beside its codes, as JSON in a tensor of bytes whose name ends with the
// format.
Json quant_state(const Checkpoint& checkpoint, const std::string& weight) {
  for (const std::string format : {"nf4", "fp4"}) {
    const std::string name = weight + ".quant_state.bitsandbytes__" + format;
    if (!checkpoint.contains(name)) continue;
    const std::span<const std::uint8_t> bytes = checkpoint.bytes(name);
    const Json state = Json::parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, name);
    if (state["quant_type"].string() != format) state["quant_type"].fail(format);
    return state;
  }
  throw std::runtime_error(weight +
                           ": expected nf4 or fp4 of bitsandbytes, got no quant_state; a model in 16 bits is " +
                           "quantized first: python -m qlora_native quantize --model FOLDER --out FOLDER-nf4");
}

Shape shape_of(const Json& state) {
  Shape shape;
  for (const Json& size : state["shape"].array()) shape.push_back(size.integer(1));
  return shape;
}

constexpr qn::DType kF32 = qn::DType::f32;

}  // namespace

Parameter::Parameter(std::size_t elements) : value(elements), grad(elements), step_(1) {
  constexpr std::size_t kSmallest8bit = 4096;  // bitsandbytes' min_8bit_size
  if (elements >= kSmallest8bit) {
    const std::size_t blocks = (elements + qn::kOptimizer8bitBlocksize - 1) / qn::kOptimizer8bitBlocksize;
    absmax1_.resize(blocks);
    absmax2_.resize(blocks);
  }
  const std::size_t bytes = elements * (absmax1_.empty() ? sizeof(float) : 1);
  state1_.resize(bytes);
  state2_.resize(bytes);
}

qn::Optimizer8bitTensor Parameter::optimizer_view() {
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

QloraLinear::QloraLinear(const Checkpoint& checkpoint, std::string name, std::int64_t out, std::int64_t in,
                         const LoraConfig& lora, std::mt19937& random)
    : name_(std::move(name)),
      config_(lora),
      weight_{.N = out, .K = in},
      a_(static_cast<std::size_t>(lora.rank * in)),
      b_(static_cast<std::size_t>(out * lora.rank)) {
  read_weight(checkpoint);
  // PEFT initializes A Kaiming-uniform with a = sqrt(5), which is uniform within +-1 / sqrt(K).
  const float limit = 1.0f / std::sqrt(static_cast<float>(in));
  for (float& value : a_.value) value = limit * (2.0f * std::ldexp(static_cast<float>(random() >> 8), -24) - 1.0f);
}

void QloraLinear::read_weight(const Checkpoint& checkpoint) {
  const std::string weight = name_ + ".weight";
  const Json state = quant_state(checkpoint, weight);
  const Shape expected = {weight_.N, weight_.K}, shape = shape_of(state);
  if (shape != expected)
    throw std::runtime_error(weight + ": expected " + text_of(expected) + " as config.json says, got " +
                             in_a_line(text_of(shape)));
  weight_.blocksize = static_cast<int>(state["blocksize"].integer(32, 4096));
  const auto read = [&](const char* suffix, Floats& out, std::int64_t length) {
    const std::vector<float> values = checkpoint.floats(weight + suffix, {length});
    out.assign(values.begin(), values.end());
    return out.data();
  };
  const auto read_bytes = [&](const std::string& name, Shared<std::uint8_t>& out, std::int64_t length) {
    const std::span<const std::uint8_t> bytes = checkpoint.bytes(name);
    if (bytes.size() != static_cast<std::size_t>(length))
      throw std::runtime_error(name + ": expected " + std::to_string(length) + " bytes, got " +
                               std::to_string(bytes.size()));
    out.assign(bytes.begin(), bytes.end());
    return out.data();
  };
  weight_.codes = read_bytes(weight, codes_, (weight_.elements() + 1) / 2);
  weight_.code = read(".quant_map", code_, 16);
  if (checkpoint.contains(weight + ".nested_absmax")) {
    weight_.nested_blocksize = static_cast<int>(state["nested_blocksize"].integer(1, std::numeric_limits<int>::max()));
    offset_.assign(1, state["nested_offset"].float32());
    weight_.offset = offset_.data();
    weight_.absmax = read_bytes(weight + ".absmax", absmax_codes_, weight_.blocks());
    weight_.nested_code = read(".nested_quant_map", nested_code_, 256);
    weight_.nested_absmax = read(".nested_absmax", nested_absmax_,
                                 (weight_.blocks() + weight_.nested_blocksize - 1) / weight_.nested_blocksize);
  } else {
    weight_.absmax = read(".absmax", absmax_, weight_.blocks());
  }
  try {
    qn::check_quantized_weight(weight_);  // on the cpu, because it can read all values
  } catch (const qn::Error& error) {
    throw std::runtime_error(name_ + "." + error.what());
  }
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
