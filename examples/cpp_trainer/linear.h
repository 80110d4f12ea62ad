// A linear layer whose weight is frozen in 4 bits, with a LoRA adapter beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "qlora_native/qlora_native.h"

namespace qn = qlora_native;

// A matrix of fp32 that converts to the library's views.
struct Matrix {
  std::int64_t rows = 0, cols = 0;
  std::vector<float> values = {};

  Matrix& resize(std::int64_t new_rows, std::int64_t new_cols) {
    rows = new_rows;
    cols = new_cols;
    values.resize(static_cast<std::size_t>(rows * cols));
    return *this;
  }
  float* row(std::int64_t i) { return values.data() + i * cols; }
  const float* row(std::int64_t i) const { return values.data() + i * cols; }
  void operator+=(const Matrix& other) {
    for (std::size_t i = 0; i < values.size(); ++i) values[i] += other.values[i];
  }
  operator qn::Matrix() { return {values.data(), qn::DType::f32, rows, cols, cols}; }
  operator qn::ConstMatrix() const { return {values.data(), qn::DType::f32, rows, cols, cols}; }
};

// A trained matrix with its gradient, and the state of 8-bit AdamW: codes, and a scale for each block of them.
struct Parameter {
  std::string name;
  Matrix value, grad;
  std::vector<std::uint8_t> state1, state2;
  std::vector<float> absmax1, absmax2;
  std::int64_t step = 0;

  Parameter(std::string name, std::int64_t rows, std::int64_t cols) : name(std::move(name)) {
    constexpr std::size_t kBlock = qn::kOptimizer8bitBlocksize;
    for (Matrix* matrix : {&value, &grad}) matrix->resize(rows, cols);
    for (auto* state : {&state1, &state2}) state->resize(value.values.size());
    for (auto* absmax : {&absmax1, &absmax2}) absmax->resize((value.values.size() + kBlock - 1) / kBlock);
  }

  qn::Optimizer8bitTensor optimizer_view() {
    return {.param = value.row(0),
            .grad = grad.row(0),
            .elements = value.rows * value.cols,
            .state1 = state1.data(),
            .state2 = state2.data(),
            .absmax1 = absmax1.data(),
            .absmax2 = absmax2.data(),
            .step = &step};
  }
};

struct LoraConfig {
  std::int64_t rank;
  float alpha, dropout;
};

// y[M,N] = x[M,K] . W^T + alpha / rank * dropout(x) . A^T . B^T
class LoraLinear {
 public:
  Parameter a, b;  // [rank, K], [N, rank]

  // Quantizes a weight [N, K] to NF4 with double quantization, as QLoRA does. A is random, as in PEFT, and B is zero.
  LoraLinear(const std::string& name, const std::vector<float>& weight, std::int64_t N, std::int64_t K,
             const LoraConfig& config, std::mt19937& random)
      : a(name + ".lora_A.weight", config.rank, K),
        b(name + ".lora_B.weight", N, config.rank),
        config_(config),
        N_(N),
        K_(K) {
    const std::int64_t blocks = (N * K + kBlocksize - 1) / kBlocksize;
    std::vector<float> absmax(static_cast<std::size_t>(blocks));
    codes_.resize(static_cast<std::size_t>((N * K + 1) / 2));
    absmax_.resize(absmax.size());
    nested_absmax_.resize(static_cast<std::size_t>((blocks + kNestedBlocksize - 1) / kNestedBlocksize));
    qn::NonFinite non_finite;  // stays empty: the checkpoint has checked the values
    qn::quantize({.weight = weight.data(),
                  .elements = N * K,
                  .blocksize = kBlocksize,
                  .code = qn::codebook("nf4").data(),
                  .codes = codes_.data(),
                  .absmax = absmax.data(),
                  .non_finite = &non_finite});
    qn::quantize_absmax({.absmax = absmax.data(),
                         .blocks = blocks,
                         .nested_blocksize = kNestedBlocksize,
                         .nested_code = qn::dynamic_map().data(),
                         .codes = absmax_.data(),
                         .nested_absmax = nested_absmax_.data(),
                         .offset = &offset_});
    const float limit = 1.0f / std::sqrt(static_cast<float>(K));  // Kaiming-uniform with a = sqrt(5)
    for (float& value : a.value.values)
      value = limit * (2.0f * std::ldexp(static_cast<float>(random() >> 8), -24) - 1.0f);
  }

  void forward(const Matrix& x, Matrix& y, std::uint64_t seed) {  // a seed of 0 switches dropout off
    seed_ = seed;
    qn::linear_forward(
        {.weight = weight(), .lora = lora(), .x = x, .y = y.resize(x.rows, N_), .u = u_.resize(x.rows, config_.rank)});
  }

  void backward(const Matrix& x, const Matrix& dy, Matrix& dx) {  // also computes the gradients of A and B
    qn::linear_backward_input({.weight = weight(),
                               .lora = lora(),
                               .dy = dy,
                               .dx = dx.resize(x.rows, K_),
                               .v = v_.resize(x.rows, config_.rank)});
    qn::lora_gradients({.lora = lora(), .x = x, .dy = dy, .u = u_, .v = v_, .da = a.grad.row(0), .db = b.grad.row(0)});
  }

 private:
  static constexpr int kBlocksize = 64, kNestedBlocksize = 256;

  qn::QuantizedWeightView weight() const {
    return {.N = N_,
            .K = K_,
            .blocksize = kBlocksize,
            .codes = codes_.data(),
            .absmax = absmax_.data(),
            .code = qn::codebook("nf4").data(),
            .nested_absmax = nested_absmax_.data(),
            .nested_code = qn::dynamic_map().data(),
            .offset = &offset_,
            .nested_blocksize = kNestedBlocksize};
  }
  qn::LoraView lora() const {
    return {.rank = config_.rank,
            .a = a.value.row(0),
            .b = b.value.row(0),
            .scaling = config_.alpha / static_cast<float>(config_.rank),
            .dropout = seed_ == 0 ? 0.0f : config_.dropout,
            .seed = seed_};
  }

  LoraConfig config_;
  std::int64_t N_, K_;
  std::vector<std::uint8_t> codes_, absmax_;  // two codes a byte; a scale in 8 bits for each block of the weight
  std::vector<float> nested_absmax_;          // a scale for each block of these scales
  float offset_ = 0.0f;                       // the mean of the scales
  std::uint64_t seed_ = 0;
  Matrix u_, v_;  // what the adapter's gradients need of forward and backward
};
