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
#include <bit>
#include <map>
#include <vector>

#include "common/adamw.h"
#include "common/layout.h"
#include "device/code_sums.cuh"
#include "device/elements.cuh"
#include "kernels/kernels.h"
#include "paged_update.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kBlock = kAdamW8bitBlocksize;
static_assert(kBlock == kWarp * kEight);

// What look_kernel makes of a tensor, and update_kernel needs.
struct Step {
  AdamWCoefficients coefficients;
  std::int64_t* counter;
  std::int64_t count;  // becomes *counter, unless the step is skipped
};

// Of one step: what both kernels take.
struct Shared {
  const float* inv_scale;
  const float* found_inf;
  std::uint32_t* unusable;  // [1]: some gradient is, or a learning rate
  Step* steps;              // of all tensors of the step
};

// The items of a launch, blocks of all of them in a row: first the whole ones, of arrays that vectors can reach.
template <class Item, int kMost>
struct List {
  std::uint32_t count, whole_blocks, blocks;
  std::uint32_t begin[kMost + 1];  // the block at which an item begins; beyond the last one, where that ends
  Item items[kMost];

  // There are fewer than 2^32 blocks: no memory holds a thousand billion elements.
  void add(const Item& item, std::int64_t its_blocks, bool is_whole) {
    begin[count] = blocks;
    items[count++] = item;
    blocks += static_cast<std::uint32_t>(its_blocks);
    if (is_whole) whole_blocks = blocks;
  }
  void end() { std::fill(begin + count, begin + kMost + 1, blocks); }
};

struct LookItem {
  const void* grad;
  std::int64_t* counter;  // null: its step is computed with another item
  std::uint32_t tensor;   // index into Shared::steps
  std::uint16_t last;     // elements of its last block
  std::uint8_t dtype, group;
};
constexpr int kMostLooks = 1024, kMostGroups = 32;
struct Looks {
  Shared shared;
  AdamW8bitGroup groups[kMostGroups];
  List<LookItem, kMostLooks> list;
};

struct UpdateItem {
  void* param;
  const void* grad;
  void *state1, *state2;
  float *absmax1, *absmax2;
  std::uint32_t tensor;
  std::uint16_t last;
  std::uint8_t param_dtype, grad_dtype;
};
constexpr int kMostUpdates = 512;
struct Updates {
  Shared shared;
  std::int64_t* skipped;   // null: another launch counts
  std::uint32_t to_count;  // tensors
  List<UpdateItem, kMostUpdates> list;
};
// What a kernel may have.
constexpr std::size_t kParameterBytes = 32764;
static_assert(sizeof(Looks) <= kParameterBytes && sizeof(Updates) <= kParameterBytes);

__device__ __forceinline__ int lane_index() { return thread_index() % kWarp; }

// f(item, block of the item, whether it is its last, whether the item is another than before) for each of the blocks
// [first, end) that is this warp's. The search comes only after an item's last block.
template <int kThreads, class Item, int kMost, class F>
__device__ __forceinline__ void each_block(const List<Item, kMost>& list, std::uint32_t first, std::uint32_t end,
                                           const F& f) {
  constexpr std::uint32_t kWarps = kThreads / kWarp;
  static_assert(std::has_single_bit(static_cast<unsigned>(kMost)));
  const std::uint32_t step = static_cast<std::uint32_t>(grid_blocks()) * kWarps;
  std::uint32_t item = 0, begin = 0, item_end = 0;
  for (std::uint32_t block = first + static_cast<std::uint32_t>(block_index()) * kWarps + thread_index() / kWarp;
       block < end; block += step) {
    const bool is_new = block >= item_end;
    if (is_new) {
      item = 0;  // the last one that begins at `block` or before
#pragma unroll 1
      for (std::uint32_t jump = kMost / 2; jump > 0; jump /= 2) {
        if (list.begin[item + jump] <= block) item += jump;
      }
      begin = list.begin[item];
      item_end = list.begin[item + 1];
    }
    f(list.items[item], block - begin, block + 1 == item_end, is_new);
  }
}

// ---- the look
// --------------------------------------------------------------------------------------------------------

constexpr int kLookThreads = 256;

template <class T>
__global__ void __launch_bounds__(kLookThreads) look_kernel(const __grid_constant__ Looks looks) {
  const Shared& shared = looks.shared;
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

// ---- the update
// ------------------------------------------------------------------------------------------------------

constexpr int kUpdateThreads = 384, kUpdateBlocks = 2;  // of a multiprocessor

// In shared memory: lanes look up different entries, which constant memory would serve one after the other.
struct alignas(kVectorBytes) Tables {
  std::array<float, 256> levels1 = kDynamicMap, levels2 = kUnsignedDynamicMap;
  CodeSums<true> sums1;
  CodeSums<false> sums2;
};
__device__ const Tables kTables{};

// What a lane has of a block of 256, and where: eight neighbours, in vectors.
template <class T>
struct Neighbours {
  const UpdateItem& item;
  std::int64_t first;

  __device__ __forceinline__ Neighbours(const UpdateItem& item, std::uint32_t block, bool)
      : item(item), first(std::int64_t{block} * kBlock + lane_index() * kEight) {}
  __device__ __forceinline__ void load_param(float (&to)[kEight]) const {
    load_eight_aligned_as_f32(static_cast<const T*>(item.param) + first, to);
  }
  __device__ __forceinline__ void load_grad(float (&to)[kEight]) const {
    load_eight_aligned_as_f32(static_cast<const T*>(item.grad) + first, to);
  }
  __device__ __forceinline__ void store_param(const float (&from)[kEight]) const {
    store_eight_aligned_from_f32(static_cast<T*>(item.param) + first, from);
  }
  // Codes are bytes of two words.
  __device__ __forceinline__ Vector<std::uint32_t, 2> load_codes(const void* codes, std::uint8_t) const {
    return load_vector<std::uint32_t, 2>(reinterpret_cast<const std::uint32_t*>(at(codes)));
  }
  __device__ __forceinline__ void store_codes(void* codes, const Vector<std::uint32_t, 2>& words) const {
    store_vector<std::uint32_t, 2>(reinterpret_cast<std::uint32_t*>(const_cast<std::uint8_t*>(at(codes))), words);
  }

 private:
  __device__ __forceinline__ const std::uint8_t* at(const void* codes) const {
    return static_cast<const std::uint8_t*>(codes) + first;
  }
};

// The same of any block: every 32nd element, as far as there are any; the others are 0.
struct Apart {
  const UpdateItem& item;
  std::int64_t first;
  int count;

  __device__ __forceinline__ Apart(const UpdateItem& item, std::uint32_t block, bool is_last)
      : item(item),
        first(std::int64_t{block} * kBlock + lane_index()),
        count((is_last ? item.last : kBlock) - lane_index()) {}
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kEight; ++i) f(i, first + i * kWarp, i * kWarp < count);
  }
  __device__ __forceinline__ void load(const void* from, DType dtype, float (&to)[kEight]) const {
    each([&](int i, std::int64_t at, bool is_there) { to[i] = is_there ? load_as_f32(from, dtype, at) : 0.0f; });
  }
  __device__ __forceinline__ void store(void* to, DType dtype, const float (&from)[kEight]) const {
    each([&](int i, std::int64_t at, bool is_there) {
      if (is_there) store_from_f32(to, dtype, at, from[i]);
    });
  }
  __device__ __forceinline__ void load_param(float (&to)[kEight]) const {
    load(item.param, static_cast<DType>(item.param_dtype), to);
  }
  __device__ __forceinline__ void load_grad(float (&to)[kEight]) const {
    load(item.grad, static_cast<DType>(item.grad_dtype), to);
  }
  __device__ __forceinline__ void store_param(const float (&from)[kEight]) const {
    store(item.param, static_cast<DType>(item.param_dtype), from);
  }
  __device__ __forceinline__ Vector<std::uint32_t, 2> load_codes(const void* codes, std::uint8_t rest) const {
    Vector<std::uint32_t, 2> words{};
    each([&](int i, std::int64_t at, bool is_there) {
      const std::uint32_t code = is_there ? static_cast<const std::uint8_t*>(codes)[at] : rest;
      words.at[i / 4] |= code << (8 * (i % 4));
    });
    return words;
  }
  __device__ __forceinline__ void store_codes(void* codes, const Vector<std::uint32_t, 2>& words) const {
    each([&](int i, std::int64_t at, bool is_there) {
      if (is_there) static_cast<std::uint8_t*>(codes)[at] = static_cast<std::uint8_t>(byte_of(words.at[i / 4], i % 4));
    });
  }
};

template <bool kSigned>
__device__ __forceinline__ Vector<std::uint32_t, 2> encode(const CodeSums<kSigned>& sums, const float (&values)[kEight],
                                                           float inverse) {
  Vector<std::uint32_t, 2> words;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) code[j] = code_in_byte_2(sums, values[4 * i + j] * inverse);
    words.at[i] = pick_bytes(pick_bytes(code[0], code[1], 0x62), pick_bytes(code[2], code[3], 0x62), 0x5410);
  }
  return words;
}

// The codes whose level is 0.
constexpr std::uint8_t kZeroCode1 = 127, kZeroCode2 = 0;
static_assert(kDynamicMap[kZeroCode1] == 0.0f && kUnsignedDynamicMap[kZeroCode2] == 0.0f);

template <class Place>
__device__ __forceinline__ void update_8bit(const Place& place, const AdamWCoefficients& c, const Tables& tables,
                                            std::uint32_t block) {
  const UpdateItem& item = place.item;
  const bool is_odd = lane_index() % 2 != 0;  // odd lanes do for the second moment what even ones do for the first
  float* const absmax = (is_odd ? item.absmax2 : item.absmax1) + block;
  const float decayed = *absmax * (is_odd ? c.beta2 : c.beta1);
  const float decayed1 = shfl(decayed, 0), decayed2 = shfl(decayed, 1);
  float param[kEight], grad[kEight], m[kEight], v[kEight];
  place.load_param(param);
  place.load_grad(grad);
  const Vector<std::uint32_t, 2> codes1 = place.load_codes(item.state1, kZeroCode1);
  const Vector<std::uint32_t, 2> codes2 = place.load_codes(item.state2, kZeroCode2);
  float most1 = 0.0f, most2 = 0.0f;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    m[i] = tables.levels1[byte_of(codes1.at[i / 4], i % 4)] * decayed1;
    v[i] = tables.levels2[byte_of(codes2.at[i / 4], i % 4)] * decayed2;
    param[i] = adamw_update(c, param[i], grad[i], m[i], v[i]);
    most1 = fmaxf(most1, fabsf(m[i]));
    most2 = fmaxf(most2, v[i]);
  }
  place.store_param(param);
  const auto bits1 = max_of_warp(std::bit_cast<std::uint32_t>(most1));
  const auto bits2 = max_of_warp(std::bit_cast<std::uint32_t>(most2));
  const auto most = std::bit_cast<float>(is_odd ? bits2 : bits1);
  if (lane_index() < 2) *absmax = most;  // which all lanes have read before they met
  const float inverse = inverse_absmax(most);
  place.store_codes(item.state1, encode(tables.sums1, m, shfl(inverse, 0)));
  place.store_codes(item.state2, encode(tables.sums2, v, shfl(inverse, 1)));
}

__device__ __forceinline__ void update_32bit(const Apart& place, const AdamWCoefficients& c) {
  const UpdateItem& item = place.item;
  float param[kEight], grad[kEight], m[kEight], v[kEight];
  place.load_param(param);
  place.load_grad(grad);
  place.load(item.state1, DType::f32, m);
  place.load(item.state2, DType::f32, v);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    m[i] *= c.beta1;
    v[i] *= c.beta2;
    param[i] = adamw_update(c, param[i], grad[i], m[i], v[i]);
  }
  place.store(item.state1, DType::f32, m);
  place.store(item.state2, DType::f32, v);
  place.store_param(param);
}

template <class T>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateBlocks)
    update_kernel(const __grid_constant__ Updates updates) {
  const Shared& shared = updates.shared;
  const auto& list = updates.list;
  const std::int64_t thread = block_index() * kUpdateThreads + thread_index();
  if (*shared.unusable != 0 || (shared.found_inf != nullptr && *shared.found_inf != 0.0f)) {
    if (thread == 0 && updates.skipped != nullptr) ++*updates.skipped;
    return;
  }
  for (std::int64_t i = thread; i < updates.to_count; i += grid_blocks() * kUpdateThreads) {
    *shared.steps[i].counter = shared.steps[i].count;
  }
  Tables& tables = *dynamic_smem<Tables>();
  constexpr int kWords = kVectorBytes / sizeof(std::uint32_t);
  for (int i = thread_index(); i < static_cast<int>(sizeof(Tables) / kVectorBytes); i += kUpdateThreads) {
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
  launch<update_kernel<T>>({.blocks = blocks, .threads = kUpdateThreads, .smem_bytes = sizeof(Tables)}, stream,
                           updates);
  updates.to_count = 0;
  updates.skipped = nullptr;
}

// ---- the lists
// -------------------------------------------------------------------------------------------------------

struct Piece {
  UpdatePart part;
  bool is_whole;
};
using Pieces = std::vector<Piece>;

// The pieces of all parts that are of `dtype`, the whole ones first. in_vectors(tensor): whether vectors can reach it.
template <class InVectors>
Pieces pieces_of(const std::vector<UpdatePart>& parts, DType AdamW8bitTensor::* dtype_of, DType dtype,
                 const InVectors& in_vectors) {
  Pieces whole, rest;
  for (const UpdatePart& part : parts) {
    const AdamW8bitTensor& tensor = part.tensor;
    if (tensor.*dtype_of != dtype) continue;
    const std::int64_t elements = in_vectors(tensor) ? tensor.elements / kBlock * kBlock : 0;
    if (elements > 0) whole.push_back({{stretch_of(tensor, 0, elements), part.index}, true});
    if (elements > 0 && elements == tensor.elements) continue;
    rest.push_back({{stretch_of(tensor, elements, tensor.elements - elements), part.index}, false});
    if (elements > 0) rest.back().part.tensor.step = nullptr;  // counted with the other
  }
  whole.insert(whole.end(), rest.begin(), rest.end());
  return whole;
}

std::uint16_t last_of(const AdamW8bitTensor& tensor) {
  return static_cast<std::uint16_t>(tensor.elements - (ceil_div(tensor.elements, kBlock) - 1) * kBlock);
}

// f.template operator()<T>(dtype) for each T.
template <class F>
void each_dtype(const F& f) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    with_type(dtype, [&]<class T>() { f.template operator()<T>(dtype); });
  }
}

template <class T>
void look_at(const Pieces& pieces, const AdamW8bitGroup* groups, const Shared& shared, const Stream& stream) {
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
  const std::size_t step_bytes = static_cast<std::size_t>(args.count) * sizeof(Step);
  const Workspace workspace(step_bytes + sizeof(std::uint32_t), stream);
  const Shared shared{.inv_scale = args.inv_scale,
                      .found_inf = args.found_inf,
                      .unusable = reinterpret_cast<std::uint32_t*>(workspace.data() + step_bytes),
                      .steps = reinterpret_cast<Step*>(workspace.data())};
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
