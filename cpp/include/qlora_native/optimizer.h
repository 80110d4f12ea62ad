// Optimizers whose moments are kept in 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022):
// one call steps a whole list of parameters. The format of the state is bitsandbytes'.
//
// g is the gradient (times inv_scale); m, v and s are the decoded moments; p is the parameter; t is the number of the
// step, counted from 1:
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
//     m, v as in adamw
//     s  <- beta3(t) s + (1 - beta3(t)) g
//     p  <- p - lr * (m / (1 - beta1^t) + alpha(t) s) / (sqrt(v / (1 - beta2^t)) + eps)
//     alpha(t) = min(t / t_alpha, 1) * alpha
//     beta3(t) = exp(ln beta1 ln beta3 / ((1 - t / t_beta3) ln beta3 + t / t_beta3 ln beta1)), at most beta3;
//                from t_beta3 on, beta3
//
// Each algorithm first does p <- (1 - lr * weight_decay) p: the weight decay is decoupled. (Adam is adamw with
// weight_decay = 0. What bitsandbytes calls Adam is adamw too: its weight_decay is decoupled as well.)
//
// p moves by the moments before they are quantized again. All arithmetic is fp32; p is rounded once to its dtype. Every
// operation is one of IEEE 754's, rounded by itself, in one order. So the results have the same bits on every
// instruction set of the cpu backend, from run to run, and for any number of threads.
#pragma once

#include "qlora_native/types.h"

namespace qlora_native {

enum class Algorithm { adamw, lion, ademamix };

constexpr int kOptimizer8bitBlocksize = 256;

// One parameter, its gradient and its state; all arrays are contiguous. lion has m in state1; adamw also has v in
// state2; ademamix also has s in state3. The fields of moments that an algorithm does not have are not read.
//
//   m[i] = dynamic_map(true)[state1[i]] * absmax1[i / 256]
//   v[i] = dynamic_map(false)[state2[i]] * absmax2[i / 256]
//   s[i] = dynamic_map(true)[state3[i]] * absmax3[i / 256]
//
// A code is exactly that of the nearest level of m * (1 / absmax1), the lower level if two are equally near. So m never
// changes its sign, but may become 0. Before the first step the whole state must be zero.
//
// bitsandbytes keeps m and s in one array: there state3 is state1 + elements, and absmax3 is absmax1 +
// ceil(elements / 256).
struct Optimizer8bitTensor {
  void* param = nullptr;       // in, out, [elements]
  const void* grad = nullptr;  // [elements]
  DType param_dtype = DType::f32;
  DType grad_dtype = DType::f32;
  std::int64_t elements = 0;
  void* state1 = nullptr;        // in, out, [elements]: codes of m (uint8), or m itself (float) if absmax1 is null
  void* state2 = nullptr;        // in, out: the same for v
  void* state3 = nullptr;        // in, out: the same for s
  float* absmax1 = nullptr;      // in, out, [ceil(elements / 256)]; all three are null if the state is fp32
  float* absmax2 = nullptr;      // in, out: the same for v
  float* absmax3 = nullptr;      // in, out: the same for s
  std::int64_t* step = nullptr;  // in, out: the number of steps taken; this one adds 1, unless it is skipped
  int group = 0;                 // index into Optimizer8bitArgs::groups
};

// The defaults are those of adamw and, from beta3 on, of ademamix. The authors of lion use a third to a tenth of
// AdamW's lr, with beta2 = 0.99; lion has no eps.
struct Optimizer8bitGroup {
  double lr = 1e-3;            // >= 0
  double beta1 = 0.9;          // in [0, 1); above 0 with t_beta3
  double beta2 = 0.999;        // in [0, 1)
  double eps = 1e-8;           // >= 0
  double weight_decay = 1e-2;  // >= 0
  // [1], memory of the stream's device, or null. If it is given, the step reads it instead of lr when it runs, so that
  // a captured CUDA graph uses the value at the time of its replay. On the cpu a value that is not a finite number >= 0
  // is an Error; on cuda, where the host cannot see it, the step is skipped.
  const float* device_lr = nullptr;
  double beta3 = 0.9999;  // in [0, 1); above 0 with t_beta3
  double alpha = 5.0;     // >= 0
  double t_alpha = 0.0;   // steps, >= 0; with 0, alpha from the first step on
  double t_beta3 = 0.0;   // steps, >= 0; with 0, beta3 from the first step on
};

// A gradient is unusable if g * inv_scale is NaN, or so large (about 1.8e19) that its square is not finite in fp32. If
// any gradient is unusable, or *found_inf != 0, the whole step is skipped: nothing but *skipped is written.
//
// `tensors` and `groups` are lists in the host's memory, which are read before the call returns. The pointers in them
// (param, grad, the moments, step, device_lr) and inv_scale, found_inf and skipped are to memory of the stream's
// device.
struct Optimizer8bitArgs {
  const Optimizer8bitTensor* tensors = nullptr;  // [count], the host's memory; each parameter once
  std::int64_t count = 0;
  const Optimizer8bitGroup* groups = nullptr;  // [group_count], the host's memory
  int group_count = 0;
  const float* inv_scale = nullptr;  // [1], a factor of all gradients (clipping, loss scaling); null means 1
  const float* found_inf = nullptr;  // [1], as torch's GradScaler gives it; null means 0
  std::int64_t* skipped = nullptr;   // in, out, [1]: the number of skipped steps; a skipped step adds 1
  Algorithm algorithm = Algorithm::adamw;
};
QLN_API void optimizer_8bit_step(const Optimizer8bitArgs& args, const Stream& stream = {});

}  // namespace qlora_native
