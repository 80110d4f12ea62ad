// The parts of a transformer between its linear layers, each forward and backward, in fp32. Activations are
// [rows, width], a row being one token of one sequence; rows are independent wherever "rows" is a parameter. Norms,
// attention, SwiGLU and the loss are the library's.
#pragma once

#include <cstdint>
#include <vector>

namespace trainer {

// y = x * r * weight, r = 1 / sqrt(mean(x^2) + eps) of each row
void rms_norm(const float* x, const float* weight, std::int64_t rows, std::int64_t width, float eps, float* y,
              float* r);
// Adds to dx the gradient of x, given that of y.
void rms_norm_backward(const float* dy, const float* x, const float* weight, const float* r, std::int64_t rows,
                       std::int64_t width, float* dx);

// Rotary position embedding: rotates element i of a head's first half and element i of its second half by the angle
// position * theta^(-2i / head_dim). `direction` -1 rotates back, which is the backward pass.
void rope(float* x, std::int64_t rows, std::int64_t heads, std::int64_t head_dim, std::int64_t sequence, double theta,
          int direction);

// Causal attention with grouped keys and values.
struct Attention {
  std::int64_t sequences = 0, length = 0, heads = 0, kv_heads = 0, head_dim = 0;
  std::vector<std::int32_t> key_ranges;  // of each query, as the library takes them

  Attention() = default;
  Attention(std::int64_t sequences, std::int64_t length, std::int64_t heads, std::int64_t kv_heads,
            std::int64_t head_dim);
  // q, y: [sequences * length, heads * head_dim]; k, v: [.., kv_heads * head_dim]; lse: a number for each query of a
  // head, for backward
  void forward(const float* q, const float* k, const float* v, float* y, float* lse) const;
  void backward(const float* dy, const float* q, const float* k, const float* v, const float* y, const float* lse,
                float* dq, float* dk, float* dv) const;
};

// y = silu(gate) * up, and its backward pass.
void swiglu(const float* gate, const float* up, std::int64_t rows, std::int64_t width, float* y);
void swiglu_backward(const float* dy, const float* gate, const float* up, std::int64_t rows, std::int64_t width,
                     float* dgate, float* dup);

// The language model's head over a dense matrix: logits[rows, vocabulary] = x . table^T; and dx = dlogits . table.
class Head {
 public:
  Head(std::vector<float> table, std::int64_t vocabulary, std::int64_t width);
  void forward(const float* x, std::int64_t rows, float* logits) const;
  void backward(const float* dlogits, std::int64_t rows, float* dx) const;

 private:
  std::int64_t vocabulary_, width_;
  std::vector<float> table_, transposed_;
};

// Returns the mean cross-entropy in nats, and replaces the logits by its gradient.
double cross_entropy(float* logits, const std::int32_t* targets, std::int64_t rows, std::int64_t vocabulary);

}  // namespace trainer
