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

// Collects of a row's z the largest element, the sum of e^(z - largest), and the sum of z.
struct Total {
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
  __device__ void add(const Total& other) {
    sum += other.sum;
    const float most = fmaxf(largest, other.largest);
    if (most == -kInfinity) return;
    exponentials = exponentials * expf(largest - most) + other.exponentials * expf(other.largest - most);
    largest = most;
  }
  // A row has no softmax if all of it is -inf, or if it has a NaN or inf.
  __device__ bool is_finite() const { return fabsf(largest) < kInfinity && sum == sum; }
};

struct Shared {
  Total warp_totals[kWarps];
  float logit;  // of the label
};

__device__ float capped(const CrossEntropyArgs& args, float logit) {
  const float scaled = logit * args.scale;
  return args.softcap == 0.0f ? scaled : args.softcap * tanhf(scaled / args.softcap);
}

// Returns the row's total to every thread.
template <class T>
__device__ Total total_of(const CrossEntropyArgs& args, const T* logits, Shared& shared) {
  Total total;
  for (std::int64_t i = thread_index(); i < args.logits.cols; i += kThreads) total.add(capped(args, to_f32(logits[i])));
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    Total other;
    other.largest = shfl_xor(total.largest, mask);
    other.exponentials = shfl_xor(total.exponentials, mask);
    other.sum = shfl_xor(total.sum, mask);
    total.add(other);
  }
  if (thread_index() % kWarp == 0) shared.warp_totals[thread_index() / kWarp] = total;
  sync_threads();
  Total row_total;
  for (int warp = 0; warp < kWarps; ++warp) row_total.add(shared.warp_totals[warp]);
  return row_total;
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
    const Total total = total_of(args, static_cast<const T*>(logits), shared);
    const float lse = total.is_finite() ? total.largest + logf(total.exponentials) : kNaN;
    const float z = capped(args, shared.logit);
    if (thread_index() == 0) {
      float loss = lse - (1.0f - args.label_smoothing) * z + args.z_loss * lse * lse;
      if (args.label_smoothing > 0.0f) loss -= args.label_smoothing / static_cast<float>(V) * total.sum;
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
