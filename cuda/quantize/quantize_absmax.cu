// quantize_absmax: the first kernel makes partial sums for the mean, the second computes the codes. The partial sums
// are doubles, and their number does not depend on the device, so that every device has the same mean. A warp encodes a
// nested block.
#include "common/codebook.h"
#include "common/layout.h"
#include "device/elements.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxParts = 256;  // the number of partial sums: enough blocks to read at full speed
constexpr std::int64_t kPartElements = 4096;

__device__ double sum_of_lanes(double value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

// Returns the sum of the values of all threads of the block, in thread 0 only. `shared` holds kWarps numbers.
__device__ double sum_of_block(double value, double* shared) {
  value = sum_of_lanes(value);
  if (thread_index() % kWarp == 0) shared[thread_index() / kWarp] = value;
  sync_threads();
  double sum = 0.0;
  if (thread_index() == 0) {
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) partial_sums_kernel(const QuantizeAbsmaxArgs args, double* sums) {
  double sum = 0.0;
  for (std::int64_t i = block_index() * kThreads + thread_index(); i < args.blocks; i += grid_blocks() * kThreads) {
    sum += args.absmax[i];
  }
  sum = sum_of_block(sum, dynamic_smem<double>());
  if (thread_index() == 0) sums[block_index()] = sum;
}

struct Shared {
  double sums[kWarps];
  float offset;
  float code[256];
};

// The nearest of 256 ascending levels; the lower one if two are equally near.
__device__ int nearest_level(const float* code, float t) {
  int above = 0;  // the first level >= t, else the last
  for (int step = 128; step > 0; step /= 2) above += code[above + step - 1] < t ? step : 0;
  const int below = above == 0 ? 0 : above - 1;
  return double{t} - code[below] <= double{code[above]} - t ? below : above;
}

__global__ void __launch_bounds__(kThreads)
    quantize_absmax_kernel(const QuantizeAbsmaxArgs args, const double* sums, int parts) {
  Shared& shared = *dynamic_smem<Shared>();
  shared.code[thread_index()] = args.nested_code[thread_index()];
  const double sum = sum_of_block(thread_index() < parts ? sums[thread_index()] : 0.0, shared.sums);
  if (thread_index() == 0) {
    shared.offset = args.blocks > 0 ? static_cast<float>(sum / static_cast<double>(args.blocks)) : 0.0f;
    if (block_index() == 0) *args.offset = shared.offset;
  }
  sync_threads();
  const float offset = shared.offset;
  const int lane = thread_index() % kWarp;
  const std::int64_t nested_blocks = ceil_div(args.blocks, args.nested_blocksize);
  for (std::int64_t nested = block_index() * kWarps + thread_index() / kWarp; nested < nested_blocks;
       nested += grid_blocks() * kWarps) {
    const std::int64_t begin = nested * args.nested_blocksize;
    const std::int64_t end = begin + args.nested_blocksize < args.blocks ? begin + args.nested_blocksize : args.blocks;
    float absmax = 0.0f;
    for (std::int64_t i = begin + lane; i < end; i += kWarp) absmax = fmaxf(absmax, fabsf(args.absmax[i] - offset));
    absmax = max_of_lanes(absmax, kWarp);
    if (lane == 0) args.nested_absmax[nested] = absmax;
    const float inverse = inverse_absmax(absmax);
    for (std::int64_t i = begin + lane; i < end; i += kWarp) {
      const float t = (args.absmax[i] - offset) * inverse;
      args.codes[i] = static_cast<std::uint8_t>(nearest_level(shared.code, t));
    }
  }
}

}  // namespace

void quantize_absmax(const QuantizeAbsmaxArgs& args, const Stream& stream) {
  static_assert(kThreads >= kMaxParts && kThreads == 256);  // a thread for each part, and for each level
  const std::int64_t wanted = ceil_div(args.blocks, kPartElements);
  const int parts = static_cast<int>(wanted < kMaxParts ? wanted : kMaxParts);
  const Workspace sums(static_cast<std::size_t>(parts) * sizeof(double), stream);
  auto* const data = reinterpret_cast<double*>(sums.data());
  launch<partial_sums_kernel>({parts, kThreads, kWarps * sizeof(double)}, stream, args, data);
  const std::int64_t nested_blocks = ceil_div(args.blocks, args.nested_blocksize);
  LaunchShape shape = looping_grid(nested_blocks * kWarp, kThreads, stream);
  if (shape.blocks == 0) shape.blocks = 1;  // the offset is written even if the weight has no block
  shape.smem_bytes = sizeof(Shared);
  launch<quantize_absmax_kernel>(shape, stream, args, static_cast<const double*>(data), parts);
}

}  // namespace qlora_native::QLN_CUDA
