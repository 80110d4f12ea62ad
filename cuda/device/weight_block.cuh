// The scale and the minimum of a block, of a weight in any format (types.h).
//
// A kernel that is for every weight has a template parameter, kPlain: whether the weight has_plain_scales(). For these
// it is compiled without what only other formats need.
#pragma once

#include <bit>
#include <cmath>

#include "common/layout.h"
#include "device/elements.cuh"
#include "device/weight_chunk.cuh"

namespace qlora_native::QLN_CUDA {

struct BlockScale {
  float scale, minimum;
  __device__ __forceinline__ float value(float level) const { return level * scale + minimum; }
  __device__ __forceinline__ float value(float level, int) const { return value(level); }  // as ChunkScale has it
};

// The same weight. From the result the compiler knows what plain scales imply.
template <bool kPlain>
__device__ __forceinline__ QuantizedWeightView assume(QuantizedWeightView w) {
  if constexpr (kPlain) {
    w.scale_dtype = DType::f32;
    w.byte_format = ByteFormat::absmax_int8;
    w.minimum = nullptr;
    w.nested_minimum = nullptr;
    w.zero_point = nullptr;
  }
  return w;
}

// Reads the scale and the minimum of a block in two halves, as ScaleReader does: fetch() loads from memory, and
// finish() computes. The results are those of layout.h.
template <bool kPlain>
class BlockReader {
 public:
  struct Raw {
    std::uint32_t scale = 0, minimum = 0;  // as they are stored, in 8, 16 or 32 bits
    float nested_absmax = 0.0f, nested_minimum = 0.0f;
  };
  __device__ BlockReader(const QuantizedWeightView& w, const WeightScales& scales)
      : w_(assume<kPlain>(w)),
        nested_(scales.nested),
        block_shift_(scales.block_shift),
        nested_shift_(scales.absmax_shift) {}
  __device__ __forceinline__ float offset() const { return nested_ ? *w_.offset : 0.0f; }

  // kByShifts: whether nested_blocksize is known to be a power of two.
  template <bool kByShifts = true>
  __device__ __forceinline__ Raw fetch(std::int64_t element) const {
    const std::int64_t block = element >> block_shift_;
    const std::int64_t nested = kByShifts || nested_shift_ >= 0 ? block >> nested_shift_ : block / w_.nested_blocksize;
    Raw raw;
    if (nested_) {
      raw.scale = static_cast<const std::uint8_t*>(w_.absmax)[block];
      raw.nested_absmax = w_.nested_absmax[nested];
    } else {
      raw.scale = stored(w_.absmax, block);
    }
    if (w_.zero_point != nullptr) {
      raw.minimum = static_cast<std::uint8_t>(w_.zero_point[block]);
    } else if (w_.nested_minimum != nullptr) {
      raw.minimum = static_cast<const std::uint8_t*>(w_.minimum)[block];
      raw.nested_minimum = w_.nested_minimum[nested];
    } else if (w_.minimum != nullptr) {
      raw.minimum = stored(w_.minimum, block);
    }
    return raw;
  }
  __device__ __forceinline__ BlockScale finish(const Raw& raw, float offset) const {
    const float scale =
        nested_ ? nested_scale(w_.nested_code[raw.scale], raw.nested_absmax, offset) : from_stored(raw.scale);
    if (w_.zero_point != nullptr) return {scale, -(static_cast<float>(static_cast<std::int8_t>(raw.minimum)) * scale)};
    if (w_.nested_minimum != nullptr) return {scale, w_.nested_code[raw.minimum] * raw.nested_minimum};
    return {scale, w_.minimum != nullptr ? from_stored(raw.minimum) : -0.0f};
  }

 private:
  __device__ __forceinline__ std::uint32_t stored(const void* scales, std::int64_t block) const {
    if (w_.scale_dtype == DType::f32) return static_cast<const std::uint32_t*>(scales)[block];
    return static_cast<const std::uint16_t*>(scales)[block];
  }
  __device__ __forceinline__ float from_stored(std::uint32_t bits) const {
    if (w_.scale_dtype == DType::f32) return std::bit_cast<float>(bits);
    const auto half = static_cast<std::uint16_t>(bits);
    return w_.scale_dtype == DType::bf16 ? to_f32(Bf16{half}) : to_f32(F16{half});
  }

  const QuantizedWeightView w_;
  const bool nested_;
  const int block_shift_, nested_shift_;
};

// One element, whichever way it lies. It is not yet rounded.
template <bool kPlain>
__device__ __forceinline__ float value_of(const QuantizedWeightView& w, const WeightScales& scales,
                                          std::int64_t element) {
  const BlockReader<kPlain> blocks(w, scales);
  const BlockScale block = blocks.finish(blocks.template fetch<false>(element), blocks.offset());
  return value_of_element(assume<kPlain>(w), element, block.scale, block.minimum);
}

// f32_from_signed_e4m3() without a branch: exponents of fp32 and of E4M3 differ by 120, and the product is exact for
// the numbers below the normal ones too.
__device__ __forceinline__ float level_of_e4m3(std::uint32_t byte) {
  const float level = std::bit_cast<float>((byte & 0x80) << 24 | (byte & 0x7F) << 20) * 0x1p120f;
  return (byte & 0x7F) == 0x7F ? NAN : level;
}

// What a level of 8-bit codes stands for in a block.
template <bool kPlain>
__device__ __forceinline__ BlockScale unit_of_bytes(const QuantizedWeightView& weight, const BlockScale& block) {
  QuantizedWeightView w = assume<kPlain>(weight);
  w.bits = 8;
  return {unit_of_scale(w, block.scale), block.minimum};
}

// Decodes eight codes of 8 bits, which are two words.
template <bool kPlain, class Words>
__device__ __forceinline__ void decode_bytes(const QuantizedWeightView& w, const BlockScale& block, const Words& words,
                                             float (&values)[kVecSize]) {
  const BlockScale unit = unit_of_bytes<kPlain>(w, block);
  const auto byte = [&](int i) { return byte_of(words.at[i / 4], i % 4); };
  if (assume<kPlain>(w).byte_format == ByteFormat::e4m3) {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) values[i] = unit.value(level_of_e4m3(byte(i)));
  } else {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      values[i] = unit.value(static_cast<float>(static_cast<std::int8_t>(byte(i))));
    }
  }
}

}  // namespace qlora_native::QLN_CUDA
