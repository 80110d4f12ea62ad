// A Llama-shaped language model: frozen 4-bit linear layers with adapters; embeddings, norms and head as they are.
#pragma once

#include <cstdint>
#include <filesystem>
#include <random>
#include <span>
#include <vector>

#include "device.h"
#include "json.h"
#include "layers.h"
#include "linear.h"
#include "safetensors.h"

namespace trainer {

struct LlamaConfig {
  std::int64_t width = 0, inner = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocabulary = 0;
  float eps = 1e-6f;
  double theta = 10000.0;
  bool is_head_tied = false;  // to the embeddings

  // From a folder's config.json. Throws std::runtime_error on a model of another kind, and on sizes that no model has:
  // no product of those that are left is too large for 64 bits.
  static LlamaConfig read(const std::filesystem::path& folder);
  static LlamaConfig parse(const Json& json);
};

class Llama {
 public:
  // A folder written by `python -m qlora_native quantize`, or by transformers with bitsandbytes. Throws
  // std::runtime_error where a tensor is missing or is not as the config implies.
  Llama(const std::filesystem::path& folder, const LoraConfig& lora, std::uint32_t seed)
      : Llama(LlamaConfig::read(folder), Checkpoint(folder), lora, seed) {}
  Llama(const LlamaConfig& config, const Checkpoint& checkpoint, const LoraConfig& lora, std::uint32_t seed);

  // Tokens are [sequences, length]. Logits are [sequences * length, vocabulary], valid until the next call.
  // Dropout takes its masks from `seed`; 0: none.
  std::span<float> forward(std::span<const std::int32_t> tokens, std::int64_t length, std::uint64_t seed);
  // After forward: the gradient of every adapter from that of the logits.
  void backward(std::span<const float> dlogits);

  const LlamaConfig& config() const { return config_; }
  std::vector<QloraLinear*> linears();

 private:
  // What backward needs. x: the block's input; after: with the attention added.
  struct Activations {
    std::vector<float> x, probabilities, after;
    Floats normed, queries, keys, values, attended, mlp_normed, gated, upped, hidden;
  };
  // Of one block at a time. x: of its output, then of its input.
  struct Gradients {
    Floats x, normed, queries, keys, values, attended, gated, upped, hidden;
  };
  struct Block {
    std::vector<float> attention_norm, mlp_norm;
    QloraLinear q, k, v, o, gate, up, down;
    Activations saved = {};
  };

  void forward(Block& block, std::uint64_t seed);
  void backward(Block& block);

  LlamaConfig config_;
  std::vector<float> embeddings_, norm_;
  std::vector<Block> blocks_;
  Head head_;
  Attention attention_;
  std::vector<float> x_, normed_, logits_;
  Floats delta_;
  Gradients gradients_;
};

}  // namespace trainer
