// dequantize: a thread decodes eight neighbours, which share a scale, by loads and stores of vectors. Double-quantized
// scales are decoded on the way. What vectors cannot reach, at most the last seven elements of an array as it is
// usually allocated, is decoded one by one.
#include "device/decode.cuh"
#include "operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;

struct Dequantize {
  DequantizeArgs args;
  std::int64_t in_eights;  // elements that are decoded eight at a time: the first
  WeightScales scales;
};

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Dequantize d) {
  const QuantizedWeightView& w = d.args.weight;
  T* const out = static_cast<T*>(d.args.out);
  const EightDecoder<kBits> decoder(w, d.scales);
  const std::int64_t thread = block_index() * kThreads + thread_index(), threads = grid_blocks() * kThreads;
  for (std::int64_t e = thread * kEight; e < d.in_eights; e += threads * kEight) {
    float values[kEight];
    decoder.decode(e, values);
    store_eight_aligned_from_f32(out + e, values);
  }
  for (std::int64_t e = d.in_eights + thread; e < w.elements(); e += threads) {
    out[e] = from_f32<T>(value_of_element(w, e, scale_of_block(w, e / w.blocksize)));
  }
}

}  // namespace

void dequantize(const DequantizeArgs& args, const Stream& stream) {
  const QuantizedWeightView& w = args.weight;
  const bool in_vectors = eights_are_vectors(w) && is_aligned(args.out, kVectorBytes);
  const Dequantize d{
      .args = args, .in_eights = in_vectors ? w.elements() / kEight * kEight : 0, .scales = scales_of(w)};
  LaunchShape shape = looping_grid(ceil_div(w.elements(), kEight), kThreads, stream);
  shape.smem_bytes = w.bits == 4 ? EightDecoder<4>::kSmemBytes : 0;
  with_type(args.dtype, [&]<class T>() {
    if (w.bits == 4) {
      launch<dequantize_kernel<T, 4>>(shape, stream, d);
    } else {
      launch<dequantize_kernel<T, 8>>(shape, stream, d);
    }
  });
}

}  // namespace qlora_native::QLN_CUDA
