// Decodes a quantized weight into memory, eight contiguous elements a thread, for dequantize and for panels.
#pragma once

#include "common/layout.h"
#include "device/elements.cuh"
#include "device/weight_block.cuh"

namespace qlora_native::QLN_CUDA {

// Whether eight elements that begin at a multiple of 8 take one load of codes, and find their scale by shifts.
inline bool supports_vec8(const QuantizedWeightView& w) {
  return is_aligned(w.codes, w.bits) && (w.nested_absmax == nullptr || is_power_of_two(w.nested_blocksize));
}

// kPlain: whether the weight has_plain_scales().
template <int kBits, bool kPlain>
class Vec8Decoder {
 public:
  // The table has 8 KB of shared memory, so that eight blocks fit any SM.
  using Table = PairTable<4>;
  static constexpr std::size_t kSmemBytes = kBits == 4 ? Table::kPairs * sizeof(Table::Pair) : 0;

  // All threads of a block call this; the block's shared memory becomes the table.
  __device__ Vec8Decoder(const QuantizedWeightView& w, const WeightScales& scales)
      : w_(w), blocks_(w, scales), table_(filled(w)), offset_(blocks_.offset()) {}

  // Decodes elements e ... e + 7, which share a scale and a minimum, in fp32 and not yet rounded. e is a multiple of 8,
  // and so is every blocksize.
  __device__ __forceinline__ void decode(std::int64_t e, float (&values)[kVecSize]) const {
    const BlockScale block = blocks_.finish(blocks_.fetch(e), offset_);
    if constexpr (kBits == 4) {
      const std::uint32_t codes =
          load_vector<std::uint32_t, 1>(reinterpret_cast<const std::uint32_t*>(w_.codes + e / 2)).at[0];
#pragma unroll
      for (int i = 0; i < kVecSize; i += 2) {
        const Table::Pair pair = table_.pair_of_byte(codes, i / 2);
        values[i] = block.value(pair.at[0]);
        values[i + 1] = block.value(pair.at[1]);
      }
    } else {
      const auto codes = load_vector<std::uint32_t, 2>(reinterpret_cast<const std::uint32_t*>(w_.codes + e));
      decode_bytes<kPlain>(w_, block, codes, values);
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
  const BlockReader<kPlain> blocks_;
  const Table table_;
  const float offset_;
};

// Calls f.template operator()<kBits, kPlain>() with what a decoder of the weight has.
template <class F>
void with_vec8_decoder(const QuantizedWeightView& w, const F& f) {
  const auto with_scales = [&]<int kBits>() {
    has_plain_scales(w) ? f.template operator()<kBits, true>() : f.template operator()<kBits, false>();
  };
  w.bits == 4 ? with_scales.template operator()<4>() : with_scales.template operator()<8>();
}

}  // namespace qlora_native::QLN_CUDA
