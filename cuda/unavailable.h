// The table of a backend that this build does not have: the same functions, all of which throw what kReason() returns.
#pragma once

#include "backend.h"
#include "qlora_native/error.h"

namespace qlora_native {

template <auto kReason, class Args>
void unavailable(const Args&, const Stream&) {
  throw Unavailable(kReason());
}

template <auto kReason>
constexpr Backend kUnavailableBackend = {
    .quantize = unavailable<kReason, QuantizeArgs>,
    .quantize_absmax = unavailable<kReason, QuantizeAbsmaxArgs>,
    .dequantize = unavailable<kReason, DequantizeArgs>,
    .linear_forward = unavailable<kReason, LinearForwardArgs>,
    .linear_backward_input = unavailable<kReason, LinearBackwardInputArgs>,
    .lora_gradients = unavailable<kReason, LoraGradientsArgs>,
    .adamw_8bit_step = unavailable<kReason, AdamW8bitArgs>,
};

}  // namespace qlora_native
