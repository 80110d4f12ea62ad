// cross_entropy: a block of threads takes a row, and reads it twice, once for lse(z) and once for the gradient.
#include <limits>

#include "device/elements.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Online softmax of a row's z: the largest element, the sum of e^(z - largest), and the sum of z.
struct Softmax {
  float largest = -kInfinity, exponentials = 0.0f, sum = 0.0f;

  __device__ void add(float z) {
    sum += z;
    if (z == -kInfinity) return;
    if (z > largest) {
      exponentials = exponentials * expf(largest - z) + 1.0f;
      largest = z;
    } else {
      exponentials += expf(z - largest);
    }
  }
  __device__ void add(const Softmax& other) {
    sum += other.sum;
    const float larger = fmaxf(largest, other.largest);
    if (larger == -kInfinity) return;
    exponentials = exponentials * expf(largest - larger) + other.exponentials * expf(other.largest - larger);
    largest = larger;
  }
  // A row has no softmax if all of it is -inf, or if it has a NaN or inf.
  __device__ bool is_finite() const { return fabsf(largest) < kInfinity && sum == sum; }
};

struct Shared {
  Softmax warps[kWarps];
  float logit;  // of the label
};

__device__ float capped(const CrossEntropyArgs& args, float logit) {
  const float scaled = logit * args.scale;
  return args.softcap == 0.0f ? scaled : args.softcap * tanhf(scaled / args.softcap);
}

// Returns the row's softmax to every thread.
template <class T>
__device__ Softmax softmax_of(const CrossEntropyArgs& args, const T* logits, Shared& shared) {
  Softmax softmax;
  for (std::int64_t i = thread_index(); i < args.logits.cols; i += kThreads) {
    softmax.add(capped(args, to_f32(logits[i])));
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    Softmax other;
    other.largest = shfl_xor(softmax.largest, mask);
    other.exponentials = shfl_xor(softmax.exponentials, mask);
    other.sum = shfl_xor(softmax.sum, mask);
    softmax.add(other);
  }
  if (thread_index() % kWarp == 0) shared.warps[thread_index() / kWarp] = softmax;
  sync_threads();
  Softmax row_softmax;
  for (int warp = 0; warp < kWarps; ++warp) row_softmax.add(shared.warps[warp]);
  return row_softmax;
}

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const CrossEntropyArgs args) {
  Shared& shared = *dynamic_smem<Shared>();
  const std::int64_t V = args.logits.cols;
  for (std::int64_t row = block_index(); row < args.logits.rows; row += grid_blocks()) {
    T* const logits = static_cast<T*>(args.logits.data) + row * args.logits.stride;
    const std::int64_t label = args.labels[row];
    const bool ignored = label == args.ignore_index, in_range = label >= 0 && label < V;
    sync_threads();  // the row before has been read from `shared`
    if (thread_index() == 0) shared.logit = !ignored && in_range ? to_f32(logits[label]) : kNaN;
    const Softmax softmax = softmax_of(args, static_cast<const T*>(logits), shared);
    const float lse = softmax.is_finite() ? softmax.largest + logf(softmax.exponentials) : kNaN;
    const float z = capped(args, shared.logit);
    if (thread_index() == 0) {
      float loss = lse - (1.0f - args.label_smoothing) * z + args.z_loss * lse * lse;
      if (args.label_smoothing > 0.0f) loss -= args.label_smoothing / static_cast<float>(V) * softmax.sum;
      args.loss[row] = ignored ? 0.0f : loss;
      if (args.log_probability != nullptr) args.log_probability[row] = ignored ? 0.0f : z - lse;
    }
    if (!args.gradient) continue;
    const float factor = in_range ? 1.0f + 2.0f * args.z_loss * lse : kNaN;
    const float scale = args.row_gradients != nullptr ? args.scale * args.row_gradients[row] : args.scale;
    const float uniform = args.label_smoothing / static_cast<float>(V);
    for (std::int64_t i = thread_index(); i < V; i += kThreads) {
      const float value = capped(args, to_f32(logits[i]));
      float gradient = expf(value - lse) * factor - uniform;
      if (i == label) gradient -= 1.0f - args.label_smoothing;
      gradient *= scale;
      if (args.softcap != 0.0f) gradient *= 1.0f - (value / args.softcap) * (value / args.softcap);
      logits[i] = from_f32<T>(ignored ? 0.0f : gradient);
    }
  }
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args, const Stream& stream) {
  if (args.logits.rows == 0) return;
  LaunchShape shape = looping_grid(args.logits.rows * kThreads, kThreads, stream);
  shape.smem_bytes = sizeof(Shared);
  with_type(args.logits.dtype, [&]<class T>() { launch<cross_entropy_kernel<T>>(shape, stream, args); });
}

}  // namespace qlora_native::QLN_CUDA
