// adamw_8bit_step: many tensors a launch, their descriptions in the kernel's parameters (so that a CUDA graph keeps
// them). First every gradient is looked at, because one that is unusable anywhere stops the step everywhere; then one
// thread a tensor counts the step and computes its coefficients; then a warp takes a block of 256 elements at a time:
// of all tensors in one launch, or, where state is paged, of what has come (paged.h).
#include <algorithm>
#include <vector>

#include "common/adamw.h"
#include "common/codebook.h"
#include "common/layout.h"
#include "device/elements.cuh"
#include "kernels/kernels.h"
#include "paged_update.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = kAdamW8bitBlocksize;
static_assert(kBlock == kWarp * kEight);

struct Item {
  AdamW8bitTensor tensor;
  AdamW8bitGroup group;
  std::int64_t index;  // into the coefficients: pieces of one tensor share theirs
};
// As many as the 32,764 bytes of parameters hold that a kernel may have.
constexpr int kMostItems = 240;
struct Items {
  const float* inv_scale;
  const float* found_inf;
  AdamWCoefficients* coefficients;  // of all tensors of the step
  std::uint32_t* unusable;          // [1]: some gradient is
  int count;
  std::int64_t begin[kMostItems + 1];  // the block at which an item begins, of all
  Item items[kMostItems];
};
static_assert(sizeof(Items) <= 32764);

__device__ __forceinline__ float inv_scale_of(const Items& items) {
  return items.inv_scale != nullptr ? *items.inv_scale : 1.0f;
}
__device__ __forceinline__ bool is_skipped(const Items& items) {
  return *items.unusable != 0 || (items.found_inf != nullptr && *items.found_inf != 0.0f);
}

// A warp's block of 256: f(item, first element of this lane's eight, how many there are) for each that is this warp's.
template <class F>
__device__ __forceinline__ void each_block(const Items& items, const F& f) {
  constexpr int kWarps = kThreads / kWarp;
  for (std::int64_t block = block_index() * kWarps + thread_index() / kWarp; block < items.begin[items.count];
       block += grid_blocks() * kWarps) {
    int item = 0;  // the last one that begins at `block` or before
    for (int step = 128; step > 0; step /= 2) {
      if (item + step < items.count && items.begin[item + step] <= block) item += step;
    }
    const std::int64_t first = (block - items.begin[item]) * kBlock + thread_index() % kWarp * kEight;
    const std::int64_t left = items.items[item].tensor.elements - first;
    f(item, first, left < 0 ? 0 : left < kEight ? static_cast<int>(left) : kEight);
  }
}
static_assert(kMostItems < 256);  // the search above

__global__ void __launch_bounds__(kThreads) look_kernel(const __grid_constant__ Items items) {
  const float inv_scale = inv_scale_of(items);
  each_block(items, [&](int item, std::int64_t first, int count) {
    const AdamW8bitTensor& tensor = items.items[item].tensor;
    float g[kEight];
    load_eight_as_f32(tensor.grad, tensor.grad_dtype, first, count, g);
    bool usable = true;
#pragma unroll
    for (int i = 0; i < kEight; ++i) usable = usable && fabsf(g[i] * inv_scale) <= kLargestGradient;  // false for NaN
    if (!usable) *items.unusable = 1;  // whoever writes it, it is the same
  });
}

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Items items, std::int64_t* skipped) {
  const int i = thread_index();
  if (is_skipped(items)) {
    if (i == 0 && skipped != nullptr) ++*skipped;
  } else if (i < items.count) {
    const Item& item = items.items[i];
    items.coefficients[item.index] = adamw_coefficients(item.group, ++*item.tensor.step, inv_scale_of(items));
  }
}

__constant__ const std::array<float, 256> kLevels1 = kDynamicMap;
__constant__ const std::array<float, 256> kLevels2 = kUnsignedDynamicMap;
__constant__ const std::array<float, 256> kMidpoints1 = kDynamicMidpoints;
__constant__ const std::array<float, 256> kMidpoints2 = kUnsignedDynamicMidpoints;

// In shared memory: lanes look up different levels, which constant memory would serve one after the other.
struct Tables {
  float levels1[256], levels2[256], midpoints1[256], midpoints2[256];
};

// The code of the nearest level, exactly: DynamicMapLines says how.
template <bool kSigned>
__device__ __forceinline__ std::uint8_t encode(const float* midpoints, float t) {
  constexpr DynamicMapLines kLines = dynamic_map_lines(kSigned);
  const float size = fabsf(t);
  float position = fma(size, kLines.slope[0], kLines.intercept[0]);
#pragma unroll
  for (int i = 1; i < kDecades; ++i) position = fminf(position, fma(size, kLines.slope[i], kLines.intercept[i]));
  if constexpr (kSigned) position = 127.0f + copysignf(position, t);
  const int code = static_cast<int>(position);
  return static_cast<std::uint8_t>(code + (t > midpoints[code] ? 1 : 0));
}

// What a lane holds of a block: eight elements of each array.
struct Eight {
  float param[kEight], grad[kEight], m[kEight], v[kEight];
};

__device__ __forceinline__ void update_8bit(const AdamW8bitTensor& tensor, const AdamWCoefficients& c,
                                            const Tables& tables, std::int64_t first, int count, Eight& e) {
  std::uint8_t code1[kEight], code2[kEight];
  auto* const state1 = static_cast<std::uint8_t*>(tensor.state1) + first;
  auto* const state2 = static_cast<std::uint8_t*>(tensor.state2) + first;
  load_eight(state1, count, std::uint8_t{0}, code1);
  load_eight(state2, count, std::uint8_t{0}, code2);
  const std::int64_t block = first / kBlock;
  const float decayed1 = tensor.absmax1[block] * c.beta1, decayed2 = tensor.absmax2[block] * c.beta2;
  float absmax1 = 0.0f, absmax2 = 0.0f;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    e.m[i] = tables.levels1[code1[i]] * decayed1;
    e.v[i] = tables.levels2[code2[i]] * decayed2;
    e.param[i] = adamw_update(c, e.param[i], e.grad[i], e.m[i], e.v[i]);
    if (i < count) {
      absmax1 = fmaxf(absmax1, fabsf(e.m[i]));
      absmax2 = fmaxf(absmax2, e.v[i]);
    }
  }
  absmax1 = max_of_lanes(absmax1, kWarp);  // and every lane has read the old ones
  absmax2 = max_of_lanes(absmax2, kWarp);
  if (thread_index() % kWarp == 0) {
    tensor.absmax1[block] = absmax1;
    tensor.absmax2[block] = absmax2;
  }
  const float inverse1 = inverse_absmax(absmax1), inverse2 = inverse_absmax(absmax2);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (i >= count) break;
    code1[i] = encode<true>(tables.midpoints1, e.m[i] * inverse1);
    code2[i] = encode<false>(tables.midpoints2, e.v[i] * inverse2);
  }
  store_elements(state1, count, code1);
  store_elements(state2, count, code2);
}

__device__ __forceinline__ void update_32bit(const AdamW8bitTensor& tensor, const AdamWCoefficients& c,
                                             std::int64_t first, int count, Eight& e) {
  float* const m = static_cast<float*>(tensor.state1) + first;
  float* const v = static_cast<float*>(tensor.state2) + first;
  load_eight(m, count, 0.0f, e.m);
  load_eight(v, count, 0.0f, e.v);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    e.m[i] *= c.beta1;
    e.v[i] *= c.beta2;
    e.param[i] = adamw_update(c, e.param[i], e.grad[i], e.m[i], e.v[i]);
  }
  store_elements(m, count, e.m);
  store_elements(v, count, e.v);
}

__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Items items) {
  if (is_skipped(items)) return;
  static_assert(kThreads == 256);
  Tables& tables = *dynamic_smem<Tables>();
  tables.levels1[thread_index()] = kLevels1[thread_index()];
  tables.levels2[thread_index()] = kLevels2[thread_index()];
  tables.midpoints1[thread_index()] = kMidpoints1[thread_index()];
  tables.midpoints2[thread_index()] = kMidpoints2[thread_index()];
  sync_threads();
  each_block(items, [&](int item, std::int64_t first, int count) {
    const AdamW8bitTensor& tensor = items.items[item].tensor;
    const AdamWCoefficients c = items.coefficients[items.items[item].index];
    Eight e;
    load_eight_as_f32(tensor.param, tensor.param_dtype, first, count, e.param);
    load_eight_as_f32(tensor.grad, tensor.grad_dtype, first, count, e.grad);
    if (tensor.absmax1 != nullptr) {
      update_8bit(tensor, c, tables, first, count, e);
    } else {
      update_32bit(tensor, c, first, count, e);
    }
    store_eight_from_f32(tensor.param, tensor.param_dtype, first, count, e.param);
  });
}

}  // namespace

void adamw_8bit_step(const AdamW8bitArgs& args, const Stream& stream) {
  const std::size_t coefficient_bytes = static_cast<std::size_t>(args.count) * sizeof(AdamWCoefficients);
  const Workspace workspace(coefficient_bytes + sizeof(std::uint32_t), stream);
  auto* const coefficients = reinterpret_cast<AdamWCoefficients*>(workspace.data());
  auto* const unusable = reinterpret_cast<std::uint32_t*>(workspace.data() + coefficient_bytes);
  fill_bytes(unusable, 0, sizeof(*unusable), stream);

  // Built again for each round: a list is 32 KB, and of lists there are few.
  using Parts = std::vector<UpdatePart>;
  const auto each_list = [&](const Parts& parts, const auto& f) {
    for (std::size_t first = 0; first == 0 || first < parts.size(); first += kMostItems) {
      const std::size_t count = std::min<std::size_t>(parts.size() - first, kMostItems);
      Items items{args.inv_scale, args.found_inf, coefficients, unusable, static_cast<int>(count), {}, {}};
      for (std::size_t i = 0; i < count; ++i) {
        const AdamW8bitTensor& tensor = parts[first + i].tensor;
        items.items[i] = {tensor, args.groups[tensor.group], parts[first + i].index};
        items.begin[i + 1] = items.begin[i] + ceil_div(tensor.elements, kBlock);
      }
      f(items, looping_grid(items.begin[count] * kWarp, kThreads, stream), first == 0);
    }
  };
  PagedUpdate update(args, stream);
  Parts tensors;
  for (std::int64_t i = 0; i < args.count; ++i) tensors.push_back({args.tensors[i], i});
  each_list(tensors,
            [&](const Items& items, const LaunchShape& shape, bool) { launch<look_kernel>(shape, stream, items); });
  each_list(tensors, [&](const Items& items, const LaunchShape&, bool is_first) {
    launch<count_kernel>({1, kThreads}, stream, items, is_first ? args.skipped : nullptr);
  });
  update.run([&](const Parts& parts) {
    each_list(parts, [&](const Items& items, LaunchShape shape, bool) {
      shape.smem_bytes = sizeof(Tables);
      launch<update_kernel>(shape, stream, items);
    });
  });
}

}  // namespace qlora_native::QLN_CUDA
