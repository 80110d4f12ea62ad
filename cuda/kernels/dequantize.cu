// dequantize: a thread decodes eight neighbours, which share a scale, by loads and stores of vectors. Double-quantized
// scales are decoded on the way. What vectors cannot reach, at most the last seven elements of an array as it is
// usually allocated, is decoded one by one.
#include "common/layout.h"
#include "device/problem.cuh"
#include "kernels/kernels.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;
// 8 KB of shared memory: eight blocks have room on any multiprocessor.
using Table = PairTable<4>;

struct Dequantize {
  DequantizeArgs args;
  std::int64_t in_eights;  // elements that are decoded eight at a time: the first
  WeightScales scales;
};

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Dequantize d) {
  const QuantizedWeightView& w = d.args.weight;
  T* const out = static_cast<T*>(d.args.out);
  auto* const pairs = dynamic_smem<Table::Pair>();
  if constexpr (kBits == 4) {
    Table::fill(pairs, w.code);
    sync_threads();
  }
  const Table table(pairs);
  const bool is_nested = w.nested_absmax != nullptr;
  const float offset = is_nested ? *w.offset : 0.0f;
  const std::int64_t thread = block_index() * kThreads + thread_index(), threads = grid_blocks() * kThreads;
  for (std::int64_t e = thread * kEight; e < d.in_eights; e += threads * kEight) {
    const std::int64_t block = e >> d.scales.block;  // 8 divides every blocksize
    float scale;
    if (is_nested) {
      const float level = w.nested_code[static_cast<const std::uint8_t*>(w.absmax)[block]];
      scale = nested_scale(level, w.nested_absmax[block >> d.scales.sharing], offset);
    } else {
      scale = static_cast<const float*>(w.absmax)[block];
    }
    float values[kEight];
    if constexpr (kBits == 4) {
      const std::uint32_t codes =
          load_vector<std::uint32_t, 1>(reinterpret_cast<const std::uint32_t*>(w.codes + e / 2)).at[0];
#pragma unroll
      for (int i = 0; i < kEight; i += 2) {
        const Table::Pair pair = table.of_byte(codes, i / 2);
        values[i] = pair.at[0] * scale;
        values[i + 1] = pair.at[1] * scale;
      }
    } else {
      std::uint8_t bytes[kEight];
      load_eight_aligned(w.codes + e, bytes);
      const float unit = scale / 127.0f;
#pragma unroll
      for (int i = 0; i < kEight; ++i) values[i] = static_cast<float>(static_cast<std::int8_t>(bytes[i])) * unit;
    }
    store_eight_aligned_from_f32(out + e, values);
  }
  for (std::int64_t e = d.in_eights + thread; e < w.elements(); e += threads) {
    out[e] = from_f32<T>(value_of_element(w, e, scale_of_block(w, e / w.blocksize)));
  }
}

}  // namespace

void dequantize(const DequantizeArgs& args, const Stream& stream) {
  const QuantizedWeightView& w = args.weight;
  const bool in_vectors = is_aligned(w.codes, w.bits) && is_aligned(args.out, kVectorBytes) &&
                          (w.nested_absmax == nullptr || is_power_of_two(w.nested_blocksize));
  const Dequantize d{
      .args = args, .in_eights = in_vectors ? w.elements() / kEight * kEight : 0, .scales = scales_of(w)};
  LaunchShape shape = looping_grid(ceil_div(w.elements(), kEight), kThreads, stream);
  shape.smem_bytes = w.bits == 4 ? Table::kPairs * sizeof(Table::Pair) : 0;
  with_type(args.dtype, [&]<class T>() {
    if (w.bits == 4) {
      launch<dequantize_kernel<T, 4>>(shape, stream, d);
    } else {
      launch<dequantize_kernel<T, 8>>(shape, stream, d);
    }
  });
}

}  // namespace qlora_native::QLN_CUDA
