// A frozen 4-bit weight of a checkpoint with a LoRA adapter beside it, trained through qlora_native.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "qlora_native/qlora_native.h"
#include "safetensors.h"

namespace trainer {

struct LoraConfig {
  std::int64_t rank = 8;
  float alpha = 16.0f;
  float dropout = 0.0f;
};

// A parameter with its gradient and the optimizer's state: 8 bits, or fp32 if it has fewer than 4096 elements.
class Parameter {
 public:
  std::vector<float> value, grad;

  explicit Parameter(std::size_t elements);
  qlora_native::AdamW8bitTensor optimizer_view();

 private:
  std::vector<std::uint8_t> state1_, state2_;  // codes, or floats
  std::vector<float> absmax1_, absmax2_;
  std::int64_t step_ = 0;
};

// y[M,N] = x[M,K] . W^T + scaling * dropout(x) . A^T . B^T. All activations are fp32.
class QloraLinear {
 public:
  // `name`.weight of the checkpoint, which must live as long as this, as bitsandbytes lays it out. B starts at zero.
  QloraLinear(const Checkpoint& checkpoint, std::string name, const LoraConfig& lora, std::mt19937& random);

  // x and y stay the caller's; backward needs x again. A seed of 0 switches dropout off.
  void forward(const float* x, std::int64_t rows, float* y, std::uint64_t seed);
  // dx[M,K] and, into grad, dA and dB.
  void backward(const float* dy, std::int64_t rows, float* dx);

  const std::string& name() const { return name_; }
  std::int64_t in() const { return weight_.K; }
  std::int64_t out() const { return weight_.N; }
  Parameter& a() { return a_; }
  Parameter& b() { return b_; }

 private:
  qlora_native::LoraView lora() const;

  std::string name_;
  LoraConfig config_;
  qlora_native::QuantizedWeightView weight_;
  std::vector<float> code_, absmax_, nested_code_, nested_absmax_, offset_;  // copies: a file need not align them
  Parameter a_, b_;                                                          // [rank, K], [N, rank]
  std::vector<float> u_, v_;
  const float* x_ = nullptr;
  std::uint64_t seed_ = 0;
};

}  // namespace trainer
