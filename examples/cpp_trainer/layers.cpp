#include "layers.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "qlora_native/qlora_native.h"

// Each parallel loop below runs over independent rows, so the sums are the same for any number of threads.

namespace qn = qlora_native;

namespace trainer {
namespace {

void add_scaled(const float* x, float scale, std::int64_t n, float* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += scale * x[i];
}

qn::ConstMatrix matrix(const float* data, std::int64_t rows, std::int64_t width) {
  return {data, qn::DType::f32, rows, width, width};
}
qn::Matrix matrix(float* data, std::int64_t rows, std::int64_t width) {
  return {data, qn::DType::f32, rows, width, width};
}

}  // namespace

void rms_norm(const float* x, const float* weight, std::int64_t rows, std::int64_t width, float eps, float* y,
              float* r) {
  qn::rms_norm({.x = matrix(x, rows, width), .weight = weight, .eps = eps, .y = matrix(y, rows, width), .r = r});
}

void rms_norm_backward(const float* dy, const float* x, const float* weight, const float* r, std::int64_t rows,
                       std::int64_t width, float* dx) {
  std::vector<float> change(static_cast<std::size_t>(rows * width));
  qn::rms_norm_backward({.x = matrix(x, rows, width),
                         .weight = weight,
                         .dy = matrix(dy, rows, width),
                         .r = r,
                         .dx = matrix(change.data(), rows, width)});
  add_scaled(change.data(), 1.0f, rows * width, dx);
}

void rope(float* x, std::int64_t rows, std::int64_t heads, std::int64_t head_dim, std::int64_t sequence, double theta,
          int direction) {
  const std::int64_t half = head_dim / 2;
#pragma omp parallel for
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < half; ++i) {
      const double frequency = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
      const double angle = static_cast<double>(r % sequence) * frequency;
      const float cosine = static_cast<float>(std::cos(angle)), sine = static_cast<float>(direction * std::sin(angle));
      for (std::int64_t h = 0; h < heads; ++h) {
        float* head = x + (r * heads + h) * head_dim;
        const float first = head[i], second = head[i + half];
        head[i] = first * cosine - second * sine;
        head[i + half] = second * cosine + first * sine;
      }
    }
}

namespace {

// Tokens [sequences * length, heads * head_dim] as the library's heads.
template <class Pointer, class Tokens>
qn::BasicHeads<Pointer> heads_of(const Attention& a, Tokens* tokens, std::int64_t heads) {
  const std::int64_t width = heads * a.head_dim;
  return {tokens, heads, a.length, a.length * width, a.head_dim, width};
}

qn::AttentionInputs inputs(const Attention& a, const float* q, const float* k, const float* v) {
  return {.dtype = qn::DType::f32,
          .batch = a.sequences,
          .head_dim = a.head_dim,
          .q = heads_of<const void*>(a, q, a.heads),
          .k = heads_of<const void*>(a, k, a.kv_heads),
          .v = heads_of<const void*>(a, v, a.kv_heads),
          .scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim)),
          .key_ranges = a.key_ranges.data()};
}

}  // namespace

Attention::Attention(std::int64_t sequences, std::int64_t length, std::int64_t heads, std::int64_t kv_heads,
                     std::int64_t head_dim)
    : sequences(sequences), length(length), heads(heads), kv_heads(kv_heads), head_dim(head_dim) {
  for (std::int32_t t = 0; t < length; ++t) key_ranges.insert(key_ranges.end(), {0, t + 1});
}

void Attention::forward(const float* q, const float* k, const float* v, float* y, float* lse) const {
  qn::attention({.in = inputs(*this, q, k, v), .out = heads_of<void*>(*this, y, heads), .lse = lse});
}

void Attention::backward(const float* dy, const float* q, const float* k, const float* v, const float* y,
                         const float* lse, float* dq, float* dk, float* dv) const {
  qn::attention_backward({.in = inputs(*this, q, k, v),
                          .out = heads_of<const void*>(*this, y, heads),
                          .lse = lse,
                          .dout = heads_of<const void*>(*this, dy, heads),
                          .dq = heads_of<void*>(*this, dq, heads),
                          .dk = heads_of<void*>(*this, dk, kv_heads),
                          .dv = heads_of<void*>(*this, dv, kv_heads)});
}

void swiglu(const float* gate, const float* up, std::int64_t rows, std::int64_t width, float* y) {
  qn::gated_activation({.gate = matrix(gate, rows, width), .up = matrix(up, rows, width), .h = matrix(y, rows, width)});
}

void swiglu_backward(const float* dy, const float* gate, const float* up, std::int64_t rows, std::int64_t width,
                     float* dgate, float* dup) {
  qn::gated_activation_backward({.gate = matrix(gate, rows, width),
                                 .up = matrix(up, rows, width),
                                 .dh = matrix(dy, rows, width),
                                 .dgate = matrix(dgate, rows, width),
                                 .dup = matrix(dup, rows, width)});
}

Head::Head(std::vector<float> table, std::int64_t vocabulary, std::int64_t width)
    : vocabulary_(vocabulary), width_(width), table_(std::move(table)), transposed_(table_.size()) {
  for (std::int64_t v = 0; v < vocabulary; ++v)
    for (std::int64_t i = 0; i < width; ++i) transposed_[i * vocabulary + v] = table_[v * width + i];
}

void Head::forward(const float* x, std::int64_t rows, float* logits) const {
#pragma omp parallel for
  for (std::int64_t r = 0; r < rows; ++r) {
    std::fill_n(logits + r * vocabulary_, vocabulary_, 0.0f);
    for (std::int64_t i = 0; i < width_; ++i)
      add_scaled(&transposed_[i * vocabulary_], x[r * width_ + i], vocabulary_, logits + r * vocabulary_);
  }
}

void Head::backward(const float* dlogits, std::int64_t rows, float* dx) const {
#pragma omp parallel for
  for (std::int64_t r = 0; r < rows; ++r) {
    std::fill_n(dx + r * width_, width_, 0.0f);
    for (std::int64_t v = 0; v < vocabulary_; ++v)
      add_scaled(&table_[v * width_], dlogits[r * vocabulary_ + v], width_, dx + r * width_);
  }
}

double cross_entropy(float* logits, const std::int32_t* targets, std::int64_t rows, std::int64_t vocabulary) {
  const std::vector<std::int64_t> labels(targets, targets + rows);
  const std::vector<float> of_mean(labels.size(), 1.0f / static_cast<float>(rows));
  std::vector<float> loss(labels.size());
  qn::cross_entropy({.logits = matrix(logits, rows, vocabulary),
                     .labels = labels.data(),
                     .gradient = true,
                     .row_gradients = of_mean.data(),
                     .loss = loss.data()});
  return std::accumulate(loss.begin(), loss.end(), 0.0) / static_cast<double>(rows);
}

}  // namespace trainer
