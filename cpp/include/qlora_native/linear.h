// The linear layer over a quantized weight, with a low-rank adapter inside the same product:
//
//   Y[M,N]  = [ X | U ] . [ W | s*B ]^T + bias      U = drop(X) . A^T / (1-p)       linear_forward
//   dX[M,K] = dY . W + mask o (V . A)               V = s/(1-p) * dY . B            linear_backward_input
//   dA[r,K] = V^T . drop(X)    dB[N,r] = s * dY^T . U                               lora_gradients
//
// `o` is the element-wise product, and p the probability of dropout. If the rows of X are in groups (RowGroups), each
// group has its own weight and adapter, or only its own adapter. Results overwrite what their memory held.
//
// Every pointer is to memory of the stream's device (types.h), also those to codebooks and scales.
//
// W is decoded in tiles on the way into the multiply. W, A, B, U and V are rounded once to the dtype of X; every sum is
// fp32. In bf16 subnormal numbers may count as zero. Results do not depend on the number of threads, and several
// threads may call at once. Extra memory of a call:
//
//   cpu    8 MB, or 48 rows of an operand in fp32 where these are larger, and for each thread 1 MB (1.4 MB with AMX),
//          kept for the next call
//   cuda   128 KB for each SM; with an adapter 160 KB, and U or V if the caller wants none
//   either, with a dense product of the application: see set_dense_gemm (runtime.h)
#pragma once

#include "qlora_native/types.h"

namespace qlora_native {

// A low-rank adapter (LoRA, Hu et al. 2021), or `count` adapters of one shape, one after another. With rank 0 there is
// none.
struct LoraView {
  std::int64_t rank = 0;
  std::int64_t count = 1;
  DType dtype = DType::f32;
  const void* a = nullptr;  // [count, rank, K], contiguous
  const void* b = nullptr;  // [count, N, rank], contiguous
  float scaling = 1.0f;     // s; any finite value
  // Dropout on the adapter's input. Element (m,k) is dropped if a hash of (seed, m, k) falls below the probability
  // (common/philox.h). So the backward pass recomputes the mask, and nobody stores it.
  float dropout = 0.0f;  // p in [0, 1), in steps of 1/65536
  std::uint64_t seed = 0;
  // [1], memory of the stream's device, or null. It is added to the seed when the product is computed, so that a
  // captured CUDA graph draws another mask at each replay. In the backward pass it must have the value that it had in
  // the forward pass.
  const std::uint64_t* device_seed = nullptr;
};

// Groups of rows of X, which are sorted by what they are multiplied with. Group g is the rows offsets[g] ...
// offsets[g+1]-1; it may be empty. There are `count` weights, of which group g takes the g-th, or one, which all groups
// share. The same holds for adapters.
//
//   the experts of a mixture      weight.count == count; every row is in a group
//   adapters over one base        weight.count == 1 and lora.count == count; rows before the first group have none
//
// An adapter adds to rows of its own group alone. On cuda one with NaN or infinity can also make NaN of other rows that
// are multiplied together with its own.
//
// On the cpu the offsets are checked. On cuda the host cannot read them without waiting for the device; there the
// kernels never touch rows that do not exist, whatever the offsets say.
struct RowGroups {
  std::int64_t count = 0;                 // 0 if the rows are not in groups
  const std::int64_t* offsets = nullptr;  // [count + 1], ascending, the last is M; memory of the stream's device
};

struct LinearForwardArgs {
  QuantizedWeightView weight;
  LoraView lora;
  RowGroups groups{};
  ConstMatrix x;               // [M, K]
  const void* bias = nullptr;  // [weight.count, N] in x's dtype, or null
  Matrix y;                    // out, [M, N] in x's dtype
  Matrix u;                    // out, [M, rank] in x's dtype; null data if it is not wanted
};
QLN_API void linear_forward(const LinearForwardArgs& args, const Stream& stream = {});

struct LinearBackwardInputArgs {
  QuantizedWeightView weight;
  LoraView lora;
  RowGroups groups{};
  ConstMatrix dy;  // [M, N]
  Matrix dx;       // out, [M, K] in dy's dtype; null data if only v is wanted
  Matrix v;        // out, [M, rank] in dy's dtype; null data if it is not wanted
};
QLN_API void linear_backward_input(const LinearBackwardInputArgs& args, const Stream& stream = {});

struct LoraGradientsArgs {
  LoraView lora;  // a and b are not read
  RowGroups groups{};
  ConstMatrix x;       // [M, K]
  ConstMatrix dy;      // [M, N] in x's dtype
  ConstMatrix u;       // [M, rank] as linear_forward gave it
  ConstMatrix v;       // [M, rank] as linear_backward_input gave it
  void* da = nullptr;  // out, [lora.count, rank, K] in lora.dtype, contiguous; or null
  void* db = nullptr;  // out, [lora.count, N, rank] in lora.dtype, contiguous; or null
};
QLN_API void lora_gradients(const LoraGradientsArgs& args, const Stream& stream = {});

}  // namespace qlora_native
