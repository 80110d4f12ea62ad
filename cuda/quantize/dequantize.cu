// dequantize: a thread decodes eight contiguous elements, which share a scale, by vector loads and stores. Elements
// that are not aligned are decoded one by one; in an array as it is usually allocated these are at most the last seven.
// With a list of rows, as for an embedding, each row of the result is divided into vectors.
#include "device/decode.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;

struct Dequantize {
  DequantizeArgs args;
  std::int64_t vector_elements;  // these first ones, of the weight or of each row, are decoded eight at a time
  WeightScales scales;
};

template <class T, int kBits, bool kPlain>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Dequantize d) {
  const QuantizedWeightView& w = d.args.weight;
  T* const out = static_cast<T*>(d.args.out);
  const Vec8Decoder<kBits, kPlain> decoder(w, d.scales);
  const std::int64_t thread = block_index() * kThreads + thread_index(), threads = grid_blocks() * kThreads;
  for (std::int64_t e = thread * kVecSize; e < d.vector_elements; e += threads * kVecSize) {
    float values[kVecSize];
    decoder.decode(e, values);
    store_vec8_aligned_from_f32(out + e, values);
  }
  for (std::int64_t e = d.vector_elements + thread; e < w.elements(); e += threads) {
    out[e] = from_f32<T>(value_of<kPlain>(w, d.scales, e));
  }
}

// A block decodes one row of the result after the other.
template <class T, int kBits, bool kPlain>
__global__ void __launch_bounds__(kThreads) dequantize_rows_kernel(const __grid_constant__ Dequantize d) {
  const QuantizedWeightView& w = d.args.weight;
  const Vec8Decoder<kBits, kPlain> decoder(w, d.scales);
  for (std::int64_t i = block_index(); i < d.args.row_count; i += grid_blocks()) {
    const std::int64_t row = d.args.rows[i], first = row * w.K;
    const bool is_there = row >= 0 && row < w.count * w.N;
    T* const out = static_cast<T*>(d.args.out) + i * w.K;
    for (std::int64_t k = thread_index() * kVecSize; k < d.vector_elements; k += kThreads * kVecSize) {
      float values[kVecSize];
      if (is_there) {
        decoder.decode(first + k, values);
      } else {
#pragma unroll
        for (float& value : values) value = NAN;
      }
      store_vec8_aligned_from_f32(out + k, values);
    }
    for (std::int64_t k = d.vector_elements + thread_index(); k < w.K; k += kThreads) {
      const std::int64_t e = first + k;
      out[k] = from_f32<T>(is_there ? value_of<kPlain>(w, d.scales, e) : NAN);
    }
  }
}

}  // namespace

void dequantize(const DequantizeArgs& args, const Stream& stream) {
  const QuantizedWeightView& w = args.weight;
  if (args.elements() == 0) return;
  const bool by_rows = args.rows != nullptr, in_vectors = supports_vec8(w) && is_aligned(args.out, kVectorBytes);
  Dequantize d{.args = args, .vector_elements = 0, .scales = scales_of(w)};
  if (in_vectors && by_rows) d.vector_elements = w.K % kVecSize == 0 ? w.K : 0;  // else rows begin within a vector
  if (in_vectors && !by_rows) d.vector_elements = w.elements() / kVecSize * kVecSize;
  LaunchShape shape =
      looping_grid(by_rows ? args.row_count * kThreads : ceil_div(w.elements(), kVecSize), kThreads, stream);
  with_type(args.dtype, [&]<class T>() {
    with_vec8_decoder(w, [&]<int kBits, bool kPlain>() {
      shape.smem_bytes = Vec8Decoder<kBits, kPlain>::kSmemBytes;
      if (by_rows) {
        launch<dequantize_rows_kernel<T, kBits, kPlain>>(shape, stream, d);
      } else {
        launch<dequantize_kernel<T, kBits, kPlain>>(shape, stream, d);
      }
    });
  });
}

}  // namespace qlora_native::QLN_CUDA
