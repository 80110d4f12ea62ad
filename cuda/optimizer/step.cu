// optimizer_8bit_step: two kernels step hundreds of tensors. check_kernel checks every gradient, because a single
// unusable one stops the whole step. In it, a thread for each tensor also computes the coefficients of that tensor's
// step. update_kernel then does the step and counts it. (A single kernel would have to wait between the two for all of
// its own blocks. So it could have only as many blocks as are resident at once, and it would need four times the
// registers of a check.)
//
// The kernels' parameters describe the tensors, so that a CUDA graph keeps them. They are lists of limited length (512
// for AdamW and Lion), in which a tensor may have two entries. The learning rate, the gradients' scale and the count of
// steps change from step to step, so kernels read them from the device's memory.
//
// A warp takes a block of 256 elements at a time. There are two classes of blocks. The first are whole blocks of
// aligned arrays, which vectors load; the kernel is compiled for each of their dtypes. The second are all others: the
// end of a tensor, and tensors that are unaligned, of mixed dtypes, or with fp32 moments. They follow in the same
// launch.
#include <algorithm>
#include <map>
#include <vector>

#include "optimizer/block.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

// ---- the check of the gradients ----

constexpr int kCheckThreads = 256;

template <class T, class Rule>
__global__ void __launch_bounds__(kCheckThreads) check_kernel(const __grid_constant__ CheckArgs args) {
  const StepArgs& shared = args.shared;
  const auto& list = args.list;
  const float inv_scale = shared.inv_scale != nullptr ? *shared.inv_scale : 1.0f;
  bool usable = true;
  const auto check = [&](float grad) { usable &= fabsf(grad * inv_scale) <= kLargestGradient; };  // NaN: false
  for (std::int64_t i = block_index() * kCheckThreads + thread_index(); i < list.count;
       i += grid_blocks() * kCheckThreads) {
    const CheckItem& item = list.items[i];
    if (item.counter == nullptr) continue;
    const Optimizer8bitGroup& group = args.groups[item.group];
    const std::int64_t count = *item.counter + 1;
    shared.steps[item.tensor] = {Rule::coefficients(group, count, inv_scale), item.counter, count};
    usable &= is_finite_size(lr_of(group));
  }
  each_block<kCheckThreads>(list, 0, list.whole_blocks, [&](const CheckItem& item, std::uint32_t block, bool, bool) {
    float g[kVecSize];
    const T* const grad = static_cast<const T*>(item.grad) + std::int64_t{block} * kBlock + lane_index() * kVecSize;
    load_vec8_aligned_as_f32(grad, g);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) check(g[i]);
  });
  each_block<kCheckThreads>(
      list, list.whole_blocks, list.blocks, [&](const CheckItem& item, std::uint32_t block, bool is_last, bool) {
        const int count = is_last ? item.last : kBlock;
#pragma unroll 1
        for (int i = lane_index(); i < count; i += kWarp) {
          check(load_as_f32(item.grad, static_cast<DType>(item.dtype), std::int64_t{block} * kBlock + i));
        }
      });
  if (!usable) *shared.unusable = 1;  // several threads may write it, but all write the same
}

// ---- the update ----

// Blocks on an SM, and threads of a block: few enough that a lane has registers for its eight elements.
constexpr int kUpdateBlocks = 2;
template <class Rule>
constexpr int kUpdateThreads = Rule::kMoments <= 2 ? 384 : 256;

template <class T, class Rule>
__global__ void __launch_bounds__(kUpdateThreads<Rule>, kUpdateBlocks)
    update_kernel(const __grid_constant__ UpdateArgs<Rule> args) {
  constexpr int kThreads = kUpdateThreads<Rule>;
  const StepArgs& shared = args.shared;
  const auto& list = args.list;
  const std::int64_t thread = block_index() * kThreads + thread_index();
  if (*shared.unusable != 0 || (shared.found_inf != nullptr && *shared.found_inf != 0.0f)) {
    if (thread == 0 && args.skipped != nullptr) ++*args.skipped;
    return;
  }
  for (std::int64_t i = thread; i < args.tensors_to_count; i += grid_blocks() * kThreads) {
    *shared.steps[i].counter = shared.steps[i].count;
  }
  MomentTables& tables = *dynamic_smem<MomentTables>();
  constexpr int kWords = kVectorBytes / sizeof(std::uint32_t);
  for (int i = thread_index(); i < static_cast<int>(kTableBytes<Rule> / kVectorBytes); i += kThreads) {
    const auto* const from = reinterpret_cast<const std::uint32_t*>(&kTables) + i * kWords;
    store_vector<std::uint32_t, kWords>(reinterpret_cast<std::uint32_t*>(&tables) + i * kWords,
                                        load_vector<std::uint32_t, kWords>(from));
  }
  sync_threads();
  StepCoefficients c;
  const auto get_coefficients = [&](const UpdateItem<Rule>& item, bool is_new) {
    if (is_new) c = shared.steps[item.tensor].coefficients;
  };
  each_block<kThreads>(list, 0, list.whole_blocks,
                       [&](const UpdateItem<Rule>& item, std::uint32_t block, bool is_last, bool is_new) {
                         get_coefficients(item, is_new);
                         update_8bit<Rule>(Contiguous<T, Rule>(item, block, is_last), c, tables, block);
                       });
  each_block<kThreads>(list, list.whole_blocks, list.blocks,
                       [&](const UpdateItem<Rule>& item, std::uint32_t block, bool is_last, bool is_new) {
                         get_coefficients(item, is_new);
                         const Strided<Rule> elements(item, block, is_last);
                         if (item.absmax[0] != nullptr) {
                           update_8bit<Rule>(elements, c, tables, block);
                         } else {
                           update_32bit(elements, c);
                         }
                       });
}

// The first launch of a step also counts the step (or the skipped step); the later ones do not.
template <class T, class Rule>
void launch_update(UpdateArgs<Rule>& args, const Stream& stream) {
  constexpr int kThreads = kUpdateThreads<Rule>;
  constexpr std::int64_t kWarps = kThreads / kWarp;
  // No more blocks than are resident at once, so that each fills its tables only once. At least one, even if there is
  // nothing to update, because it counts the step.
  const std::int64_t max_blocks = kUpdateBlocks * num_sms(stream);
  const std::int64_t blocks = std::clamp<std::int64_t>(ceil_div(args.list.blocks, kWarps), 1, max_blocks);
  launch<update_kernel<T, Rule>>({.blocks = blocks, .threads = kThreads, .smem_bytes = kTableBytes<Rule>}, stream,
                                 args);
  args.tensors_to_count = 0;
  args.skipped = nullptr;
}

// ---- the launches ----

// Calls f.template operator()<T>(dtype) for each dtype.
template <class F>
void each_dtype(const F& f) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    with_type(dtype, [&]<class T>() { f.template operator()<T>(dtype); });
  }
}

template <class T, class Rule>
void check_gradients(const Pieces& pieces, const Optimizer8bitGroup* groups, const StepArgs& shared,
                     const Stream& stream) {
  for (std::size_t next = 0; next < pieces.size();) {
    CheckArgs args{.shared = shared, .groups = {}, .list = {}};
    std::map<int, std::uint8_t> slots;  // from a group's index to its index in args.groups
    for (; next < pieces.size() && args.list.count < kMaxChecks; ++next) {
      const auto& [tensor, index] = pieces[next].part;
      const auto [slot, is_new] = slots.try_emplace(tensor.group, static_cast<std::uint8_t>(slots.size()));
      if (slot->second == kMaxGroups) break;
      if (is_new) args.groups[slot->second] = groups[tensor.group];
      args.list.add({.grad = tensor.grad,
                     .counter = tensor.step,
                     .tensor = static_cast<std::uint32_t>(index),
                     .last = last_of(tensor),
                     .dtype = static_cast<std::uint8_t>(tensor.grad_dtype),
                     .group = slot->second},
                    ceil_div(tensor.elements, kBlock), pieces[next].is_whole);
    }
    args.list.end();
    const std::int64_t warps = std::max<std::int64_t>(args.list.blocks, ceil_div(args.list.count, kWarp));
    launch<check_kernel<T, Rule>>(looping_grid(warps * kWarp, kCheckThreads, stream), stream, args);
  }
}

// Fills the list of `args` and launches the kernel, again and again until all pieces are done.
template <class T, class Rule>
void update(const Pieces& pieces, UpdateArgs<Rule>& args, const Stream& stream) {
  for (std::size_t next = 0; next < pieces.size();) {
    args.list.count = args.list.whole_blocks = args.list.blocks = 0;
    for (; next < pieces.size() && args.list.count < kMaxUpdates<Rule>; ++next) {
      const auto& [tensor, index] = pieces[next].part;
      UpdateItem<Rule> item{.param = tensor.param,
                            .grad = tensor.grad,
                            .state = {},
                            .absmax = {},
                            .tensor = static_cast<std::uint32_t>(index),
                            .last = last_of(tensor),
                            .param_dtype = static_cast<std::uint8_t>(tensor.param_dtype),
                            .grad_dtype = static_cast<std::uint8_t>(tensor.grad_dtype)};
      for (int k = 0; k < Rule::kMoments; ++k) {
        item.state[k] = state_of(tensor, k);
        item.absmax[k] = absmax_of(tensor, k);
      }
      args.list.add(item, ceil_div(tensor.elements, kBlock), pieces[next].is_whole);
    }
    args.list.end();
    launch_update<T, Rule>(args, stream);
  }
}

bool is_vector_aligned(const void* p) { return is_aligned(p, kVectorBytes); }

template <class Rule>
void step(const Optimizer8bitArgs& args, const Stream& stream) {
  const std::size_t step_bytes = static_cast<std::size_t>(args.count) * sizeof(TensorStep);
  const Workspace workspace(step_bytes + sizeof(std::uint32_t), stream);
  const StepArgs shared{.inv_scale = args.inv_scale,
                        .found_inf = args.found_inf,
                        .unusable = reinterpret_cast<std::uint32_t*>(workspace.data() + step_bytes),
                        .steps = reinterpret_cast<TensorStep*>(workspace.data())};
  fill_bytes(shared.unusable, 0, sizeof(*shared.unusable), stream);

  PagedUpdate paged(args, stream);
  std::vector<UpdatePart> tensors;
  for (std::int64_t i = 0; i < args.count; ++i) tensors.push_back({args.tensors[i], i});
  each_dtype([&]<class T>(DType dtype) {
    check_gradients<T, Rule>(
        pieces_of(tensors, &Optimizer8bitTensor::grad_dtype, dtype,
                  [](const Optimizer8bitTensor& tensor) { return is_vector_aligned(tensor.grad); }),
        args.groups, shared, stream);
  });

  UpdateArgs<Rule> updates{.shared = shared,
                           .skipped = args.skipped,
                           .tensors_to_count = static_cast<std::uint32_t>(args.count),
                           .list = {}};
  paged.run([&](const std::vector<UpdatePart>& parts) {
    each_dtype([&]<class T>(DType dtype) {
      const auto supports_vectors = [](const Optimizer8bitTensor& t) {
        bool supported = t.absmax1 != nullptr && t.param_dtype == t.grad_dtype && is_vector_aligned(t.param) &&
                         is_vector_aligned(t.grad);
        for (int k = 0; k < Rule::kMoments; ++k) supported &= is_vector_aligned(state_of(t, k));
        return supported;
      };
      update<T, Rule>(pieces_of(parts, &Optimizer8bitTensor::param_dtype, dtype, supports_vectors), updates, stream);
    });
  });
  if (args.count == 0) launch_update<float, Rule>(updates, stream);  // even a step without tensors may be skipped
}

}  // namespace

void optimizer_8bit_step(const Optimizer8bitArgs& args, const Stream& stream) {
  with_rule(args.algorithm, [&]<class Rule>() { step<Rule>(args, stream); });
}

}  // namespace qlora_native::QLN_CUDA
