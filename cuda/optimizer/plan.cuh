// The arguments of the kernels of an optimizer's step. Tensors are divided into pieces, and pieces are collected in
// lists; each_block() says which warp takes which block.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "common/layout.h"
#include "common/optimizer.h"
#include "device/elements.cuh"
#include "paged/update.h"

namespace qlora_native::QLN_CUDA {

constexpr int kBlock = kOptimizer8bitBlocksize;
static_assert(kBlock == kWarp * kVecSize);

// check_kernel computes this for each tensor, and update_kernel reads it.
struct TensorStep {
  StepCoefficients coefficients;
  std::int64_t* counter;
  std::int64_t count;  // becomes *counter, unless the step is skipped
};

// The arguments that both kernels of a step share.
struct StepArgs {
  const float* inv_scale;
  const float* found_inf;
  std::uint32_t* unusable;  // [1]: not 0 if a gradient or a learning rate is unusable
  TensorStep* steps;        // one for each tensor of the step
};

// The items of a launch. Their blocks are numbered one after the other: first the whole, aligned blocks, which vectors
// load, then the others.
template <class Item, int kMax>
struct BlockList {
  std::uint32_t count, whole_blocks, blocks;
  std::uint32_t begin[kMax + 1];  // the first block of each item; from `count` on, the number of blocks
  Item items[kMax];

  // 32 bits are enough for the number of blocks, because no memory holds a thousand billion elements.
  void add(const Item& item, std::int64_t item_blocks, bool is_whole) {
    begin[count] = blocks;
    items[count++] = item;
    blocks += static_cast<std::uint32_t>(item_blocks);
    if (is_whole) whole_blocks = blocks;
  }
  void end() { std::fill(begin + count, begin + kMax + 1, blocks); }
};

struct CheckItem {
  const void* grad;
  std::int64_t* counter;  // null if another item of the tensor computes its step
  std::uint32_t tensor;   // index into StepArgs::steps
  std::uint16_t last;     // elements in the item's last block
  std::uint8_t dtype, group;
};
constexpr int kMaxChecks = 1024, kMaxGroups = 32;
struct CheckArgs {
  StepArgs shared;
  Optimizer8bitGroup groups[kMaxGroups];
  BlockList<CheckItem, kMaxChecks> list;
};

template <class Rule>
struct UpdateItem {
  void* param;
  const void* grad;
  void* state[Rule::kMoments];
  float* absmax[Rule::kMoments];
  std::uint32_t tensor;
  std::uint16_t last;
  std::uint8_t param_dtype, grad_dtype;
};
template <class Rule>
constexpr int kMaxUpdates = Rule::kMoments <= 2 ? 512 : 256;
template <class Rule>
struct UpdateArgs {
  StepArgs shared;
  std::int64_t* skipped;           // null if another launch counts skipped steps
  std::uint32_t tensors_to_count;  // how many tensors' counters this launch advances
  BlockList<UpdateItem<Rule>, kMaxUpdates<Rule>> list;
};
// The bytes of parameters that a kernel may have.
constexpr std::size_t kMaxParameterBytes = 32764;
static_assert(sizeof(CheckArgs) <= kMaxParameterBytes && sizeof(UpdateArgs<AdamW>) <= kMaxParameterBytes &&
              sizeof(UpdateArgs<Lion>) <= kMaxParameterBytes && sizeof(UpdateArgs<AdEMAMix>) <= kMaxParameterBytes);

__device__ __forceinline__ int lane_index() { return thread_index() % kWarp; }

// Calls f(item, block, is_last, is_new) for each of this warp's blocks in [first, end). `block` counts from the start
// of the item, `is_last` says whether it is the item's last one, and `is_new` whether the warp had another item before.
// The warp searches for the item only when it has passed the end of the one before.
template <int kThreads, class Item, int kMax, class F>
__device__ __forceinline__ void each_block(const BlockList<Item, kMax>& list, std::uint32_t first, std::uint32_t end,
                                           const F& f) {
  constexpr std::uint32_t kWarps = kThreads / kWarp;
  static_assert(std::has_single_bit(static_cast<unsigned>(kMax)));
  const std::uint32_t step = static_cast<std::uint32_t>(grid_blocks()) * kWarps;
  std::uint32_t item = 0, begin = 0, item_end = 0;
  for (std::uint32_t block = first + static_cast<std::uint32_t>(block_index()) * kWarps + thread_index() / kWarp;
       block < end; block += step) {
    const bool is_new = block >= item_end;
    if (is_new) {
      item = 0;  // becomes the last item that begins at `block` or before
#pragma unroll 1
      for (std::uint32_t jump = kMax / 2; jump > 0; jump /= 2) {
        if (list.begin[item + jump] <= block) item += jump;
      }
      begin = list.begin[item];
      item_end = list.begin[item + 1];
    }
    f(list.items[item], block - begin, block + 1 == item_end, is_new);
  }
}

struct Piece {
  UpdatePart part;
  bool is_whole;
};
using Pieces = std::vector<Piece>;

// The pieces of all parts whose dtype is `dtype`, the whole ones first. supports_vectors(tensor) says whether vectors
// can load the tensor.
template <class SupportsVectors>
Pieces pieces_of(const std::vector<UpdatePart>& parts, DType Optimizer8bitTensor::* dtype_of, DType dtype,
                 const SupportsVectors& supports_vectors) {
  Pieces whole, rest;
  for (const UpdatePart& part : parts) {
    const Optimizer8bitTensor& tensor = part.tensor;
    if (tensor.*dtype_of != dtype) continue;
    const std::int64_t elements = supports_vectors(tensor) ? tensor.elements / kBlock * kBlock : 0;
    if (elements > 0) whole.push_back({{segment_of(tensor, 0, elements), part.index}, true});
    if (elements > 0 && elements == tensor.elements) continue;
    rest.push_back({{segment_of(tensor, elements, tensor.elements - elements), part.index}, false});
    if (elements > 0) rest.back().part.tensor.step = nullptr;  // the whole piece counts the step
  }
  whole.insert(whole.end(), rest.begin(), rest.end());
  return whole;
}

inline std::uint16_t last_of(const Optimizer8bitTensor& tensor) {
  return static_cast<std::uint16_t>(tensor.elements - (ceil_div(tensor.elements, kBlock) - 1) * kBlock);
}

}  // namespace qlora_native::QLN_CUDA
