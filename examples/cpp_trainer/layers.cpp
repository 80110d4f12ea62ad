#include "layers.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "qlora_native/qlora_native.h"

// Each parallel loop below runs over independent rows or heads, so the sums are the same for any number of threads.

namespace qn = qlora_native;

namespace trainer {
namespace {

float dot(const float* a, const float* b, std::int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

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

void Attention::forward(const float* q, const float* k, const float* v, float* p, float* y) const {
  const std::int64_t q_width = heads * head_dim, kv_width = kv_heads * head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
#pragma omp parallel for
  for (std::int64_t task = 0; task < sequences * heads; ++task) {
    const std::int64_t row = task / heads * length, h = task % heads, kv = h * kv_heads / heads * head_dim;
    for (std::int64_t t = 0; t < length; ++t) {
      const float* query = q + (row + t) * q_width + h * head_dim;
      float* probability = p + (task * length + t) * length;
      float most = -INFINITY, sum = 0.0f;
      for (std::int64_t s = 0; s <= t; ++s) {
        probability[s] = scale * dot(query, k + (row + s) * kv_width + kv, head_dim);
        most = std::max(most, probability[s]);
      }
      for (std::int64_t s = 0; s <= t; ++s) sum += probability[s] = std::exp(probability[s] - most);
      float* out = y + (row + t) * q_width + h * head_dim;
      std::fill_n(out, head_dim, 0.0f);
      for (std::int64_t s = 0; s <= t; ++s) {
        probability[s] /= sum;
        add_scaled(v + (row + s) * kv_width + kv, probability[s], head_dim, out);
      }
    }
  }
}

void Attention::backward(const float* dy, const float* q, const float* k, const float* v, const float* p, float* dq,
                         float* dk, float* dv) const {
  const std::int64_t q_width = heads * head_dim, kv_width = kv_heads * head_dim, group = heads / kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  // A task takes all query heads that share keys and values, so no two tasks add to the same gradients.
#pragma omp parallel for
  for (std::int64_t task = 0; task < sequences * kv_heads; ++task) {
    const std::int64_t sequence = task / kv_heads, row = sequence * length, kv = task % kv_heads * head_dim;
    for (std::int64_t t = 0; t < length; ++t) {
      std::fill_n(dk + (row + t) * kv_width + kv, head_dim, 0.0f);
      std::fill_n(dv + (row + t) * kv_width + kv, head_dim, 0.0f);
    }
    for (std::int64_t h = task % kv_heads * group; h < (task % kv_heads + 1) * group; ++h)
      for (std::int64_t t = 0; t < length; ++t) {
        const std::int64_t at = (row + t) * q_width + h * head_dim;
        const float* probability = p + ((sequence * heads + h) * length + t) * length;
        std::fill_n(dq + at, head_dim, 0.0f);
        float mean = 0.0f;
        for (std::int64_t s = 0; s <= t; ++s)
          mean += probability[s] * dot(dy + at, v + (row + s) * kv_width + kv, head_dim);
        for (std::int64_t s = 0; s <= t; ++s) {
          const std::int64_t other = (row + s) * kv_width + kv;
          const float dscore = scale * probability[s] * (dot(dy + at, v + other, head_dim) - mean);
          add_scaled(k + other, dscore, head_dim, dq + at);
          add_scaled(q + at, dscore, head_dim, dk + other);
          add_scaled(dy + at, probability[s], head_dim, dv + other);
        }
      }
  }
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
