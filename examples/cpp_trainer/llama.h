// A Llama whose linear layers are frozen in 4 bits and have adapters. Embeddings, norms and head are not quantized.
#pragma once

#include <numeric>
#include <span>
#include <utility>

#include "linear.h"
#include "safetensors.h"

struct LlamaConfig {
  std::int64_t width, inner, layers, heads, kv_heads, head_dim, vocabulary;
  float eps = 1e-6f;
  double theta = 10000.0;
  bool is_head_tied;  // whether the head shares the embeddings' matrix

  // Reads a config.json. Another kind of model is refused, and so are sizes whose products would not fit in 64 bits.
  explicit LlamaConfig(const std::filesystem::path& path) {
    constexpr std::int64_t kMaxSize = 1 << 24, kMaxHeads = 1 << 12;
    const JsonObject json = JsonObject::parse(read_file<char>(path, 0, size_of_file(path)), path.string());
    json.expect(json.at("model_type") == "llama", "model_type", "llama");
    json.expect(!json.has("hidden_act") || json.at("hidden_act") == "silu", "hidden_act", "silu");
    json.expect(!json.has("quantization_config"), "quantization_config", "a model in 16 or 32 bits");
    for (const char* bias : {"attention_bias", "mlp_bias"})
      json.expect(!json.has(bias) || json.at(bias) == false, bias, "false");
    width = json.integer("hidden_size", 1, kMaxSize);
    inner = json.integer("intermediate_size", 1, kMaxSize);
    layers = json.integer("num_hidden_layers", 1, kMaxSize);
    vocabulary = json.integer("vocab_size", 1, kMaxSize);
    heads = json.integer("num_attention_heads", 1, kMaxHeads);
    kv_heads = json.has("num_key_value_heads") ? json.integer("num_key_value_heads", 1, heads) : heads;
    json.expect(heads % kv_heads == 0, "num_key_value_heads", "a divisor of num_attention_heads");
    head_dim = json.has("head_dim") ? json.integer("head_dim", 1, kMaxSize / heads) : width / heads;
    json.expect(head_dim > 0 && head_dim % 2 == 0, "head_dim", "an even size of a head");
    if (json.has("rms_norm_eps")) eps = static_cast<float>(json.number("rms_norm_eps", 0.0, 1.0));
    is_head_tied = json.at("tie_word_embeddings") == true;
    // transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    const JsonObject rope = json.has("rope_parameters") ? json.object("rope_parameters") : json;
    if (rope.has("rope_theta")) theta = rope.number("rope_theta", 1.0, 1e12);
    rope.expect(!rope.has("rope_type") || rope.at("rope_type") == "default", "rope_type", "default");
    json.expect(!json.has("rope_scaling"), "rope_scaling", "rotary embeddings without scaling");
  }
};

class Llama {
 public:
  const LlamaConfig config;

  // Loads config.json and *.safetensors of a folder, for sequences of `length` tokens. Throws std::runtime_error if the
  // files do not fit together.
  Llama(const std::filesystem::path& folder, const LoraConfig& lora, std::int64_t length, std::uint32_t seed)
      : config(folder / "config.json"), length_(length) {
    const std::int64_t width = config.width, inner = config.inner, vocabulary = config.vocabulary;
    const std::int64_t q_width = config.heads * config.head_dim, kv_width = config.kv_heads * config.head_dim;
    Checkpoint checkpoint(folder);
    std::mt19937 random(seed);
    embeddings_ = {vocabulary, width, checkpoint.take("model.embed_tokens.weight", {vocabulary, width})};
    head_ = embeddings_;
    if (!config.is_head_tied || checkpoint.contains("lm_head.weight"))
      head_.values = checkpoint.take("lm_head.weight", {vocabulary, width});
    if (config.is_head_tied && head_.values != embeddings_.values)
      fail("lm_head.weight", "expected the embeddings, to which config.json ties it, got other values");
    norm_ = checkpoint.take("model.norm.weight", {width});
    for (std::int64_t i = 0; i < config.layers; ++i) {
      const std::string prefix = "model.layers." + std::to_string(i) + ".";
      const auto norm = [&](const char* name) { return checkpoint.take(prefix + name + ".weight", {width}); };
      const auto linear = [&](const char* name, std::int64_t N, std::int64_t K) {
        return LoraLinear(prefix + name, checkpoint.take(prefix + name + ".weight", {N, K}), N, K, lora, random);
      };
      blocks_.push_back({.attention_norm = norm("input_layernorm"),
                         .mlp_norm = norm("post_attention_layernorm"),
                         .q = linear("self_attn.q_proj", q_width, width),
                         .k = linear("self_attn.k_proj", kv_width, width),
                         .v = linear("self_attn.v_proj", kv_width, width),
                         .o = linear("self_attn.o_proj", width, q_width),
                         .gate = linear("mlp.gate_proj", inner, width),
                         .up = linear("mlp.up_proj", inner, width),
                         .down = linear("mlp.down_proj", width, inner)});
    }
    checkpoint.check_all_were_taken();
    // Rotary embeddings rotate elements i and i + head_dim / 2 by position * theta^(-2i / head_dim).
    for (std::int64_t t = 0; t < length; ++t) {
      for (std::int64_t i = 0; i < config.head_dim; ++i) {
        const auto half = static_cast<double>(config.head_dim / 2), pair = std::fmod(static_cast<double>(i), half);
        const double angle = static_cast<double>(t) * std::pow(config.theta, -pair / half);
        cos_.push_back(static_cast<float>(std::cos(angle)));
        sin_.push_back(static_cast<float>(std::sin(angle)));
      }
      key_ranges_.insert(key_ranges_.end(), {0, static_cast<std::int32_t>(t + 1)});  // attention is causal
    }
  }

  std::vector<Parameter*> parameters() {
    std::vector<Parameter*> all;
    for (Block& block : blocks_)
      for (LoraLinear* linear : {&block.q, &block.k, &block.v, &block.o, &block.gate, &block.up, &block.down})
        all.insert(all.end(), {&linear->a, &linear->b});
    return all;
  }

  // The mean cross-entropy, in nats, of the tokens that follow `inputs`; both are [sequences, length], of tokens below
  // the vocabulary. `seed` draws the masks of dropout; 0 switches it off.
  double loss(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, std::uint64_t seed) {
    x_.resize(static_cast<std::int64_t>(inputs.size()), config.width);
    for (std::int64_t i = 0; i < x_.rows; ++i)
      std::copy_n(embeddings_.row(inputs[static_cast<std::size_t>(i)]), config.width, x_.row(i));
    for (std::size_t i = 0; i < blocks_.size(); ++i)
      forward(blocks_[i], seed == 0 ? 0 : 8 * (seed * blocks_.size() + i));
    norm(x_, norm_, normed_, norm_r_);
    multiply(normed_, head_, logits_);
    const std::vector<std::int64_t> labels(targets.begin(), targets.end());
    const std::vector<float> of_mean(labels.size(), 1.0f / static_cast<float>(labels.size()));
    std::vector<float> losses(labels.size());
    qn::cross_entropy({.logits = logits_,
                       .labels = labels.data(),
                       .gradient = true,  // it overwrites the logits
                       .row_gradients = of_mean.data(),
                       .loss = losses.data()});
    return std::accumulate(losses.begin(), losses.end(), 0.0) / static_cast<double>(losses.size());
  }

  void backward() {  // computes the gradients of all adapters, after loss
    multiply_backward(logits_, head_, dnormed_);
    dx_ = {x_.rows, x_.cols, std::vector<float>(x_.values.size())};
    norm_backward(dnormed_, x_, norm_, norm_r_);
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) backward(*block);
  }

 private:
  struct Block {
    std::vector<float> attention_norm, mlp_norm;
    LoraLinear q, k, v, o, gate, up, down;
    // Activations that backward needs. x is the input of the block, and `after` is x plus the attention.
    Matrix x = {}, normed = {}, queries = {}, keys = {}, values = {}, attended = {};
    Matrix after = {}, mlp_normed = {}, gated = {}, upped = {}, hidden = {};
    std::vector<float> attention_r = {}, lse = {}, mlp_r = {};  // r belongs to a norm
  };

  void forward(Block& b, std::uint64_t seed) {
    const auto next_seed = [&] { return seed == 0 ? 0 : ++seed; };  // every linear layer has masks of its own
    b.x = x_;
    norm(b.x, b.attention_norm, b.normed, b.attention_r);
    b.q.forward(b.normed, b.queries, next_seed());
    b.k.forward(b.normed, b.keys, next_seed());
    b.v.forward(b.normed, b.values, next_seed());
    rotate(b.queries, config.heads, false);
    rotate(b.keys, config.kv_heads, false);
    b.lse.resize(static_cast<std::size_t>(x_.rows * config.heads));
    qn::attention({.in = attention_inputs(b),
                   .out = split<void*>(b.attended.resize(x_.rows, b.queries.cols), config.heads),
                   .lse = b.lse.data()});
    b.o.forward(b.attended, delta_, next_seed());
    x_ += delta_;

    b.after = x_;
    norm(b.after, b.mlp_norm, b.mlp_normed, b.mlp_r);
    b.gate.forward(b.mlp_normed, b.gated, next_seed());
    b.up.forward(b.mlp_normed, b.upped, next_seed());
    qn::gated_activation({.gate = b.gated, .up = b.upped, .h = b.hidden.resize(x_.rows, config.inner)});
    b.down.forward(b.hidden, delta_, next_seed());
    x_ += delta_;
  }

  // dx_ is the gradient of the block's output, and then that of its input.
  void backward(Block& b) {
    b.down.backward(b.hidden, dx_, dhidden_);
    qn::gated_activation_backward({.gate = b.gated,
                                   .up = b.upped,
                                   .dh = dhidden_,
                                   .dgate = dgated_.resize(x_.rows, config.inner),
                                   .dup = dupped_.resize(x_.rows, config.inner)});
    b.gate.backward(b.mlp_normed, dgated_, dnormed_);
    b.up.backward(b.mlp_normed, dupped_, delta_);
    dnormed_ += delta_;
    norm_backward(dnormed_, b.after, b.mlp_norm, b.mlp_r);

    b.o.backward(b.attended, dx_, dattended_);
    qn::attention_backward({.in = attention_inputs(b),
                            .out = split<const void*>(b.attended, config.heads),
                            .lse = b.lse.data(),
                            .dout = split<const void*>(dattended_, config.heads),
                            .dq = split<void*>(dqueries_.resize(x_.rows, b.queries.cols), config.heads),
                            .dk = split<void*>(dkeys_.resize(x_.rows, b.keys.cols), config.kv_heads),
                            .dv = split<void*>(dvalues_.resize(x_.rows, b.values.cols), config.kv_heads)});
    rotate(dqueries_, config.heads, true);
    rotate(dkeys_, config.kv_heads, true);
    b.q.backward(b.normed, dqueries_, dnormed_);
    b.k.backward(b.normed, dkeys_, delta_);
    dnormed_ += delta_;
    b.v.backward(b.normed, dvalues_, delta_);
    dnormed_ += delta_;
    norm_backward(dnormed_, b.x, b.attention_norm, b.attention_r);
  }

  void norm(const Matrix& x, const std::vector<float>& weight, Matrix& y, std::vector<float>& r) const {
    r.resize(static_cast<std::size_t>(x.rows));
    qn::rms_norm({.x = x, .weight = weight.data(), .eps = config.eps, .y = y.resize(x.rows, x.cols), .r = r.data()});
  }

  // Adds the gradient of x to dx_.
  void norm_backward(const Matrix& dy, const Matrix& x, const std::vector<float>& weight, const std::vector<float>& r) {
    qn::rms_norm_backward(
        {.x = x, .weight = weight.data(), .dy = dy, .r = r.data(), .dx = delta_.resize(x.rows, x.cols)});
    dx_ += delta_;
  }

  void rotate(Matrix& tokens, std::int64_t heads, bool transposed) {
    qn::rotary({.batch = tokens.rows / length_,
                .head_dim = config.head_dim,
                .x = split<const void*>(tokens, heads),
                .cos = cos_.data(),
                .sin = sin_.data(),
                .shared = true,
                .transposed = transposed,
                .y = split<void*>(delta_.resize(tokens.rows, tokens.cols), heads)});
    std::swap(tokens, delta_);
  }

  qn::AttentionInputs attention_inputs(const Block& b) const {
    return {.batch = b.queries.rows / length_,
            .head_dim = config.head_dim,
            .q = split<const void*>(b.queries, config.heads),
            .k = split<const void*>(b.keys, config.kv_heads),
            .v = split<const void*>(b.values, config.kv_heads),
            .scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim)),
            .key_ranges = key_ranges_.data()};
  }

  // Tokens [sequences * length, heads * head_dim] as heads [sequences, heads, length, head_dim].
  template <class Pointer, class Tokens>
  qn::BasicHeads<Pointer> split(Tokens& tokens, std::int64_t heads) const {
    return {tokens.row(0), heads, length_, length_ * tokens.cols, config.head_dim, tokens.cols};
  }

  // y = x . w^T for a dense w. A row of w is multiplied by all rows of x while it is in the cache.
  static void multiply(const Matrix& x, const Matrix& w, Matrix& y) {
    y.resize(x.rows, w.rows);
#pragma omp parallel for
    for (std::int64_t n = 0; n < w.rows; ++n)
      for (std::int64_t m = 0; m < x.rows; ++m) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (std::int64_t k = 0; k < w.cols; ++k) sum += x.row(m)[k] * w.row(n)[k];
        y.row(m)[n] = sum;
      }
  }

  // dx = dy . w. A row of w is used for a few rows of dy while it is in the cache.
  static void multiply_backward(const Matrix& dy, const Matrix& w, Matrix& dx) {
    constexpr std::int64_t kRows = 16;
    dx = {dy.rows, w.cols, std::vector<float>(static_cast<std::size_t>(dy.rows * w.cols))};
#pragma omp parallel for
    for (std::int64_t first = 0; first < dy.rows; first += kRows)
      for (std::int64_t n = 0; n < w.rows; ++n)
        for (std::int64_t m = first; m < std::min(first + kRows, dy.rows); ++m)
          for (std::int64_t k = 0; k < w.cols; ++k) dx.row(m)[k] += dy.row(m)[n] * w.row(n)[k];
  }

  std::int64_t length_;
  Matrix embeddings_, head_;
  std::vector<float> norm_, norm_r_;
  std::vector<Block> blocks_;
  std::vector<float> cos_, sin_;          // [length, head_dim]
  std::vector<std::int32_t> key_ranges_;  // [length, 2]: the keys that each query sees
  Matrix x_, normed_, logits_, delta_;
  Matrix dx_, dnormed_, dqueries_, dkeys_, dvalues_, dattended_, dgated_, dupped_, dhidden_;  // gradients
};
