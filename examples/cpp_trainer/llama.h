// A Llama-shaped language model with frozen 4-bit linear layers and adapters. Embeddings, norms and head are not
// quantized.
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
  bool is_head_tied = false;  // whether the head shares the embeddings' matrix

  // Reads config.json of a folder. Throws std::runtime_error for another kind of model, and for sizes so large that
  // their products would not fit in 64 bits.
  static LlamaConfig read(const std::filesystem::path& folder);
  static LlamaConfig parse(const Json& json);
};

class Llama {
 public:
  // Loads a folder that `python -m qlora_native quantize`, or transformers with bitsandbytes, has written. Throws
  // std::runtime_error if a tensor is missing or does not fit the config.
  Llama(const std::filesystem::path& folder, const LoraConfig& lora, std::uint32_t seed)
      : Llama(LlamaConfig::read(folder), Checkpoint(folder), lora, seed) {}
  Llama(const LlamaConfig& config, const Checkpoint& checkpoint, const LoraConfig& lora, std::uint32_t seed);

  // Tokens are [sequences, length]. Logits are [sequences * length, vocabulary], valid until the next call.
  // `seed` determines the masks of dropout; 0 switches it off.
  std::span<float> forward(std::span<const std::int32_t> tokens, std::int64_t length, std::uint64_t seed);
  // Computes the gradients of all adapters from the gradient of the logits, after forward.
  void backward(std::span<const float> dlogits);

  const LlamaConfig& config() const { return config_; }
  std::vector<QloraLinear*> linears();

 private:
  // Activations that backward needs. x is the input of the block, and `after` is x plus the attention.
  struct Activations {
    std::vector<float> x, lse, after, attention_r, mlp_r;  // each r belongs to a norm
    Floats normed, queries, keys, values, attended, mlp_normed, gated, upped, hidden;
  };
  // Gradients in one block at a time. x is first the gradient of the block's output, then that of its input.
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
  std::vector<float> x_, normed_, norm_r_, logits_;
  Floats delta_;
  Gradients gradients_;
};

}  // namespace trainer
