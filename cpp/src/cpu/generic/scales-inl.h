// The scales of consecutive blocks.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native {
namespace {

// Up to so many scales are looked up one by one: a vector's lookup goes through all of the table.
constexpr std::int64_t kFewScales = 4;

// out[i] = scale of block first + i, for i < count. `levels`: the table of w.nested_code.
inline void decode_scales(const QuantizedWeightView& w, const Table256& levels, std::int64_t first, std::int64_t count,
                          float* out) {
  if (w.nested_absmax == nullptr) {
    __builtin_memcpy(out, static_cast<const float*>(w.absmax) + first, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const std::uint8_t* absmax = static_cast<const std::uint8_t*>(w.absmax);
  const F32 offset = set1(*w.offset);
  // A power of two wherever this library or bitsandbytes has quantized.
  const std::int64_t size = w.nested_blocksize;
  const int shift = (size & (size - 1)) == 0 ? __builtin_ctz(static_cast<unsigned>(w.nested_blocksize)) : -1;
  const auto nested_of = [&](std::int64_t block) { return shift >= 0 ? block >> shift : block / size; };
  if (count <= kFewScales) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float level = w.nested_code[absmax[first + i]];
      out[i] = level * w.nested_absmax[nested_of(first + i)] + *w.offset;  // two roundings, as below
    }
    return;
  }
  std::int64_t i = 0;
  for (; count - i >= kTableVectors * kLanes; i += kTableVectors * kLanes) {
    F32 values[kTableVectors];
    lookup_bytes(levels, absmax + first + i, values);
    for (int k = 0; k < kTableVectors; ++k) {
      const std::int64_t block = first + i + k * kLanes;
      F32 nested = set1(w.nested_absmax[nested_of(block)]);
      if (nested_of(block) != nested_of(block + kLanes - 1)) {
        float each[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) each[lane] = w.nested_absmax[nested_of(block + lane)];
        nested = load(each);
      }
      store(out + i + k * kLanes, add(mul(values[k], nested), offset));
    }
  }
  while (i < count) {
    const std::int64_t block = first + i;
    const std::int64_t nested = nested_of(block);
    const std::int64_t left_in_nested = (nested + 1) * size - block;
    std::int64_t lanes = count - i < kLanes ? count - i : kLanes;
    if (left_in_nested < lanes) lanes = left_in_nested;
    const F32 levels = lookup_bytes(w.nested_code, absmax + block, static_cast<int>(lanes));
    // Two roundings, as bitsandbytes': not a fused multiply-add.
    const F32 scales = add(mul(levels, set1(w.nested_absmax[nested])), offset);
    store_from_f32<DType::f32>(out + i, scales, static_cast<int>(lanes));
    i += lanes;
  }
}

}  // namespace
}  // namespace qlora_native
