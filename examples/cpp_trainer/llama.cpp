#include "llama.h"

#include <algorithm>
#include <stdexcept>

namespace trainer {
namespace {

void add(std::span<const float> x, std::span<float> y) {
  for (std::size_t i = 0; i < x.size(); ++i) y[i] += x[i];
}

}  // namespace

LlamaConfig LlamaConfig::read(const std::filesystem::path& folder) {
  const Json json = Json::parse(MappedFile(folder / "config.json").text());
  const auto expect = [](bool ok, const std::string& what) {
    if (!ok) throw std::runtime_error("config.json: this trainer expects " + what);
  };
  expect(!json["model_type"].is_null() && json["model_type"].string() == "llama", "model_type llama");
  for (const char* bias : {"attention_bias", "mlp_bias"})
    expect(json[bias].is_null() || !json[bias].boolean(), "no biases");
  expect(json["hidden_act"].is_null() || json["hidden_act"].string() == "silu", "hidden_act silu");

  LlamaConfig config;
  config.width = json["hidden_size"].integer();
  config.inner = json["intermediate_size"].integer();
  config.layers = json["num_hidden_layers"].integer();
  config.heads = json["num_attention_heads"].integer();
  config.kv_heads = json["num_key_value_heads"].is_null() ? config.heads : json["num_key_value_heads"].integer();
  config.head_dim = json["head_dim"].is_null() ? config.width / config.heads : json["head_dim"].integer();
  config.vocabulary = json["vocab_size"].integer();
  config.eps = static_cast<float>(json["rms_norm_eps"].number());
  // transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
  const Json& rope = json["rope_parameters"];
  const Json& theta = rope.is_null() ? json["rope_theta"] : rope["rope_theta"];
  if (!theta.is_null()) config.theta = theta.number();
  expect(json["rope_scaling"].is_null(), "rotary embeddings without scaling");
  expect(rope.is_null() || rope["rope_type"].is_null() || rope["rope_type"].string() == "default",
         "rotary embeddings without scaling");
  return config;
}

Llama::Llama(const std::filesystem::path& folder, const LoraConfig& lora, std::uint32_t seed)
    : config_(LlamaConfig::read(folder)),
      checkpoint_(folder),
      embeddings_(checkpoint_.floats("model.embed_tokens.weight")),
      norm_(checkpoint_.floats("model.norm.weight")),
      head_(checkpoint_.contains("lm_head.weight") ? checkpoint_.floats("lm_head.weight") : embeddings_,
            config_.vocabulary, config_.width) {
  std::mt19937 random(seed);
  for (std::int64_t i = 0; i < config_.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const auto linear = [&](const char* name) { return QloraLinear(checkpoint_, prefix + name, lora, random); };
    blocks_.push_back({.attention_norm = checkpoint_.floats(prefix + "input_layernorm.weight"),
                       .mlp_norm = checkpoint_.floats(prefix + "post_attention_layernorm.weight"),
                       .q = linear("self_attn.q_proj"),
                       .k = linear("self_attn.k_proj"),
                       .v = linear("self_attn.v_proj"),
                       .o = linear("self_attn.o_proj"),
                       .gate = linear("mlp.gate_proj"),
                       .up = linear("mlp.up_proj"),
                       .down = linear("mlp.down_proj")});
  }
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
  attention_ = {rows / length, length, config_.heads, config_.kv_heads, config_.head_dim};
  x_.resize(static_cast<std::size_t>(rows * width));
  for (std::int64_t r = 0; r < rows; ++r) {
    if (tokens[r] < 0 || tokens[r] >= config_.vocabulary)
      throw std::runtime_error("token " + std::to_string(tokens[r]) + " is outside the model's vocabulary of " +
                               std::to_string(config_.vocabulary));
    std::copy_n(&embeddings_[tokens[r] * width], width, &x_[r * width]);
  }
  for (std::size_t i = 0; i < blocks_.size(); ++i) forward(blocks_[i], seed == 0 ? 0 : seed * 1024 + i * 8);
  normed_.resize(x_.size());
  rms_norm(x_.data(), norm_.data(), rows, width, config_.eps, normed_.data());
  logits_.resize(static_cast<std::size_t>(rows * config_.vocabulary));
  head_.forward(normed_.data(), rows, logits_.data());
  return logits_;
}

void Llama::forward(Block& block, std::uint64_t seed) {
  const std::int64_t width = config_.width, rows = static_cast<std::int64_t>(x_.size()) / width;
  Activations& a = block.saved;
  const auto size = [&](std::int64_t columns) { return static_cast<std::size_t>(rows * columns); };
  // Every layer has masks of its own.
  const auto apply = [&](QloraLinear& linear, const Floats& x, Floats& y) {
    y.resize(size(linear.out()));
    linear.forward(x.data(), rows, y.data(), seed == 0 ? 0 : ++seed);
  };
  a.x = x_;
  a.normed.resize(x_.size());
  rms_norm(a.x.data(), block.attention_norm.data(), rows, width, config_.eps, a.normed.data());
  apply(block.q, a.normed, a.queries);
  apply(block.k, a.normed, a.keys);
  apply(block.v, a.normed, a.values);
  device().synchronize();
  rope(a.queries.data(), rows, config_.heads, config_.head_dim, attention_.length, config_.theta, 1);
  rope(a.keys.data(), rows, config_.kv_heads, config_.head_dim, attention_.length, config_.theta, 1);
  a.probabilities.resize(static_cast<std::size_t>(attention_.probabilities()));
  a.attended.resize(a.queries.size());
  attention_.forward(a.queries.data(), a.keys.data(), a.values.data(), a.probabilities.data(), a.attended.data());
  apply(block.o, a.attended, delta_);
  device().synchronize();
  add(delta_, x_);

  a.after = x_;
  a.mlp_normed.resize(x_.size());
  rms_norm(a.after.data(), block.mlp_norm.data(), rows, width, config_.eps, a.mlp_normed.data());
  apply(block.gate, a.mlp_normed, a.gated);
  apply(block.up, a.mlp_normed, a.upped);
  device().synchronize();
  a.hidden.resize(a.gated.size());
  swiglu(a.gated.data(), a.upped.data(), static_cast<std::int64_t>(a.gated.size()), a.hidden.data());
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
  rms_norm_backward(d.normed.data(), x_.data(), norm_.data(), rows, width, config_.eps, d.x.data());
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
  swiglu_backward(d.hidden.data(), a.gated.data(), a.upped.data(), static_cast<std::int64_t>(d.hidden.size()),
                  d.gated.data(), d.upped.data());
  back(block.gate, d.gated, d.normed);
  back(block.up, d.upped, delta_);
  device().synchronize();
  add(delta_, d.normed);
  rms_norm_backward(d.normed.data(), a.after.data(), block.mlp_norm.data(), rows, width, config_.eps, d.x.data());

  back(block.o, d.x, d.attended);
  device().synchronize();
  d.queries.resize(a.queries.size());
  d.keys.resize(a.keys.size());
  d.values.resize(a.values.size());
  attention_.backward(d.attended.data(), a.queries.data(), a.keys.data(), a.values.data(), a.probabilities.data(),
                      d.queries.data(), d.keys.data(), d.values.data());
  rope(d.queries.data(), rows, config_.heads, config_.head_dim, attention_.length, config_.theta, -1);
  rope(d.keys.data(), rows, config_.kv_heads, config_.head_dim, attention_.length, config_.theta, -1);
  back(block.q, d.queries, d.normed);
  for (const auto& [linear, dy] : {std::pair{&block.k, &d.keys}, {&block.v, &d.values}}) {
    back(*linear, *dy, delta_);
    device().synchronize();
    add(delta_, d.normed);
  }
  rms_norm_backward(d.normed.data(), a.x.data(), block.attention_norm.data(), rows, width, config_.eps, d.x.data());
}

}  // namespace trainer
