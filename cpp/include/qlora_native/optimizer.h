// Optimizers whose moments are kept in 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022):
// one call steps a whole list of parameters. The format of the state is bitsandbytes'.
//
// g is the gradient (times inv_scale), m, v and s are the moments, decoded, t is the number of the step, from 1:
//
//   adamw      Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019
//     m  <- beta1 m + (1 - beta1) g
//     v  <- beta2 v + (1 - beta2) g^2
//     p  <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
//
//   lion       Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023
//     p  <- p - lr * sign(beta1 m + (1 - beta1) g)
//     m  <- beta2 m + (1 - beta2) g
//
//   ademamix   Pagliardini et al., "The AdEMAMix Optimizer: Better, Faster, Older", 2024
//     m, v       as adamw
//     s  <- beta3(t) s + (1 - beta3(t)) g
//     p  <- p - lr * (m / (1 - beta1^t) + alpha(t) s) / (sqrt(v / (1 - beta2^t)) + eps)
//     alpha(t) = min(t / t_alpha, 1) * alpha
//     beta3(t) = exp(ln beta1 ln beta3 / ((1 - t / t_beta3) ln beta3 + t / t_beta3 ln beta1)), at most beta3; from
//     t_beta3 on beta3
//
// Each first does p <- (1 - lr * weight_decay) p: decay is decoupled. (Adam is adamw with weight_decay = 0; so is what
// bitsandbytes calls Adam, whose weight_decay is decoupled too.)
//
// p moves by the moments as they are before they are quantized again. All arithmetic is fp32; p is rounded once to its
// dtype. Every operation is one of IEEE 754's, rounded by itself, in one order: the results are the same bits on every
// instruction set of the cpu backend, from run to run, and for any number of threads.
#pragma once

#include "qlora_native/export.h"
#include "qlora_native/types.h"

namespace qlora_native {

enum class Algorithm { adamw, lion, ademamix };

constexpr int kOptimizer8bitBlocksize = 256;

// One parameter, its gradient and its state; all contiguous. lion has state1 alone (m), adamw state2 too (v), ademamix
// all three (s). What an algorithm has not is not read.
//
// Codes: element i of m is dynamic_map(true)[state1[i]] * absmax1[i / 256], of v dynamic_map(false)[state2[i]] *
// absmax2[i / 256], of s as of m. A code is that of the nearest level of m * (1 / absmax1), exactly, a tie the lower
// level; so m never changes its sign, but may become 0. Before the first step everything is zero.
//
// bitsandbytes keeps m and s in one array: there state3 is state1 + elements, absmax3 is absmax1 + ceil(elements /
// 256).
struct Optimizer8bitTensor {
  void* param = nullptr;       // in, out, [elements]
  const void* grad = nullptr;  // [elements]
  DType param_dtype = DType::f32;
  DType grad_dtype = DType::f32;
  std::int64_t elements = 0;
  void* state1 = nullptr;        // in, out, [elements]: codes of m (uint8), or m itself (float) where absmax1 is null
  void* state2 = nullptr;        // in, out, likewise v
  void* state3 = nullptr;        // in, out, likewise s
  float* absmax1 = nullptr;      // in, out, [ceil(elements / 256)], or null, as are then the others: fp32 state
  float* absmax2 = nullptr;      // in, out, likewise
  float* absmax3 = nullptr;      // in, out, likewise
  std::int64_t* step = nullptr;  // in, out: steps taken before this one; then one more, unless the step is skipped
  int group = 0;                 // index into Optimizer8bitArgs::groups
};

// The defaults are adamw's and, from beta3 on, ademamix'. For lion its authors take a third to a tenth of AdamW's lr,
// with beta2 = 0.99; it has no eps.
struct Optimizer8bitGroup {
  double lr = 1e-3;            // >= 0
  double beta1 = 0.9;          // in [0, 1); above 0 with t_beta3
  double beta2 = 0.999;        // in [0, 1)
  double eps = 1e-8;           // >= 0
  double weight_decay = 1e-2;  // >= 0
  // [1], memory of the stream's device, or null: read in place of lr when the step is done, so that a CUDA graph that
  // has captured it takes what is there at its replay. Where only a GPU can see that it is not a finite number >= 0,
  // the step is skipped.
  const float* device_lr = nullptr;
  double beta3 = 0.9999;  // in [0, 1); above 0 with t_beta3
  double alpha = 5.0;     // >= 0
  double t_alpha = 0.0;   // steps, >= 0; 0: alpha from the first step on
  double t_beta3 = 0.0;   // steps, >= 0; 0: beta3 from the first step on
};

// A gradient is unusable if g * inv_scale is NaN, or too large for its square to be finite in fp32 (about 1.8e19). One
// of those anywhere, or *found_inf != 0, and the whole step is skipped: nothing is written but *skipped.
// tensors and groups are lists in the host's memory, read before the call returns. What they point to (param, grad, the
// moments, step, device_lr), inv_scale, found_inf and skipped are memory of the stream's device.
struct Optimizer8bitArgs {
  const Optimizer8bitTensor* tensors = nullptr;  // [count], the host's; each parameter once
  std::int64_t count = 0;
  const Optimizer8bitGroup* groups = nullptr;  // [group_count], the host's
  int group_count = 0;
  const float* inv_scale = nullptr;  // [1], what gradients are multiplied by (clipping, loss scaling); null: 1
  const float* found_inf = nullptr;  // [1], as torch's GradScaler gives it; null: 0
  std::int64_t* skipped = nullptr;   // in, out, [1]: skipped steps, one more if this one was
  Algorithm algorithm = Algorithm::adamw;
};
QLN_API void optimizer_8bit_step(const Optimizer8bitArgs& args, const Stream& stream = {});

}  // namespace qlora_native
