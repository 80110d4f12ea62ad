// What the files of the scalar backend share.
#pragma once

#include "backend.h"

namespace qlora_native::reference {

// Element i of an array of `dtype`, from and to fp32 (reference.cpp).
float load(const void* data, DType dtype, std::int64_t i);
void store(void* data, DType dtype, std::int64_t i, float value);

void attention(const AttentionArgs& args, const Stream&);  // reference_attention.cpp, as the next two
void attention_backward(const AttentionBackwardArgs& args, const Stream&);
void rotary(const RotaryArgs& args, const Stream&);
void cross_entropy(const CrossEntropyArgs& args, const Stream&);        // reference_cross_entropy.cpp
void gated_activation(const GatedActivationArgs& args, const Stream&);  // reference_elementwise.cpp, as the next three
void gated_activation_backward(const GatedActivationBackwardArgs& args, const Stream&);
void rms_norm(const RmsNormArgs& args, const Stream&);
void rms_norm_backward(const RmsNormBackwardArgs& args, const Stream&);
void optimizer_8bit_step(const Optimizer8bitArgs& args, const Stream&);  // reference_optimizer.cpp

}  // namespace qlora_native::reference
