// What the tests of operations share: matrices of every dtype, and the sizes of rounding errors.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "common/float16.h"
#include "expect.h"
#include "qlora_native/types.h"

namespace qn = qlora_native;
using qn::DType;

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr double kSumFactor = 6.0;  // standard deviations that a sum's error may reach; none of 1e9 goes beyond

inline double unit_roundoff(DType dtype) {
  return dtype == DType::f32 ? 0x1p-24 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
}
// The unit roundoff of a sum. Dot products of bfloat16 may round to odd, whose error is twice that of rounding to
// nearest.
inline double sum_roundoff(DType dtype) { return dtype == DType::bf16 ? 0x1p-23 : 0x1p-24; }
// What may vanish: dot products of bfloat16 take subnormal numbers as zero.
inline double smallest_normal(DType dtype) { return dtype == DType::f16 ? 0x1p-14 : 0x1p-126; }

inline float rounded(DType dtype, float value) {
  if (dtype == DType::bf16) return qn::f32_from_bf16(qn::bf16_from_f32(value));
  return dtype == DType::f16 ? qn::f32_from_f16(qn::f16_from_f32(value)) : value;
}

struct Random {
  std::uint64_t state;
  explicit Random(std::uint64_t seed) : state(seed * 0x9E3779B97F4A7C15 + 1) {}
  float uniform() {  // in [-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<std::int32_t>(state >> 32)) * 0x1p-31f;
  }
  float normal() { return uniform() + uniform() + uniform(); }  // nearly, of variance 1
};

// A matrix whose rows lie `gap` elements apart; what is between them must stay as it is.
class Tensor {
 public:
  Tensor(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t gap = 0)
      : dtype_(dtype), rows_(rows), cols_(cols), stride_(cols + gap) {
    bytes_.assign(static_cast<std::size_t>(rows * stride_) * qn::size_of(dtype), kUntouched);
  }
  Tensor& fill(Random& random, float scale) {
    for (std::int64_t i = 0; i < rows_; ++i)
      for (std::int64_t j = 0; j < cols_; ++j) set(i, j, scale * random.normal());
    return *this;
  }
  void set(std::int64_t i, std::int64_t j, float value) {
    if (dtype_ == DType::f32) return put(i, j, value);
    put(i, j, dtype_ == DType::bf16 ? qn::bf16_from_f32(value) : qn::f16_from_f32(value));
  }
  float at(std::int64_t i, std::int64_t j) const {
    if (dtype_ == DType::f32) return get<float>(i, j);
    const auto half = get<std::uint16_t>(i, j);
    return dtype_ == DType::bf16 ? qn::f32_from_bf16(half) : qn::f32_from_f16(half);
  }
  std::vector<double> values() const {
    std::vector<double> all;
    for (std::int64_t i = 0; i < rows_; ++i)
      for (std::int64_t j = 0; j < cols_; ++j) all.push_back(at(i, j));
    return all;
  }
  bool keeps_to_its_columns() const {
    const std::size_t size = qn::size_of(dtype_);
    for (std::size_t i = 0; i < bytes_.size(); ++i)
      if (static_cast<std::int64_t>(i / size) % stride_ >= cols_ && bytes_[i] != kUntouched) return false;
    return true;
  }
  qn::ConstMatrix in() const { return {bytes_.data(), dtype_, rows_, cols_, stride_}; }
  qn::Matrix out() { return {bytes_.data(), dtype_, rows_, cols_, stride_}; }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  DType dtype() const { return dtype_; }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  static constexpr char kUntouched = 0x5A;

  template <class T>
  void put(std::int64_t i, std::int64_t j, T value) {
    std::memcpy(bytes_.data() + (i * stride_ + j) * static_cast<std::int64_t>(sizeof(T)), &value, sizeof(T));
  }
  template <class T>
  T get(std::int64_t i, std::int64_t j) const {
    T value;
    std::memcpy(&value, bytes_.data() + (i * stride_ + j) * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
    return value;
  }

  DType dtype_;
  std::int64_t rows_, cols_, stride_;
  std::vector<char> bytes_;
};
