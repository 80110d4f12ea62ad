#include "llama.h"

#include <algorithm>
#include <stdexcept>

namespace trainer {
namespace {

void add(std::span<const float> x, std::span<float> y) {
  for (std::size_t i = 0; i < x.size(); ++i) y[i] += x[i];
}

const std::string kWhy = "as config.json says";

std::vector<float> dense(const Checkpoint& checkpoint, const std::string& name, const Shape& shape) {
  return checkpoint.floats(name, shape, kWhy);
}

}  // namespace

LlamaConfig LlamaConfig::read(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  return parse(Json::parse(MappedFile(path).text(), path.string()));
}

LlamaConfig LlamaConfig::parse(const Json& json) {
  constexpr std::int64_t kLargest = 1 << 24, kMostHeads = 1 << 12;
  const auto expect = [](bool ok, const Json& field, const std::string& expected) {
    if (!ok) field.fail(expected + ", for this trainer");
  };
  expect(json["model_type"].string() == "llama", json["model_type"], "llama");
  for (const char* bias : {"attention_bias", "mlp_bias"})
    expect(json[bias].is_null() || !json[bias].boolean(), json[bias], "no biases");
  expect(json["hidden_act"].is_null() || json["hidden_act"].string() == "silu", json["hidden_act"], "silu");

  // Codes of other methods, such as FP8, would be taken for values.
  if (const Json quantized = json["quantization_config"]; !quantized.is_null()) {
    const Json method = quantized["quant_method"], in_4_bits = quantized["load_in_4bit"];
    expect(method.is_null() || method.string() == "bitsandbytes", method, "bitsandbytes");
    expect(!in_4_bits.is_null() && in_4_bits.boolean(), in_4_bits, "true");
  }

  LlamaConfig config;
  config.width = json["hidden_size"].integer(1, kLargest);
  config.inner = json["intermediate_size"].integer(1, kLargest);
  config.layers = json["num_hidden_layers"].integer(1, kLargest);
  config.vocabulary = json["vocab_size"].integer(1, kLargest);
  config.heads = json["num_attention_heads"].integer(1, kMostHeads);
  const Json kv_heads = json["num_key_value_heads"], head_dim = json["head_dim"];
  config.kv_heads = kv_heads.is_null() ? config.heads : kv_heads.integer(1, config.heads);
  expect(config.heads % config.kv_heads == 0, kv_heads, "a divisor of num_attention_heads");
  expect(!head_dim.is_null() || config.width % config.heads == 0, head_dim,
         "a number, where num_attention_heads does not divide hidden_size");
  config.head_dim = head_dim.is_null() ? config.width / config.heads : head_dim.integer(1, kLargest / config.heads);
  expect(config.head_dim % 2 == 0, head_dim, "an even size of a head, whose halves rotary embeddings turn");

  if (const Json eps = json["rms_norm_eps"]; !eps.is_null()) {
    config.eps = eps.float32();
    expect(config.eps >= 0.0f, eps, "a number of at least 0");
  }
  const Json tied = json["tie_word_embeddings"];
  config.is_head_tied = !tied.is_null() && tied.boolean();
  // transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
  const Json rope = json["rope_parameters"];
  if (const Json theta = rope.is_null() ? json["rope_theta"] : rope["rope_theta"]; !theta.is_null()) {
    config.theta = theta.number();
    expect(config.theta > 0.0, theta, "a number above 0");
  }
  expect(json["rope_scaling"].is_null(), json["rope_scaling"], "rotary embeddings without scaling");
  if (!rope.is_null() && !rope["rope_type"].is_null())
    expect(rope["rope_type"].string() == "default", rope["rope_type"], "rotary embeddings without scaling");
  return config;
}

Llama::Llama(const LlamaConfig& config, const Checkpoint& checkpoint, const LoraConfig& lora, std::uint32_t seed)
    : config_(config),
      embeddings_(dense(checkpoint, "model.embed_tokens.weight", {config.vocabulary, config.width})),
      norm_(dense(checkpoint, "model.norm.weight", {config.width})),
      head_(config.is_head_tied ? embeddings_ : dense(checkpoint, "lm_head.weight", {config.vocabulary, config.width}),
            config.vocabulary, config.width) {
  const std::int64_t width = config.width, inner = config.inner;
  const std::int64_t q_width = config.heads * config.head_dim, kv_width = config.kv_heads * config.head_dim;
  std::mt19937 random(seed);
  const auto prefix_of = [](std::int64_t layer) { return "model.layers." + std::to_string(layer) + "."; };
  for (std::int64_t i = 0; i < config.layers; ++i) {
    const auto norm = [&](const char* name) { return dense(checkpoint, prefix_of(i) + name, {width}); };
    const auto linear = [&](const char* name, std::int64_t out, std::int64_t in) {
      return QloraLinear(checkpoint, prefix_of(i) + name, out, in, lora, random);
    };
    blocks_.push_back({.attention_norm = norm("input_layernorm.weight"),
                       .mlp_norm = norm("post_attention_layernorm.weight"),
                       .q = linear("self_attn.q_proj", q_width, width),
                       .k = linear("self_attn.k_proj", kv_width, width),
                       .v = linear("self_attn.v_proj", kv_width, width),
                       .o = linear("self_attn.o_proj", width, q_width),
                       .gate = linear("mlp.gate_proj", inner, width),
                       .up = linear("mlp.up_proj", inner, width),
                       .down = linear("mlp.down_proj", width, inner)});
  }
  if (checkpoint.contains_any_below(prefix_of(config.layers)))
    throw std::runtime_error("expected " + std::to_string(config.layers) + " layers " + kWhy +
                             ", got one more in the checkpoint: " + prefix_of(config.layers) + "*");
  if (config.is_head_tied && checkpoint.contains("lm_head.weight") &&
      dense(checkpoint, "lm_head.weight", {config.vocabulary, width}) != embeddings_)
    throw std::runtime_error("lm_head.weight: expected the embeddings, to which it is tied, got other values");
  checkpoint.check_all_were_read();
}

std::vector<QloraLinear*> Llama::linears() {
  std::vector<QloraLinear*> all;
  for (Block& block : blocks_)
    for (QloraLinear* linear : {&block.q, &block.k, &block.v, &block.o, &block.gate, &block.up, &block.down})
      all.push_back(linear);
  return all;
}

std::span<float> Llama::forward(std::span<const std::int32_t> tokens, std::int64_t length, std::uint64_t seed) {
  const std::int64_t rows = static_cast<std::int64_t>(tokens.size()), width = config_.width;
  attention_ = Attention(rows / length, length, config_.heads, config_.kv_heads, config_.head_dim);
  x_.resize(static_cast<std::size_t>(rows * width));
  for (std::int64_t r = 0; r < rows; ++r) {
    if (tokens[r] < 0 || tokens[r] >= config_.vocabulary)
      throw std::runtime_error("token " + std::to_string(tokens[r]) + " is outside the model's vocabulary of " +
                               std::to_string(config_.vocabulary));
    std::copy_n(&embeddings_[tokens[r] * width], width, &x_[r * width]);
  }
  for (std::size_t i = 0; i < blocks_.size(); ++i) forward(blocks_[i], seed == 0 ? 0 : seed * 1024 + i * 8);
  normed_.resize(x_.size());
  norm_r_.resize(static_cast<std::size_t>(rows));
  rms_norm(x_.data(), norm_.data(), rows, width, config_.eps, normed_.data(), norm_r_.data());
  logits_.resize(static_cast<std::size_t>(rows * config_.vocabulary));
  head_.forward(normed_.data(), rows, logits_.data());
  return logits_;
}

void Llama::forward(Block& block, std::uint64_t seed) {
  const std::int64_t width = config_.width, rows = static_cast<std::int64_t>(x_.size()) / width;
  Activations& a = block.saved;
  const auto size = [&](std::int64_t columns) { return static_cast<std::size_t>(rows * columns); };
  // Every layer has its own dropout masks.
  const auto apply = [&](QloraLinear& linear, const Floats& x, Floats& y) {
    y.resize(size(linear.out()));
    linear.forward(x.data(), rows, y.data(), seed == 0 ? 0 : ++seed);
  };
  a.x = x_;
  a.normed.resize(x_.size());
  a.attention_r.resize(size(1));
  rms_norm(a.x.data(), block.attention_norm.data(), rows, width, config_.eps, a.normed.data(), a.attention_r.data());
  apply(block.q, a.normed, a.queries);
  apply(block.k, a.normed, a.keys);
  apply(block.v, a.normed, a.values);
  device().synchronize();
  rope(a.queries.data(), rows, config_.heads, config_.head_dim, attention_.length, config_.theta, 1);
  rope(a.keys.data(), rows, config_.kv_heads, config_.head_dim, attention_.length, config_.theta, 1);
  a.lse.resize(size(config_.heads));
  a.attended.resize(a.queries.size());
  attention_.forward(a.queries.data(), a.keys.data(), a.values.data(), a.attended.data(), a.lse.data());
  apply(block.o, a.attended, delta_);
  device().synchronize();
  add(delta_, x_);

  a.after = x_;
  a.mlp_normed.resize(x_.size());
  a.mlp_r.resize(size(1));
  rms_norm(a.after.data(), block.mlp_norm.data(), rows, width, config_.eps, a.mlp_normed.data(), a.mlp_r.data());
  apply(block.gate, a.mlp_normed, a.gated);
  apply(block.up, a.mlp_normed, a.upped);
  device().synchronize();
  a.hidden.resize(a.gated.size());
  swiglu(a.gated.data(), a.upped.data(), rows, block.gate.out(), a.hidden.data());
  apply(block.down, a.hidden, delta_);
  device().synchronize();
  add(delta_, x_);
}

void Llama::backward(std::span<const float> dlogits) {
  const std::int64_t width = config_.width, rows = static_cast<std::int64_t>(x_.size()) / width;
  Gradients& d = gradients_;
  d.normed.resize(x_.size());
  head_.backward(dlogits.data(), rows, d.normed.data());
  d.x.assign(x_.size(), 0.0f);
  rms_norm_backward(d.normed.data(), x_.data(), norm_.data(), norm_r_.data(), rows, width, d.x.data());
  for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) backward(*block);
}

void Llama::backward(Block& block) {
  const std::int64_t width = config_.width, rows = static_cast<std::int64_t>(x_.size()) / width;
  const Activations& a = block.saved;
  Gradients& d = gradients_;
  const auto back = [&](QloraLinear& linear, const Floats& dy, Floats& dx) {
    dx.resize(static_cast<std::size_t>(rows * linear.in()));
    linear.backward(dy.data(), rows, dx.data());
  };
  back(block.down, d.x, d.hidden);
  device().synchronize();
  d.gated.resize(a.gated.size());
  d.upped.resize(a.upped.size());
  swiglu_backward(d.hidden.data(), a.gated.data(), a.upped.data(), rows, block.gate.out(), d.gated.data(),
                  d.upped.data());
  back(block.gate, d.gated, d.normed);
  back(block.up, d.upped, delta_);
  device().synchronize();
  add(delta_, d.normed);
  rms_norm_backward(d.normed.data(), a.after.data(), block.mlp_norm.data(), a.mlp_r.data(), rows, width, d.x.data());

  back(block.o, d.x, d.attended);
  device().synchronize();
  d.queries.resize(a.queries.size());
  d.keys.resize(a.keys.size());
  d.values.resize(a.values.size());
  attention_.backward(d.attended.data(), a.queries.data(), a.keys.data(), a.values.data(), a.attended.data(),
                      a.lse.data(), d.queries.data(), d.keys.data(), d.values.data());
  rope(d.queries.data(), rows, config_.heads, config_.head_dim, attention_.length, config_.theta, -1);
  rope(d.keys.data(), rows, config_.kv_heads, config_.head_dim, attention_.length, config_.theta, -1);
  back(block.q, d.queries, d.normed);
  for (const auto& [linear, dy] : {std::pair{&block.k, &d.keys}, {&block.v, &d.values}}) {
    back(*linear, *dy, delta_);
    device().synchronize();
    add(delta_, d.normed);
  }
  rms_norm_backward(d.normed.data(), a.x.data(), block.attention_norm.data(), a.attention_r.data(), rows, width,
                    d.x.data());
}

}  // namespace trainer
