// rms_norm and its backward: a block of threads takes a row, and reads it twice, once for a sum and once for the
// result.
#include "device/elements.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Shared {
  float warp_sums[kWarps];
};

// Returns to each thread of the block the sum over all of them, added in a fixed order.
__device__ float sum_of_block(float value, Shared& shared) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  sync_threads();  // the row before has been read from `shared`
  if (thread_index() % kWarp == 0) shared.warp_sums[thread_index() / kWarp] = value;
  sync_threads();
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += shared.warp_sums[warp];
  return sum;
}

// Calls body(first, count) for each vector of a row that this thread takes; the last one may have fewer elements.
template <class Body>
__device__ __forceinline__ void for_each_vec8(std::int64_t N, const Body& body) {
  for (std::int64_t first = std::int64_t{thread_index()} * kVecSize; first < N; first += kThreads * kVecSize)
    body(first, static_cast<int>(N - first < kVecSize ? N - first : kVecSize));
}

// to[i] = element first + i of the row, times (shift + weight of its column); 0 from `count` on.
template <class T>
__device__ __forceinline__ void load_weighted(const T* row, const T* weight, float shift, std::int64_t first, int count,
                                              float (&to)[kVecSize]) {
  float factor[kVecSize];
  load_vec8_as_f32(row + first, count, to);
  load_vec8_as_f32(weight + first, count, factor);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) to[i] *= factor[i] + shift;
}

template <class T>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const RmsNormArgs args) {
  Shared& shared = *dynamic_smem<Shared>();
  const std::int64_t N = args.x.cols;
  const T* const weight = static_cast<const T*>(args.weight);
  for (std::int64_t row = block_index(); row < args.x.rows; row += grid_blocks()) {
    const T* const x = static_cast<const T*>(args.x.data) + row * args.x.stride;
    T* const y = static_cast<T*>(args.y.data) + row * args.y.stride;
    float squares = 0.0f;
    for_each_vec8(N, [&](std::int64_t first, int count) {
      float values[kVecSize];
      load_vec8_as_f32(x + first, count, values);
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) squares += values[i] * values[i];
    });
    const float r = 1.0f / sqrtf(sum_of_block(squares, shared) / static_cast<float>(N) + args.eps);
    if (thread_index() == 0) args.r[row] = r;
    for_each_vec8(N, [&](std::int64_t first, int count) {
      float values[kVecSize];
      load_weighted(x, weight, args.shift, first, count, values);
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) values[i] *= r;
      store_vec8_from_f32(y + first, count, values);
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) rms_norm_backward_kernel(const RmsNormBackwardArgs args) {
  Shared& shared = *dynamic_smem<Shared>();
  const std::int64_t N = args.x.cols;
  const T* const weight = static_cast<const T*>(args.weight);
  for (std::int64_t row = block_index(); row < args.x.rows; row += grid_blocks()) {
    const T* const x = static_cast<const T*>(args.x.data) + row * args.x.stride;
    const T* const dy = static_cast<const T*>(args.dy.data) + row * args.dy.stride;
    T* const dx = static_cast<T*>(args.dx.data) + row * args.dx.stride;
    const float r = args.r[row];
    float dot = 0.0f;
    for_each_vec8(N, [&](std::int64_t first, int count) {
      float values[kVecSize], gradients[kVecSize];
      load_vec8_as_f32(x + first, count, values);
      load_weighted(dy, weight, args.shift, first, count, gradients);
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) dot += values[i] * r * gradients[i];
    });
    const float mean = sum_of_block(dot, shared) / static_cast<float>(N);
    for_each_vec8(N, [&](std::int64_t first, int count) {
      float values[kVecSize], gradients[kVecSize];
      load_vec8_as_f32(x + first, count, values);
      load_weighted(dy, weight, args.shift, first, count, gradients);
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) gradients[i] = (gradients[i] - values[i] * r * mean) * r;
      store_vec8_from_f32(dx + first, count, gradients);
    });
  }
}

LaunchShape shape_for(const ConstMatrix& matrix, const Stream& stream) {
  LaunchShape shape = looping_grid(matrix.rows * kThreads, kThreads, stream);
  shape.smem_bytes = sizeof(Shared);
  return shape;
}

}  // namespace

void rms_norm(const RmsNormArgs& args, const Stream& stream) {
  if (args.x.rows == 0) return;
  with_type(args.x.dtype, [&]<class T>() { launch<rms_norm_kernel<T>>(shape_for(args.x, stream), stream, args); });
}

void rms_norm_backward(const RmsNormBackwardArgs& args, const Stream& stream) {
  if (args.x.rows == 0) return;
  with_type(args.x.dtype,
            [&]<class T>() { launch<rms_norm_backward_kernel<T>>(shape_for(args.x, stream), stream, args); });
}

}  // namespace qlora_native::QLN_CUDA
