// with_device_tensors(args, run) calls run(args) with tensors that kernels can reach. On a device the caller's tensors
// are such. For the emulator they are copied to the emulated device and back (emulator/call_memory.h), and here is what
// the tensors of each operation are.
#pragma once

#ifdef __CUDACC__

namespace qlora_native::cuda {

template <class Args, class Run>
void with_device_tensors(const Args& args, const Run& run) {
  run(args);
}

}  // namespace qlora_native::cuda

#else

#include <vector>

#include "common/layout.h"
#include "common/optimizer.h"
#include "emulator/call_memory.h"
#include "qlora_native/cross_entropy.h"
#include "qlora_native/elementwise.h"
#include "qlora_native/linear.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/quantize.h"

namespace qlora_native::cuda_emulated {

// Scales or minima of each block of a weight, in bytes if `nested` has scales of their own.
inline void add_scales(CallMemory& memory, const void*& scales, const float*& nested, const QuantizedWeightView& w) {
  if (nested == nullptr) return memory.add(scales, w.scale_dtype, w.blocks());
  memory.add(reinterpret_cast<const std::uint8_t*&>(scales), w.blocks());
  memory.add(nested, ceil_div(w.blocks(), w.nested_blocksize));
}
// A pointer that the operation does not use becomes null.
inline void add_tensors(CallMemory& memory, QuantizedWeightView& w) {
  memory.add(w.codes, (w.elements() * w.bits + 7) / 8);
  if (w.bits == 8) w.code = nullptr;
  memory.add(w.code, 16);
  memory.add(w.zero_point, w.blocks());
  add_scales(memory, w.minimum, w.nested_minimum, w);
  if (w.nested_absmax == nullptr) w.nested_code = w.offset = nullptr;
  add_scales(memory, w.absmax, w.nested_absmax, w);
  memory.add(w.nested_code, 256);
  memory.add(w.offset, 1);
}
inline void add_tensors(CallMemory& memory, LoraView& lora, std::int64_t N, std::int64_t K) {
  memory.add(lora.a, lora.dtype, lora.count * lora.rank * K);
  memory.add(lora.b, lora.dtype, lora.count * N * lora.rank);
  memory.add(lora.device_seed, 1);
}
inline void add_tensors(CallMemory& memory, RowGroups& groups) {
  if (groups.count == 0) groups.offsets = nullptr;
  memory.add(groups.offsets, groups.count + 1);
}
inline void add_tensors(CallMemory& memory, LinearForwardArgs& args) {
  add_tensors(memory, args.weight);
  add_tensors(memory, args.groups);
  add_tensors(memory, args.lora, args.weight.N, args.weight.K);
  memory.add(args.bias, args.x.dtype, args.weight.count * args.weight.N);
  memory.add(args.x, args.y, args.u);
}
inline void add_tensors(CallMemory& memory, LinearBackwardInputArgs& args) {
  add_tensors(memory, args.weight);
  add_tensors(memory, args.groups);
  add_tensors(memory, args.lora, args.weight.N, args.weight.K);
  memory.add(args.dy, args.dx, args.v);
}
inline void add_tensors(CallMemory& memory, LoraGradientsArgs& args) {
  add_tensors(memory, args.groups);
  args.lora.a = args.lora.b = nullptr;
  add_tensors(memory, args.lora, args.dy.cols, args.x.cols);
  memory.add(args.x, args.dy, args.u, args.v);
  memory.add(args.da, args.lora.dtype, args.lora.count * args.lora.rank * args.x.cols);
  memory.add(args.db, args.lora.dtype, args.lora.count * args.dy.cols * args.lora.rank);
}
inline void add_tensors(CallMemory& memory, CrossEntropyArgs& args) {
  memory.add(args.logits);
  memory.add(args.labels, args.logits.rows);
  memory.add(args.loss, args.logits.rows);
  memory.add(args.log_probability, args.logits.rows);
  memory.add(args.row_gradients, args.logits.rows);
}
inline void add_tensors(CallMemory& memory, GatedActivationArgs& args) { memory.add(args.gate, args.up, args.h); }
inline void add_tensors(CallMemory& memory, GatedActivationBackwardArgs& args) {
  memory.add(args.gate, args.up, args.dh, args.dgate, args.dup);
}
inline void add_tensors(CallMemory& memory, RmsNormArgs& args) {
  memory.add(args.x, args.y);
  memory.add(args.weight, args.x.dtype, args.x.cols);
  memory.add(args.r, args.x.rows);
}
inline void add_tensors(CallMemory& memory, RmsNormBackwardArgs& args) {
  memory.add(args.x, args.dy, args.dx);
  memory.add(args.weight, args.x.dtype, args.x.cols);
  memory.add(args.r, args.x.rows);
}
inline void add_tensors(CallMemory& memory, QuantizeArgs& args) {
  memory.add(args.weight, args.dtype, args.elements);
  if (args.bits == 8) args.code = nullptr;
  memory.add(args.code, 16);
  memory.add(args.codes, (args.elements * args.bits + 7) / 8);
  memory.add(args.absmax, ceil_div(args.elements, args.blocksize));
  memory.add(args.non_finite, 1);
}
inline void add_tensors(CallMemory& memory, QuantizeAbsmaxArgs& args) {
  memory.add(args.absmax, args.blocks);
  memory.add(args.nested_code, 256);
  memory.add(args.codes, args.blocks);
  memory.add(args.nested_absmax, ceil_div(args.blocks, args.nested_blocksize));
  memory.add(args.offset, 1);
}
inline void add_tensors(CallMemory& memory, QuantizeMicroscaledArgs& args) {
  memory.add(args.weight, args.dtype, args.elements);
  memory.add(args.codes, (args.elements + 1) / 2);
  memory.add(args.scales, ceil_div(args.elements, args.blocksize));
  memory.add(args.nested_code, 256);
  memory.add(args.non_finite, 1);
}
inline void add_tensors(CallMemory& memory, DequantizeArgs& args) {
  add_tensors(memory, args.weight);
  memory.add(args.out, args.dtype, args.elements());
  memory.add(args.rows, args.row_count);
}
// Adds only the moments that the algorithm has, because the other pointers may hold anything.
inline void add_tensors(CallMemory& memory, Optimizer8bitTensor& tensor, Algorithm algorithm) {
  const std::int64_t n = tensor.elements;
  memory.add(tensor.param, tensor.param_dtype, n);
  memory.add(tensor.grad, tensor.grad_dtype, n);
  const bool in_8_bits = tensor.absmax1 != nullptr;
  for (int moment = 0; moment < kMaxMoments; ++moment) {
    void*& state = state_of(tensor, moment);
    float*& absmax = absmax_of(tensor, moment);
    if (moment >= moments_of(algorithm)) {
      state = absmax = nullptr;
    } else if (in_8_bits) {
      memory.add(reinterpret_cast<std::uint8_t*&>(state), n);
      memory.add(absmax, ceil_div(n, kOptimizer8bitBlocksize));
    } else {
      memory.add(state, DType::f32, n);
    }
  }
  memory.add(tensor.step, 1);
}

// The lists of tensors and groups stay in the host's memory; the addresses in them become the device's.
template <class Run>
void with_device_tensors(const Optimizer8bitArgs& args, const Run& run) {
  CallMemory memory;
  std::vector<Optimizer8bitTensor> tensors(args.tensors, args.tensors + args.count);
  std::vector<Optimizer8bitGroup> groups(args.groups, args.groups + args.group_count);
  Optimizer8bitArgs copy = args;
  copy.tensors = tensors.data();
  copy.groups = groups.data();
  for (Optimizer8bitTensor& tensor : tensors) add_tensors(memory, tensor, args.algorithm);
  for (Optimizer8bitGroup& group : groups) memory.add(group.device_lr, 1);
  memory.add(copy.inv_scale, 1);
  memory.add(copy.found_inf, 1);
  memory.add(copy.skipped, 1);
  memory.move_to_device();
  run(copy);
  memory.copy_back();
}

}  // namespace qlora_native::cuda_emulated

#endif
