// The layout of a quantized weight (types.h), one element at a time. Every backend must agree with these functions.
#pragma once

#include "common/float16.h"
#include "common/host_device.h"
#include "common/microscaling.h"
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

// Element i of scales, or of minima, that are not bytes.
QLN_HOST_DEVICE inline float stored_scale(const void* scales, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(scales)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(scales)[i];
  return dtype == DType::bf16 ? f32_from_bf16(bits) : f32_from_f16(bits);
}

QLN_HOST_DEVICE inline float scale_of_block(const QuantizedWeightView& w, std::int64_t block) {
  if (w.nested_absmax == nullptr) return stored_scale(w.absmax, w.scale_dtype, block);
  const float level = w.nested_code[static_cast<const std::uint8_t*>(w.absmax)[block]];
  return nested_scale(level, w.nested_absmax[block / w.nested_blocksize], *w.offset);
}

// `scale` is that of the block. Without a minimum this is -0, which changes nothing that it is added to.
QLN_HOST_DEVICE inline float minimum_of_block(const QuantizedWeightView& w, std::int64_t block, float scale) {
  if (w.zero_point != nullptr) return -(static_cast<float>(w.zero_point[block]) * scale);
  if (w.minimum == nullptr) return -0.0f;
  if (w.nested_minimum == nullptr) return stored_scale(w.minimum, w.scale_dtype, block);
  const float level = w.nested_code[static_cast<const std::uint8_t*>(w.minimum)[block]];
  return level * w.nested_minimum[block / w.nested_blocksize];
}

QLN_HOST_DEVICE inline std::uint8_t nibble_of_element(const std::uint8_t* codes, std::int64_t element) {
  const std::uint8_t byte = codes[element / 2];
  return element % 2 == 0 ? byte >> 4 : byte & 0x0F;
}

// The value of an E4M3 number with a sign.
constexpr float f32_from_signed_e4m3(std::uint8_t code) {
  const float size = f32_from_e4m3(code & 0x7F);
  return code >> 7 == 0 ? size : -size;
}

QLN_HOST_DEVICE inline float level_of_element(const QuantizedWeightView& w, std::int64_t element) {
  if (w.bits == 4) return w.code[nibble_of_element(w.codes, element)];
  const std::uint8_t byte = w.codes[element];
  return w.byte_format == ByteFormat::e4m3 ? f32_from_signed_e4m3(byte)
                                           : static_cast<float>(static_cast<std::int8_t>(byte));
}

// What a level of 1 stands for in a block of this scale.
QLN_HOST_DEVICE inline float unit_of_scale(const QuantizedWeightView& w, float scale) {
  return w.bits == 8 && w.byte_format == ByteFormat::absmax_int8 ? scale / 127.0f : scale;
}

// Element `element` of the flat weight in fp32, not yet rounded to another dtype. `scale` and `minimum` are those of
// its block.
QLN_HOST_DEVICE inline float value_of_element(const QuantizedWeightView& w, std::int64_t element, float scale,
                                              float minimum) {
  const float product = level_of_element(w, element) * unit_of_scale(w, scale);
  return product + minimum;
}
QLN_HOST_DEVICE inline float value_of_element(const QuantizedWeightView& w, std::int64_t element) {
  const std::int64_t block = element / w.blocksize;
  const float scale = scale_of_block(w, block);
  return value_of_element(w, element, scale, minimum_of_block(w, block, scale));
}

}  // namespace qlora_native
