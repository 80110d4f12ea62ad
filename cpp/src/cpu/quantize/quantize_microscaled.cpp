#include "cpu/quantize/quantize_microscaled.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>

#include "common/float16.h"
#include "common/layout.h"
#include "common/microscaling.h"
#include "cpu/runtime/parallel.h"

namespace qlora_native {
namespace {

constexpr std::int64_t kTaskElements = 64 << 10;

float to_f32(float value, DType) { return value; }
float to_f32(std::uint16_t bits, DType dtype) {
  return dtype == DType::bf16 ? f32_from_bf16(bits) : f32_from_f16(bits);
}
std::uint32_t magnitude_bits(float value) { return std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFF; }

template <class T>
float absmax_of(const QuantizeMicroscaledArgs& args) {
  const T* const weight = static_cast<const T*>(args.weight);
  std::mutex mutex;
  std::uint32_t max_bits = 0;
  parallel_for(ceil_div(args.elements, kTaskElements), [&](std::int64_t task) {
    const std::int64_t end = std::min(args.elements, (task + 1) * kTaskElements);
    std::uint32_t found = 0;
    for (std::int64_t e = task * kTaskElements; e < end; ++e) {
      found = std::max(found, magnitude_bits(to_f32(weight[e], args.dtype)));
    }
    const std::lock_guard lock(mutex);
    max_bits = std::max(max_bits, found);
  });
  return std::bit_cast<float>(max_bits);
}

template <class T, int kBlocksize>
void quantize_blocks(const QuantizeMicroscaledArgs& args, float global_scale) {
  const T* const weight = static_cast<const T*>(args.weight);
  NonFinite total;
  std::mutex mutex;
  parallel_for(ceil_div(args.elements, kTaskElements), [&](std::int64_t task) {
    const std::int64_t task_end = std::min(args.elements, (task + 1) * kTaskElements);
    NonFinite found;
    for (std::int64_t begin = task * kTaskElements; begin < task_end; begin += kBlocksize) {
      const std::int64_t count = std::min<std::int64_t>(kBlocksize, args.elements - begin);
      float w[kBlocksize] = {};
      std::uint32_t max_bits = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        w[i] = to_f32(weight[begin + i], args.dtype);
        max_bits = std::max(max_bits, magnitude_bits(w[i]));
      }
      if (max_bits >= kInfinityBits) {
        for (std::int64_t i = 0; i < count; ++i) {
          if (magnitude_bits(w[i]) >= kInfinityBits && found.count++ == 0) found.first = begin + i;
        }
        continue;
      }
      std::uint8_t codes[kBlocksize / 2];
      args.scales[begin / kBlocksize] =
          encode_block<kBlocksize>(w, std::bit_cast<float>(max_bits), global_scale, codes);
      std::memcpy(args.codes + begin / 2, codes, static_cast<std::size_t>((count + 1) / 2));
    }
    if (found.count == 0) return;
    const std::lock_guard lock(mutex);
    total.first = total.count == 0 ? found.first : std::min(total.first, found.first);
    total.count += found.count;
  });
  *args.non_finite = total;
}

template <class T, int kBlocksize>
void quantize_as(const QuantizeMicroscaledArgs& args) {
  const float global_scale = kBlocksize == kNvfp4Blocksize ? nvfp4_global_scale(absmax_of<T>(args)) : 1.0f;
  for (int i = 0; i < 256; ++i) {
    args.nested_code[i] = level_of_scale<kBlocksize>(static_cast<std::uint8_t>(i), global_scale);
  }
  quantize_blocks<T, kBlocksize>(args, global_scale);
}

template <class T>
void quantize_as(const QuantizeMicroscaledArgs& args) {
  args.blocksize == kMxfp4Blocksize ? quantize_as<T, kMxfp4Blocksize>(args) : quantize_as<T, kNvfp4Blocksize>(args);
}

}  // namespace

void quantize_microscaled_on_cpu(const QuantizeMicroscaledArgs& args, const Stream&) {
  args.dtype == DType::f32 ? quantize_as<float>(args) : quantize_as<std::uint16_t>(args);
}

}  // namespace qlora_native
