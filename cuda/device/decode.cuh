// Decodes a quantized weight into memory, eight contiguous elements a thread, for dequantize and for panels.
#pragma once

#include "common/layout.h"
#include "device/elements.cuh"
#include "device/weight_chunk.cuh"

namespace qlora_native::QLN_CUDA {

// Whether eight elements that begin at a multiple of 8 take one load of codes, and find their scale by shifts.
inline bool supports_vec8(const QuantizedWeightView& w) {
  return is_aligned(w.codes, w.bits) && (w.nested_absmax == nullptr || is_power_of_two(w.nested_blocksize));
}

template <int kBits>
class Vec8Decoder {
 public:
  // The table has 8 KB of shared memory, so that eight blocks fit any SM.
  using Table = PairTable<4>;
  static constexpr std::size_t kSmemBytes = kBits == 4 ? Table::kPairs * sizeof(Table::Pair) : 0;

  // All threads of a block call this; the block's shared memory becomes the table.
  __device__ Vec8Decoder(const QuantizedWeightView& w, const WeightScales& scales)
      : w_(w),
        scales_(scales),
        table_(filled(w)),
        is_nested_(w.nested_absmax != nullptr),
        offset_(is_nested_ ? *w.offset : 0.0f) {}

  // Decodes elements e ... e + 7, which share a scale: code times scale in fp32, not yet rounded. e is a multiple of 8,
  // and so is every blocksize.
  __device__ __forceinline__ void decode(std::int64_t e, float (&values)[kVecSize]) const {
    const std::int64_t block = e >> scales_.block_shift;
    float scale;
    if (is_nested_) {
      const float level = w_.nested_code[static_cast<const std::uint8_t*>(w_.absmax)[block]];
      scale = nested_scale(level, w_.nested_absmax[block >> scales_.absmax_shift], offset_);
    } else {
      scale = static_cast<const float*>(w_.absmax)[block];
    }
    if constexpr (kBits == 4) {
      const std::uint32_t codes =
          load_vector<std::uint32_t, 1>(reinterpret_cast<const std::uint32_t*>(w_.codes + e / 2)).at[0];
#pragma unroll
      for (int i = 0; i < kVecSize; i += 2) {
        const Table::Pair pair = table_.pair_of_byte(codes, i / 2);
        values[i] = pair.at[0] * scale;
        values[i + 1] = pair.at[1] * scale;
      }
    } else {
      std::uint8_t bytes[kVecSize];
      load_vec8_aligned(w_.codes + e, bytes);
      const float unit = scale / 127.0f;
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) values[i] = static_cast<float>(static_cast<std::int8_t>(bytes[i])) * unit;
    }
  }

 private:
  __device__ static const Table::Pair* filled(const QuantizedWeightView& w) {
    auto* const pairs = dynamic_smem<Table::Pair>();
    if constexpr (kBits == 4) {
      Table::fill(pairs, w.code);
      sync_threads();
    }
    return pairs;
  }

  const QuantizedWeightView& w_;
  const WeightScales& scales_;
  const Table table_;
  const bool is_nested_;
  const float offset_;
};

}  // namespace qlora_native::QLN_CUDA
