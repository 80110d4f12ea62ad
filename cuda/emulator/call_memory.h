// The tensors of a call on the emulated device. The caller's tensors lie in the host's memory: with_device_tensors()
// copies them to the device's memory, runs the call on the copies, and copies the results back.
#pragma once

#include <type_traits>
#include <vector>

#include "common/layout.h"
#include "common/optimizer.h"
#include "qlora_native/cross_entropy.h"
#include "qlora_native/elementwise.h"
#include "qlora_native/linear.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/quantize.h"

namespace qlora_native::cuda_emulated {

class CallMemory {
 public:
  CallMemory() = default;
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;
  ~CallMemory();

  // add() is called once for each tensor, in any order. A null pointer adds nothing. A pointer to const means that the
  // call only reads the tensor.
  template <class T>
  void add(T*& pointer, std::int64_t count) {
    add_rows(&pointer, pointer, 1, count * static_cast<std::int64_t>(sizeof(T)), 0, !std::is_const_v<T>);
  }
  template <class T>  // void or const void
  void add(T*& pointer, DType dtype, std::int64_t count) {
    add_rows(&pointer, pointer, 1, count * static_cast<std::int64_t>(size_of(dtype)), 0, !std::is_const_v<T>);
  }
  template <class Pointer>
  void add(BasicMatrix<Pointer>& matrix) {
    const auto size = static_cast<std::int64_t>(size_of(matrix.dtype));
    add_rows(&matrix.data, matrix.data, matrix.rows, matrix.cols * size, matrix.stride * size,
             !std::is_const_v<std::remove_pointer_t<Pointer>>);
  }

  // To be called after the last add(): allocates memory, copies the tensors, and points the arguments at the copies.
  void move_to_device();
  // To be called after the kernels: copies the results back. Ends the process if a kernel has written a tensor that
  // the call only reads.
  void copy_back() const;

 private:
  struct View {
    void* pointer;  // where the arguments keep the tensor's address
    std::byte* host;
    std::int64_t rows, row_bytes, stride_bytes;
    bool is_written;
    std::byte* device = nullptr;

    std::byte* end() const { return rows == 0 ? host : host + (rows - 1) * stride_bytes + row_bytes; }
    template <class F>
    void each_row(const F& f) const {
      for (std::int64_t row = 0; row < rows; ++row) f(host + row * stride_bytes, device + row * stride_bytes);
    }
  };
  void add_rows(void* pointer, const void* host, std::int64_t rows, std::int64_t row_bytes, std::int64_t stride_bytes,
                bool is_written);

  std::vector<View> views_;
  std::byte* memory_ = nullptr;  // on the device
};

// ---- the tensors of each operation; a pointer that the operation does not use becomes null ----

inline void add_tensors(CallMemory& memory, QuantizedWeightView& w) {
  memory.add(w.codes, (w.elements() * w.bits + 7) / 8);
  if (w.bits == 8) w.code = nullptr;
  memory.add(w.code, 16);
  if (w.nested_absmax == nullptr) {
    memory.add(w.absmax, DType::f32, w.blocks());
    w.nested_code = w.offset = nullptr;
    return;
  }
  memory.add(reinterpret_cast<const std::uint8_t*&>(w.absmax), w.blocks());
  memory.add(w.nested_absmax, ceil_div(w.blocks(), w.nested_blocksize));
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
  memory.add(args.x);
  memory.add(args.bias, args.x.dtype, args.weight.count * args.weight.N);
  memory.add(args.y);
  memory.add(args.u);
}
inline void add_tensors(CallMemory& memory, LinearBackwardInputArgs& args) {
  add_tensors(memory, args.weight);
  add_tensors(memory, args.groups);
  add_tensors(memory, args.lora, args.weight.N, args.weight.K);
  memory.add(args.dy);
  memory.add(args.dx);
  memory.add(args.v);
}
inline void add_tensors(CallMemory& memory, LoraGradientsArgs& args) {
  add_tensors(memory, args.groups);
  args.lora.a = args.lora.b = nullptr;
  add_tensors(memory, args.lora, args.dy.cols, args.x.cols);
  memory.add(args.x);
  memory.add(args.dy);
  memory.add(args.u);
  memory.add(args.v);
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
inline void add_tensors(CallMemory& memory, GatedActivationArgs& args) {
  memory.add(args.gate);
  memory.add(args.up);
  memory.add(args.h);
}
inline void add_tensors(CallMemory& memory, GatedActivationBackwardArgs& args) {
  memory.add(args.gate);
  memory.add(args.up);
  memory.add(args.dh);
  memory.add(args.dgate);
  memory.add(args.dup);
}
inline void add_tensors(CallMemory& memory, RmsNormArgs& args) {
  memory.add(args.x);
  memory.add(args.weight, args.x.dtype, args.x.cols);
  memory.add(args.y);
  memory.add(args.r, args.x.rows);
}
inline void add_tensors(CallMemory& memory, RmsNormBackwardArgs& args) {
  memory.add(args.x);
  memory.add(args.weight, args.x.dtype, args.x.cols);
  memory.add(args.dy);
  memory.add(args.r, args.x.rows);
  memory.add(args.dx);
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

template <class Args, class Run>
void with_device_tensors(const Args& args, const Run& run) {
  CallMemory memory;
  Args copy = args;
  add_tensors(memory, copy);
  memory.move_to_device();
  run(copy);
  memory.copy_back();
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
