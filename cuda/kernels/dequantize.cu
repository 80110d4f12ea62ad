// dequantize: a thread decodes eight neighbours, which share a scale. Double-quantized scales are decoded on the way.
#include "common/layout.h"
#include "device/elements.cuh"
#include "kernels/kernels.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeArgs args) {
  const QuantizedWeightView& w = args.weight;
  float* const code = dynamic_smem<float>();
  if constexpr (kBits == 4) {
    if (thread_index() < 16) code[thread_index()] = w.code[thread_index()];
    sync_threads();
  }
  const std::int64_t elements = w.elements();
  const std::int64_t step = grid_blocks() * kThreads * kEight;
  for (std::int64_t e = (block_index() * kThreads + thread_index()) * kEight; e < elements; e += step) {
    const int count = elements - e < kEight ? static_cast<int>(elements - e) : kEight;
    const float scale = scale_of_block(w, e / w.blocksize);  // 8 divides every blocksize
    float values[kEight];
    if constexpr (kBits == 4) {
      std::uint32_t pairs = 0;
      if (count == kEight && is_aligned(w.codes + e / 2, 4)) {
        pairs = load_vector<std::uint32_t, 1>(reinterpret_cast<const std::uint32_t*>(w.codes + e / 2)).at[0];
      } else {
        for (int i = 0; i < (count + 1) / 2; ++i) pairs |= std::uint32_t{w.codes[e / 2 + i]} << (8 * i);
      }
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);  // the even one is in the high nibble
        values[i] = code[pairs >> shift & 15] * scale;
      }
    } else {
      std::uint8_t bytes[kEight];
      load_eight(w.codes + e, count, std::uint8_t{0}, bytes);
      const float unit = scale / 127.0f;
#pragma unroll
      for (int i = 0; i < kEight; ++i) values[i] = static_cast<float>(static_cast<std::int8_t>(bytes[i])) * unit;
    }
    store_eight_from_f32(static_cast<T*>(args.out) + e, count, values);
  }
}

}  // namespace

void dequantize(const DequantizeArgs& args, const Stream& stream) {
  LaunchShape shape = looping_grid((args.weight.elements() + kEight - 1) / kEight, kThreads, stream);
  shape.smem_bytes = 16 * sizeof(float);
  with_type(args.dtype, [&]<class T>() {
    if (args.weight.bits == 4) {
      launch<dequantize_kernel<T, 4>>(shape, stream, args);
    } else {
      launch<dequantize_kernel<T, 8>>(shape, stream, args);
    }
  });
}

}  // namespace qlora_native::QLN_CUDA
