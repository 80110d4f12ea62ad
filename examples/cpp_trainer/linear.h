// A frozen 4-bit weight of a checkpoint with a LoRA adapter beside it, trained through qlora_native.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "device.h"
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
  Floats value, grad;

  explicit Parameter(std::size_t elements);
  qlora_native::Optimizer8bitTensor optimizer_view();

 private:
  Shared<std::uint8_t> state1_, state2_;  // the bytes of codes or of floats
  Floats absmax1_, absmax2_;
  Shared<std::int64_t> step_;  // a single number
};

// y[M,N] = x[M,K] . W^T + scaling * dropout(x) . A^T . B^T. All activations are fp32, in Shared memory. Results are
// valid once the device has been synchronized.
class QloraLinear {
 public:
  // Reads `name`.weight [out, in] of the checkpoint, in bitsandbytes' layout. B starts at zero. Throws
  // std::runtime_error if the weight is missing, incomplete or not finite.
  QloraLinear(const Checkpoint& checkpoint, std::string name, std::int64_t out, std::int64_t in, const LoraConfig& lora,
              std::mt19937& random);

  // The caller owns x and y; backward needs x again. A seed of 0 switches dropout off.
  void forward(const float* x, std::int64_t rows, float* y, std::uint64_t seed);
  // Computes dx[M,K], and stores dA and dB in the gradients of A and B.
  void backward(const float* dy, std::int64_t rows, float* dx);

  const std::string& name() const { return name_; }
  std::int64_t in() const { return weight_.K; }
  std::int64_t out() const { return weight_.N; }
  Parameter& a() { return a_; }
  Parameter& b() { return b_; }

 private:
  void read_weight(const Checkpoint& checkpoint);
  qlora_native::LoraView lora() const;

  std::string name_;
  LoraConfig config_;
  qlora_native::QuantizedWeightView weight_;
  Shared<std::uint8_t> codes_, absmax_codes_;  // copies, because a GPU cannot read the mapped file
  Floats code_, absmax_, nested_code_, nested_absmax_, offset_;
  Parameter a_, b_;  // [rank, K], [N, rank]
  Floats u_, v_;
  const float* x_ = nullptr;
  std::uint64_t seed_ = 0;
};

}  // namespace trainer
