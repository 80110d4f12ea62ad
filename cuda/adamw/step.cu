// adamw_8bit_step: two launches for hundreds of tensors. In look_kernel every gradient is looked at, because one that
// is unusable anywhere stops the step everywhere, and a thread a tensor computes the coefficients of its step;
// update_kernel then does the step, and counts it. (One launch would have to wait for all its own blocks in between,
// and so could have no more of them than fit the device at once, of a kernel that needs four times the registers of a
// look.)
//
// The tensors' descriptions are the kernels' parameters, which a CUDA graph keeps: lists of 512, in which one may have
// two places. What changes from step to step, the learning rate, the gradients' scale and the count of steps, is read
// from the device's memory.
//
// A warp takes a block of 256 elements at a time. Whole blocks of arrays that vector loads can reach are one class, for
// which a kernel is made for each dtype; what is left of a tensor, at its end, unaligned, of mixed dtypes or with
// fp32 moments, is the other, and comes after them in the same launch.
#include <algorithm>
#include <map>
#include <vector>

#include "adamw/block.cuh"
#include "operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

// ---- the look ----

constexpr int kLookThreads = 256;

template <class T>
__global__ void __launch_bounds__(kLookThreads) look_kernel(const __grid_constant__ Looks looks) {
  const WholeStep& shared = looks.shared;
  const auto& list = looks.list;
  const float inv_scale = shared.inv_scale != nullptr ? *shared.inv_scale : 1.0f;
  bool usable = true;
  const auto look = [&](float grad) { usable &= fabsf(grad * inv_scale) <= kLargestGradient; };  // NaN: false
  for (std::int64_t i = block_index() * kLookThreads + thread_index(); i < list.count;
       i += grid_blocks() * kLookThreads) {
    const LookItem& item = list.items[i];
    if (item.counter == nullptr) continue;
    const AdamW8bitGroup& group = looks.groups[item.group];
    const std::int64_t count = *item.counter + 1;
    shared.steps[item.tensor] = {adamw_coefficients(group, count, inv_scale), item.counter, count};
    usable &= is_finite_size(lr_of(group));
  }
  each_block<kLookThreads>(list, 0, list.whole_blocks, [&](const LookItem& item, std::uint32_t block, bool, bool) {
    float g[kEight];
    const T* const grad = static_cast<const T*>(item.grad) + std::int64_t{block} * kBlock + lane_index() * kEight;
    load_eight_aligned_as_f32(grad, g);
#pragma unroll
    for (int i = 0; i < kEight; ++i) look(g[i]);
  });
  each_block<kLookThreads>(
      list, list.whole_blocks, list.blocks, [&](const LookItem& item, std::uint32_t block, bool is_last, bool) {
        const int count = is_last ? item.last : kBlock;
#pragma unroll 1
        for (int i = lane_index(); i < count; i += kWarp) {
          look(load_as_f32(item.grad, static_cast<DType>(item.dtype), std::int64_t{block} * kBlock + i));
        }
      });
  if (!usable) *shared.unusable = 1;  // whoever writes it, it is the same
}

// ---- the update ----

constexpr int kUpdateThreads = 384, kUpdateBlocks = 2;  // of a multiprocessor

template <class T>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateBlocks)
    update_kernel(const __grid_constant__ Updates updates) {
  const WholeStep& shared = updates.shared;
  const auto& list = updates.list;
  const std::int64_t thread = block_index() * kUpdateThreads + thread_index();
  if (*shared.unusable != 0 || (shared.found_inf != nullptr && *shared.found_inf != 0.0f)) {
    if (thread == 0 && updates.skipped != nullptr) ++*updates.skipped;
    return;
  }
  for (std::int64_t i = thread; i < updates.to_count; i += grid_blocks() * kUpdateThreads) {
    *shared.steps[i].counter = shared.steps[i].count;
  }
  MomentTables& tables = *dynamic_smem<MomentTables>();
  constexpr int kWords = kVectorBytes / sizeof(std::uint32_t);
  for (int i = thread_index(); i < static_cast<int>(sizeof(MomentTables) / kVectorBytes); i += kUpdateThreads) {
    const auto* const from = reinterpret_cast<const std::uint32_t*>(&kTables) + i * kWords;
    store_vector<std::uint32_t, kWords>(reinterpret_cast<std::uint32_t*>(&tables) + i * kWords,
                                        load_vector<std::uint32_t, kWords>(from));
  }
  sync_threads();
  AdamWCoefficients c;
  const auto get_coefficients = [&](const UpdateItem& item, bool is_new) {
    if (is_new) c = shared.steps[item.tensor].coefficients;
  };
  each_block<kUpdateThreads>(list, 0, list.whole_blocks,
                             [&](const UpdateItem& item, std::uint32_t block, bool is_last, bool is_new) {
                               get_coefficients(item, is_new);
                               update_8bit(Neighbours<T>(item, block, is_last), c, tables, block);
                             });
  each_block<kUpdateThreads>(list, list.whole_blocks, list.blocks,
                             [&](const UpdateItem& item, std::uint32_t block, bool is_last, bool is_new) {
                               get_coefficients(item, is_new);
                               const Apart place(item, block, is_last);
                               if (item.absmax1 != nullptr) {
                                 update_8bit(place, c, tables, block);
                               } else {
                                 update_32bit(place, c);
                               }
                             });
}

// Counts, if no launch before has.
template <class T>
void launch_update(Updates& updates, const Stream& stream) {
  constexpr std::int64_t kWarps = kUpdateThreads / kWarp;
  // No more than the device holds at once, so that a block fills its tables once; one, also where there is nothing.
  const std::int64_t most = kUpdateBlocks * multiprocessors(stream);
  const std::int64_t blocks = std::clamp<std::int64_t>(ceil_div(updates.list.blocks, kWarps), 1, most);
  launch<update_kernel<T>>({.blocks = blocks, .threads = kUpdateThreads, .smem_bytes = sizeof(MomentTables)}, stream,
                           updates);
  updates.to_count = 0;
  updates.skipped = nullptr;
}

// ---- the launches ----

// f.template operator()<T>(dtype) for each T.
template <class F>
void each_dtype(const F& f) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    with_type(dtype, [&]<class T>() { f.template operator()<T>(dtype); });
  }
}

template <class T>
void look_at(const Pieces& pieces, const AdamW8bitGroup* groups, const WholeStep& shared, const Stream& stream) {
  for (std::size_t next = 0; next < pieces.size();) {
    Looks looks{.shared = shared, .groups = {}, .list = {}};
    std::map<int, std::uint8_t> places;  // of groups
    for (; next < pieces.size() && looks.list.count < kMostLooks; ++next) {
      const auto& [tensor, index] = pieces[next].part;
      const auto [place, is_new] = places.try_emplace(tensor.group, static_cast<std::uint8_t>(places.size()));
      if (place->second == kMostGroups) break;
      if (is_new) looks.groups[place->second] = groups[tensor.group];
      looks.list.add({.grad = tensor.grad,
                      .counter = tensor.step,
                      .tensor = static_cast<std::uint32_t>(index),
                      .last = last_of(tensor),
                      .dtype = static_cast<std::uint8_t>(tensor.grad_dtype),
                      .group = place->second},
                     ceil_div(tensor.elements, kBlock), pieces[next].is_whole);
    }
    looks.list.end();
    const std::int64_t warps = std::max<std::int64_t>(looks.list.blocks, ceil_div(looks.list.count, kWarp));
    launch<look_kernel<T>>(looping_grid(warps * kWarp, kLookThreads, stream), stream, looks);
  }
}

// Fills `updates`, its lists one after the other, and launches them.
template <class T>
void update(const Pieces& pieces, Updates& updates, const Stream& stream) {
  for (std::size_t next = 0; next < pieces.size();) {
    updates.list.count = updates.list.whole_blocks = updates.list.blocks = 0;
    for (; next < pieces.size() && updates.list.count < kMostUpdates; ++next) {
      const auto& [tensor, index] = pieces[next].part;
      updates.list.add({.param = tensor.param,
                        .grad = tensor.grad,
                        .state1 = tensor.state1,
                        .state2 = tensor.state2,
                        .absmax1 = tensor.absmax1,
                        .absmax2 = tensor.absmax2,
                        .tensor = static_cast<std::uint32_t>(index),
                        .last = last_of(tensor),
                        .param_dtype = static_cast<std::uint8_t>(tensor.param_dtype),
                        .grad_dtype = static_cast<std::uint8_t>(tensor.grad_dtype)},
                       ceil_div(tensor.elements, kBlock), pieces[next].is_whole);
    }
    updates.list.end();
    launch_update<T>(updates, stream);
  }
}

bool is_vector_aligned(const void* p) { return is_aligned(p, kVectorBytes); }

}  // namespace

void adamw_8bit_step(const AdamW8bitArgs& args, const Stream& stream) {
  const std::size_t step_bytes = static_cast<std::size_t>(args.count) * sizeof(TensorStep);
  const Workspace workspace(step_bytes + sizeof(std::uint32_t), stream);
  const WholeStep shared{.inv_scale = args.inv_scale,
                         .found_inf = args.found_inf,
                         .unusable = reinterpret_cast<std::uint32_t*>(workspace.data() + step_bytes),
                         .steps = reinterpret_cast<TensorStep*>(workspace.data())};
  fill_bytes(shared.unusable, 0, sizeof(*shared.unusable), stream);

  PagedUpdate paged(args, stream);
  std::vector<UpdatePart> tensors;
  for (std::int64_t i = 0; i < args.count; ++i) tensors.push_back({args.tensors[i], i});
  each_dtype([&]<class T>(DType dtype) {
    look_at<T>(pieces_of(tensors, &AdamW8bitTensor::grad_dtype, dtype,
                         [](const AdamW8bitTensor& tensor) { return is_vector_aligned(tensor.grad); }),
               args.groups, shared, stream);
  });

  Updates updates{
      .shared = shared, .skipped = args.skipped, .to_count = static_cast<std::uint32_t>(args.count), .list = {}};
  paged.run([&](const std::vector<UpdatePart>& parts) {
    each_dtype([&]<class T>(DType dtype) {
      const auto in_vectors = [](const AdamW8bitTensor& t) {
        return t.absmax1 != nullptr && t.param_dtype == t.grad_dtype && is_vector_aligned(t.param) &&
               is_vector_aligned(t.grad) && is_vector_aligned(t.state1) && is_vector_aligned(t.state2);
      };
      update<T>(pieces_of(parts, &AdamW8bitTensor::param_dtype, dtype, in_vectors), updates, stream);
    });
  });
  if (args.count == 0) launch_update<float>(updates, stream);  // a step of nothing may be skipped
}

}  // namespace qlora_native::QLN_CUDA
