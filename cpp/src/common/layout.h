// The layout of a quantized weight (types.h), one element at a time. Every backend must agree with these functions.
#pragma once

#include "common/host_device.h"
#include "qlora_native/types.h"

namespace qlora_native {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t multiple) { return ceil_div(a, multiple) * multiple; }
constexpr std::int64_t bytes_of_codes(std::int64_t elements, int bits) {
  return bits == 8 ? elements : (elements + 1) / 2;
}

// A double-quantized scale. The product and the sum are rounded separately.
QLN_HOST_DEVICE inline float nested_scale(float level, float nested_absmax, float offset) {
  const float product = level * nested_absmax;
  return product + offset;
}

QLN_HOST_DEVICE inline float scale_of_block(const QuantizedWeightView& w, std::int64_t block) {
  if (w.nested_absmax == nullptr) return static_cast<const float*>(w.absmax)[block];
  const float level = w.nested_code[static_cast<const std::uint8_t*>(w.absmax)[block]];
  return nested_scale(level, w.nested_absmax[block / w.nested_blocksize], *w.offset);
}

QLN_HOST_DEVICE inline std::uint8_t nibble_of_element(const std::uint8_t* codes, std::int64_t element) {
  const std::uint8_t byte = codes[element / 2];
  return element % 2 == 0 ? byte >> 4 : byte & 0x0F;
}

// Element `element` of the flat weight in fp32, not yet rounded to another dtype. `scale` is that of its block.
QLN_HOST_DEVICE inline float value_of_element(const QuantizedWeightView& w, std::int64_t element, float scale) {
  if (w.bits == 8) return static_cast<float>(static_cast<std::int8_t>(w.codes[element])) * (scale / 127.0f);
  return w.code[nibble_of_element(w.codes, element)] * scale;
}

}  // namespace qlora_native
