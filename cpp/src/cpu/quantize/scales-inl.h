// The scales of a weight's blocks.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native::QLN_ISA {
namespace {

// Blocks of some rows: `count` blocks of each, the first row's from block `first` on, and each other row's `row_blocks`
// after those of the row before.
struct BlocksOfRows {
  std::int64_t first, count, rows, row_blocks;
};

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
    if (count <= kMaxOneByOne) return decode_one_by_one(first, count, out);
    const auto* absmax = static_cast<const std::uint8_t*>(absmax_) + first;
    for (std::int64_t i = 0; i < count; i += kAtOnce) {
      F32 values[kTableVectors];
      lookup_bytes(levels_, absmax + i, values, static_cast<int>(count - i < kAtOnce ? count - i : kAtOnce));
      if (count - i >= kAtOnce && nested_of(first + i) == nested_of(first + i + kAtOnce - 1)) {
        const F32 nested = set1(nested_absmax_[nested_of(first + i)]);
        for (int k = 0; k < kTableVectors; ++k) store(out + i + k * kLanes, scaled(values[k], nested));
        continue;
      }
      for (int k = 0; k < kTableVectors && i + k * kLanes < count; ++k) {
        const std::int64_t begin = i + k * kLanes;
        const int lanes = static_cast<int>(count - begin < kLanes ? count - begin : kLanes);
        store_from_f32<DType::f32>(out + begin, scaled(values[k], nested_of_lanes(first + begin, lanes)), lanes);
      }
    }
  }
  // The scales of several rows, which out has `stride` floats apart.
  void decode(const BlocksOfRows& blocks, float* out, std::int64_t stride) const {
    const auto [first, count, rows, row_blocks] = blocks;
    if (nested_absmax_ != nullptr && count <= kMaxOneByOne) {
      for (std::int64_t row = 0; row < rows; ++row)
        decode_one_by_one(first + row * row_blocks, count, out + row * stride);
      return;
    }
    if (nested_absmax_ == nullptr || count > kAtOnce / 2) {
      for (std::int64_t row = 0; row < rows; ++row) decode(first + row * row_blocks, count, out + row * stride);
      return;
    }
    // All rows pass three loops: their bytes are copied, looked up, and scaled. In one loop each load would wait for
    // the parts that were just stored.
    const std::int64_t together = kStaged / count;
    for (std::int64_t row = 0; row < rows; row += together) {
      const std::int64_t end = row + together < rows ? row + together : rows;
      std::uint8_t bytes[kStaged] = {};
      for (std::int64_t r = row; r < end; ++r)
        copy_bytes(static_cast<const std::uint8_t*>(absmax_) + first + r * row_blocks, count,
                   bytes + (r - row) * count);
      float levels[kStaged + kLanes];
      for (std::int64_t i = 0; i < (end - row) * count; i += kAtOnce) {
        F32 values[kTableVectors];
        lookup_bytes(levels_, bytes + i, values);
        for (int k = 0; k < kTableVectors; ++k) store(levels + i + k * kLanes, values[k]);
      }
      for (std::int64_t r = row; r < end; ++r)
        for (std::int64_t i = 0; i < count; i += kLanes) {
          const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
          const F32 nested = nested_of_lanes(first + r * row_blocks + i, lanes);
          store_from_f32<DType::f32>(out + r * stride + i, scaled(load(levels + (r - row) * count + i), nested), lanes);
        }
    }
  }
  // Prefetches them.
  void prefetch(const BlocksOfRows& blocks) const {
    const auto [first, count, rows, row_blocks] = blocks;
    const std::int64_t size = nested_absmax_ == nullptr ? sizeof(float) : 1;
    const char* from = static_cast<const char*>(absmax_) + first * size;
    for (std::int64_t row = 0; row < rows; ++row, from += row_blocks * size)
      for (std::int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(from + i, 0, 2);
  }

 private:
  static constexpr std::int64_t kAtOnce = kTableVectors * kLanes;
  static constexpr std::int64_t kStaged = 512;  // scales of short rows that are decoded together

  [[gnu::always_inline]] void decode_one_by_one(std::int64_t first, std::int64_t count, float* out) const {
    const auto* absmax = static_cast<const std::uint8_t*>(absmax_) + first;
    for (std::int64_t i = 0; i < count; ++i)  // two roundings, as in scaled()
      out[i] = nested_code_[absmax[i]] * nested_absmax_[nested_of(first + i)] + offset_;
  }
  // Two roundings, as bitsandbytes': not a fused multiply-add.
  F32 scaled(F32 level, F32 nested) const { return add(mul(level, nested), set1(offset_)); }
  // nested_absmax of the blocks first ... first+lanes-1.
  F32 nested_of_lanes(std::int64_t first, int lanes) const {
    if (nested_of(first) == nested_of(first + lanes - 1)) return set1(nested_absmax_[nested_of(first)]);
    float each[kLanes] = {};
    for (int lane = 0; lane < lanes; ++lane) each[lane] = nested_absmax_[nested_of(first + lane)];
    return load(each);
  }
  // For so few bytes a call of memcpy would take longer.
  static void copy_bytes(const std::uint8_t* from, std::int64_t count, std::uint8_t* to) {
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8) __builtin_memcpy(to + i, from + i, 8);
    for (; i < count; ++i) to[i] = from[i];
  }

  // So many scales or fewer are looked up one by one, for the lookup of a vector goes through all of the table.
  static constexpr std::int64_t kMaxOneByOne = 4;
  static constexpr float kNoLevels[256] = {};

  std::int64_t nested_of(std::int64_t block) const {
    return nested_shift_ >= 0 ? block >> nested_shift_ : block / nested_blocksize_;
  }

  const void* absmax_;
  const float *nested_absmax_, *nested_code_;
  float offset_;
  std::int64_t nested_blocksize_;
  int nested_shift_;  // -1 where the blocksize is no power of two. Those of this library and of bitsandbytes are.
  Table256 levels_;
};

}  // namespace
}  // namespace qlora_native::QLN_ISA
