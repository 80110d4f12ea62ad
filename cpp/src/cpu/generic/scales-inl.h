// The scales of a weight's blocks.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native {
namespace {

class Scales {
 public:
  explicit Scales(const QuantizedWeightView& w)
      : absmax_(w.absmax),
        nested_absmax_(w.nested_absmax),
        nested_code_(w.nested_code),
        offset_(w.offset != nullptr ? *w.offset : 0.0f),
        nested_blocksize_(w.nested_blocksize),
        // Without nested scales their blocksize may be any number.
        nested_shift_(w.nested_absmax != nullptr && (w.nested_blocksize & (w.nested_blocksize - 1)) == 0
                          ? __builtin_ctz(static_cast<unsigned>(w.nested_blocksize))
                          : -1),
        levels_(w.nested_code != nullptr ? w.nested_code : kNoLevels) {}

  // out[i] = scale of block first + i, for i < count.
  void decode(std::int64_t first, std::int64_t count, float* out) const {
    if (nested_absmax_ == nullptr) {
      __builtin_memcpy(out, static_cast<const float*>(absmax_) + first,
                       static_cast<std::size_t>(count) * sizeof(float));
      return;
    }
    const auto* absmax = static_cast<const std::uint8_t*>(absmax_) + first;
    if (count <= kFew) {
      for (std::int64_t i = 0; i < count; ++i)  // two roundings, as below
        out[i] = nested_code_[absmax[i]] * nested_absmax_[nested_of(first + i)] + offset_;
      return;
    }
    constexpr std::int64_t kAtOnce = kTableVectors * kLanes;
    for (std::int64_t i = 0; i < count; i += kAtOnce) {
      F32 values[kTableVectors];
      lookup_bytes(levels_, absmax + i, values, static_cast<int>(count - i < kAtOnce ? count - i : kAtOnce));
      for (int k = 0; k < kTableVectors && i + k * kLanes < count; ++k) {
        const std::int64_t begin = i + k * kLanes, block = first + begin;
        const int lanes = static_cast<int>(count - begin < kLanes ? count - begin : kLanes);
        F32 nested = set1(nested_absmax_[nested_of(block)]);
        if (nested_of(block) != nested_of(block + lanes - 1)) {
          float each[kLanes] = {};
          for (int lane = 0; lane < lanes; ++lane) each[lane] = nested_absmax_[nested_of(block + lane)];
          nested = load(each);
        }
        // Two roundings, as bitsandbytes': not a fused multiply-add.
        store_from_f32<DType::f32>(out + begin, add(mul(values[k], nested), set1(offset_)), lanes);
      }
    }
  }

 private:
  // Up to so many are looked up one by one: a vector's lookup goes through all of the table.
  static constexpr std::int64_t kFew = 4;
  static constexpr float kNoLevels[256] = {};

  std::int64_t nested_of(std::int64_t block) const {
    return nested_shift_ >= 0 ? block >> nested_shift_ : block / nested_blocksize_;
  }

  const void* absmax_;
  const float *nested_absmax_, *nested_code_;
  float offset_;
  std::int64_t nested_blocksize_;
  int nested_shift_;  // -1: no power of two. It is one wherever this library or bitsandbytes has quantized.
  Table256 levels_;
};

}  // namespace
}  // namespace qlora_native
