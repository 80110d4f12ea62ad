// AdamW whose two moments are kept in 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022):
// one call steps a whole list of parameters. The format of the state is bitsandbytes' (its AdamW8bit).
//
// With gradient g (times inv_scale), m and v decoded, t the number of the step, counted from 1:
//
//   m  <- beta1 m + (1 - beta1) g              p <- (1 - lr * weight_decay) p              decoupled, torch's order
//   v  <- beta2 v + (1 - beta2) g^2            p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
//
// p moves by m and v as they are before they are quantized again. All arithmetic is fp32; p is rounded once to its
// dtype. Every operation is one of IEEE 754's, rounded by itself, in one order: the results are the same bits on every
// instruction set of the cpu backend, from run to run, and for any number of threads.
#pragma once

#include "qlora_native/export.h"
#include "qlora_native/types.h"

namespace qlora_native {

constexpr int kAdamW8bitBlocksize = 256;

// One parameter, its gradient and its state; all contiguous.
//
// Codes: element i of m is dynamic_map(true)[state1[i]] * absmax1[i / 256], of v dynamic_map(false)[state2[i]] *
// absmax2[i / 256]. A code is that of the nearest level of m * (1 / absmax1), exactly, a tie the lower level; so m
// never changes its sign, but may become 0. Before the first step everything is zero.
struct AdamW8bitTensor {
  void* param = nullptr;       // in, out, [elements]
  const void* grad = nullptr;  // [elements]
  DType param_dtype = DType::f32;
  DType grad_dtype = DType::f32;
  std::int64_t elements = 0;
  void* state1 = nullptr;        // in, out, [elements]: codes of m (uint8), or m itself (float) where absmax1 is null
  void* state2 = nullptr;        // in, out, likewise v
  float* absmax1 = nullptr;      // in, out, [ceil(elements / 256)], or null together with absmax2: fp32 state
  float* absmax2 = nullptr;      // in, out, likewise
  std::int64_t* step = nullptr;  // in, out: steps taken before this one; then one more, unless the step is skipped
  int group = 0;                 // index into AdamW8bitArgs::groups
};

struct AdamW8bitGroup {
  double lr = 1e-3;            // >= 0
  double beta1 = 0.9;          // in [0, 1)
  double beta2 = 0.999;        // in [0, 1)
  double eps = 1e-8;           // >= 0
  double weight_decay = 1e-2;  // >= 0
  // [1], memory of the stream's device, or null: read in place of lr when the step is done, so that a CUDA graph that
  // has captured it takes what is there at its replay. Where only a GPU can see that it is not a finite number >= 0,
  // the step is skipped.
  const float* device_lr = nullptr;
};

// A gradient is unusable if g * inv_scale is NaN, or too large for its square to be finite in fp32 (about 1.8e19). One
// of those anywhere, or *found_inf != 0, and the whole step is skipped: nothing is written but *skipped.
// tensors and groups are lists in the host's memory, read before the call returns. What they point to (param, grad,
// state1, state2, absmax1, absmax2, step, device_lr), inv_scale, found_inf and skipped are memory of the stream's
// device.
struct AdamW8bitArgs {
  const AdamW8bitTensor* tensors = nullptr;  // [count], the host's; each parameter once
  std::int64_t count = 0;
  const AdamW8bitGroup* groups = nullptr;  // [group_count], the host's
  int group_count = 0;
  const float* inv_scale = nullptr;  // [1], what gradients are multiplied by (clipping, loss scaling); null: 1
  const float* found_inf = nullptr;  // [1], as torch's GradScaler gives it; null: 0
  std::int64_t* skipped = nullptr;   // in, out, [1]: skipped steps, one more if this one was
};
QLN_API void adamw_8bit_step(const AdamW8bitArgs& args, const Stream& stream = {});

}  // namespace qlora_native
