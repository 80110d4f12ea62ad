// gated_activation and its backward: a thread takes a vector of eight elements of a row at a time.
#include "device/elements.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;

struct ValueAndDerivative {
  float value, derivative;
};

// 1 / (1 + e^-x), computed from e^-|x|, which cannot overflow, and without cancellation.
__device__ __forceinline__ float sigmoid_of(float x) {
  const float e = expf(-fabsf(x));
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

template <Activation kActivation>
__device__ __forceinline__ ValueAndDerivative activation_of(float x) {
  if constexpr (kActivation == Activation::silu) {
    const float s = sigmoid_of(x), value = x * s;
    return {value, s + value * (1.0f - s)};
  } else {
    // (1 + tanh(z)) / 2 = sigmoid(2 z)
    constexpr float kTwoRootsOf2OverPi = 1.59576912f, kCubic = 0.044715f;
    const float square = x * x;
    const float s = sigmoid_of(kTwoRootsOf2OverPi * x * (1.0f + kCubic * square)), value = x * s;
    return {value, s + value * (1.0f - s) * (kTwoRootsOf2OverPi * (1.0f + 3.0f * kCubic * square))};
  }
}

// Calls f.template operator()<T, kActivation>().
template <class F>
void with_type_and_activation(DType dtype, Activation activation, const F& f) {
  with_type(dtype, [&]<class T>() {
    activation == Activation::silu ? f.template operator()<T, Activation::silu>()
                                   : f.template operator()<T, Activation::gelu_tanh>();
  });
}

// Calls body(row, first column, count) for each vector of the matrix that this thread takes; a row's last one may have
// fewer elements.
template <class Body>
__device__ __forceinline__ void for_each_vec8(std::int64_t rows, std::int64_t cols, const Body& body) {
  const std::int64_t row_vectors = ceil_div(cols, kVecSize);
  for (std::int64_t i = block_index() * std::int64_t{kThreads} + thread_index(); i < rows * row_vectors;
       i += grid_blocks() * std::int64_t{kThreads}) {
    const std::int64_t row = i / row_vectors, first = (i - row * row_vectors) * kVecSize, remaining = cols - first;
    body(row, first, static_cast<int>(remaining < kVecSize ? remaining : kVecSize));
  }
}

template <class T>
__device__ __forceinline__ void load_vec8_of(const ConstMatrix& matrix, std::int64_t row, std::int64_t first, int count,
                                             float (&to)[kVecSize]) {
  load_vec8_as_f32(static_cast<const T*>(matrix.data) + row * matrix.stride + first, count, to);
}
template <class T>
__device__ __forceinline__ void store_vec8_of(const Matrix& matrix, std::int64_t row, std::int64_t first, int count,
                                              const float (&from)[kVecSize]) {
  store_vec8_from_f32(static_cast<T*>(matrix.data) + row * matrix.stride + first, count, from);
}

template <class T, Activation kActivation>
__global__ void __launch_bounds__(kThreads) gated_activation_kernel(const GatedActivationArgs args) {
  for_each_vec8(args.gate.rows, args.gate.cols, [&](std::int64_t row, std::int64_t first, int count) {
    float gate[kVecSize], up[kVecSize];
    load_vec8_of<T>(args.gate, row, first, count, gate);
    load_vec8_of<T>(args.up, row, first, count, up);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) up[i] *= activation_of<kActivation>(gate[i]).value;
    store_vec8_of<T>(args.h, row, first, count, up);
  });
}

template <class T, Activation kActivation>
__global__ void __launch_bounds__(kThreads) gated_activation_backward_kernel(const GatedActivationBackwardArgs args) {
  for_each_vec8(args.gate.rows, args.gate.cols, [&](std::int64_t row, std::int64_t first, int count) {
    float gate[kVecSize], up[kVecSize], dh[kVecSize];
    load_vec8_of<T>(args.gate, row, first, count, gate);
    load_vec8_of<T>(args.up, row, first, count, up);
    load_vec8_of<T>(args.dh, row, first, count, dh);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      const ValueAndDerivative f = activation_of<kActivation>(gate[i]);
      gate[i] = dh[i] * up[i] * f.derivative;
      up[i] = dh[i] * f.value;
    }
    store_vec8_of<T>(args.dgate, row, first, count, gate);
    store_vec8_of<T>(args.dup, row, first, count, up);
  });
}

LaunchShape shape_for(const ConstMatrix& matrix, const Stream& stream) {
  return looping_grid(matrix.rows * ceil_div(matrix.cols, kVecSize), kThreads, stream);
}

}  // namespace

void gated_activation(const GatedActivationArgs& args, const Stream& stream) {
  if (args.gate.rows == 0) return;
  with_type_and_activation(args.gate.dtype, args.activation, [&]<class T, Activation kActivation>() {
    launch<gated_activation_kernel<T, kActivation>>(shape_for(args.gate, stream), stream, args);
  });
}

void gated_activation_backward(const GatedActivationBackwardArgs& args, const Stream& stream) {
  if (args.gate.rows == 0) return;
  with_type_and_activation(args.gate.dtype, args.activation, [&]<class T, Activation kActivation>() {
    launch<gated_activation_backward_kernel<T, kActivation>>(shape_for(args.gate, stream), stream, args);
  });
}

}  // namespace qlora_native::QLN_CUDA
