// quantize_microscaled: a thread encodes a block. For NVFP4 a kernel before it finds the largest element of the weight.
#include "common/layout.h"
#include "common/microscaling.h"
#include "device/elements.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr std::uint32_t kInfinity = 0x7F800000;  // as bits; NaN lies above, every finite number below

__device__ std::uint32_t magnitude_bits(float value) { return std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFF; }

// Writes the complement of the bits of the largest |w|. The minimum of complements, which atomic_min() finds, is the
// complement of the maximum.
template <class T>
__global__ void __launch_bounds__(kThreads) absmax_kernel(const QuantizeMicroscaledArgs args, std::uint64_t* absmax) {
  std::uint32_t max_bits = 0;
  for (std::int64_t e = block_index() * kThreads + thread_index(); e < args.elements; e += grid_blocks() * kThreads) {
    const std::uint32_t magnitude = magnitude_bits(to_f32(static_cast<const T*>(args.weight)[e]));
    max_bits = magnitude > max_bits ? magnitude : max_bits;
  }
  max_bits = max_of_lanes(max_bits, kWarp);
  if (thread_index() % kWarp == 0) atomic_min(absmax, ~std::uint64_t{max_bits});
}

template <class T, int kBlocksize>
__global__ void __launch_bounds__(kThreads)
    quantize_microscaled_kernel(const QuantizeMicroscaledArgs args, const std::uint64_t* absmax) {
  float global_scale = 1.0f;
  if constexpr (kBlocksize == kNvfp4Blocksize) {
    global_scale = nvfp4_global_scale(std::bit_cast<float>(static_cast<std::uint32_t>(~*absmax)));
  }
  if (block_index() == 0) {
    const auto code = static_cast<std::uint8_t>(thread_index());
    args.nested_code[code] = level_of_scale<kBlocksize>(code, global_scale);
  }
  const std::int64_t blocks = ceil_div(args.elements, kBlocksize);
  for (std::int64_t block = block_index() * kThreads + thread_index(); block < blocks;
       block += grid_blocks() * kThreads) {
    const std::int64_t begin = block * kBlocksize, remaining = args.elements - begin;
    const T* const weight = static_cast<const T*>(args.weight) + begin;
    float w[kBlocksize];
    std::uint32_t max_bits = 0;
#pragma unroll
    for (int i = 0; i < kBlocksize; ++i) {
      w[i] = i < remaining ? to_f32(weight[i]) : 0.0f;
      max_bits = magnitude_bits(w[i]) > max_bits ? magnitude_bits(w[i]) : max_bits;
    }
    if (max_bits >= kInfinity) {  // no codes are written, because the caller throws
#pragma unroll 1
      for (int i = 0; i < kBlocksize && i < remaining; ++i) {
        if (magnitude_bits(to_f32(weight[i])) < kInfinity) continue;
        atomic_add(reinterpret_cast<std::uint64_t*>(&args.non_finite->count), 1);
        atomic_min(reinterpret_cast<std::uint64_t*>(&args.non_finite->first), static_cast<std::uint64_t>(begin + i));
      }
      continue;
    }
    std::uint8_t codes[kBlocksize / 2];
    args.scales[block] = encode_block<kBlocksize>(w, std::bit_cast<float>(max_bits), global_scale, codes);
#pragma unroll
    for (int i = 0; i < kBlocksize / 2; ++i) {
      if (2 * i < remaining) args.codes[begin / 2 + i] = codes[i];
    }
  }
}

template <class T, int kBlocksize>
void quantize_as(const QuantizeMicroscaledArgs& args, const Stream& stream) {
  constexpr bool kHasGlobalScale = kBlocksize == kNvfp4Blocksize;
  const Workspace workspace(kHasGlobalScale ? sizeof(std::uint64_t) : 0, stream);
  auto* const absmax = reinterpret_cast<std::uint64_t*>(workspace.data());
  if constexpr (kHasGlobalScale) {
    fill_bytes(absmax, 0xFF, sizeof(*absmax), stream);
    launch<absmax_kernel<T>>(looping_grid(args.elements, kThreads, stream), stream, args, absmax);
  }
  LaunchShape shape = looping_grid(ceil_div(args.elements, kBlocksize), kThreads, stream);
  if (shape.blocks == 0) shape.blocks = 1;  // the levels are written even if the weight has no block
  launch<quantize_microscaled_kernel<T, kBlocksize>>(shape, stream, args, static_cast<const std::uint64_t*>(absmax));
}

}  // namespace

void quantize_microscaled(const QuantizeMicroscaledArgs& args, const Stream& stream) {
  static_assert(kThreads == 256);  // a thread for each level
  fill_bytes(&args.non_finite->count, 0, sizeof(args.non_finite->count), stream);
  fill_bytes(&args.non_finite->first, 0xFF, sizeof(args.non_finite->first), stream);
  with_type(args.dtype, [&]<class T>() {
    if (args.blocksize == kMxfp4Blocksize) {
      quantize_as<T, kMxfp4Blocksize>(args, stream);
    } else {
      quantize_as<T, kNvfp4Blocksize>(args, stream);
    }
  });
}

}  // namespace qlora_native::QLN_CUDA
