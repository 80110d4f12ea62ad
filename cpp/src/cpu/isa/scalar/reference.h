// The scalar backend: every operation as its header defines it, in plain loops. It is the oracle of the other backends,
// and what runs on a processor that none of them is for. Values are rounded where the header says so. Sums are in
// double, so that the error of another backend that is compared with it is the other's.
#pragma once

#include "backend.h"
#include "common/float16.h"

namespace qlora_native::reference {

// Element i of an array of `dtype`, from and to fp32.
inline float load(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::bf16:
      return f32_from_bf16(static_cast<const std::uint16_t*>(data)[i]);
    case DType::f16:
      return f32_from_f16(static_cast<const std::uint16_t*>(data)[i]);
  }
  return 0.0f;
}

inline void store(void* data, DType dtype, std::int64_t i, float value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[i] = value;
      break;
    case DType::bf16:
      static_cast<std::uint16_t*>(data)[i] = bf16_from_f32(value);
      break;
    case DType::f16:
      static_cast<std::uint16_t*>(data)[i] = f16_from_f32(value);
      break;
  }
}

inline float round_to(DType dtype, float value) {
  switch (dtype) {
    case DType::f32:
      return value;
    case DType::bf16:
      return f32_from_bf16(bf16_from_f32(value));
    case DType::f16:
      return f32_from_f16(f16_from_f32(value));
  }
  return value;
}

template <class Pointer>
float at(const BasicMatrix<Pointer>& matrix, std::int64_t i, std::int64_t j) {
  return load(matrix.data, matrix.dtype, i * matrix.stride + j);
}

// out[0, count) = elements [first, first + count) of the flat weight, rounded to dtype.
void decode(const QuantizedWeightView& w, std::int64_t first, std::int64_t count, DType dtype, float* out);

// Each is in the reference.cpp of its room.
void quantize(const QuantizeArgs& args, const Stream&);
void quantize_absmax(const QuantizeAbsmaxArgs& args, const Stream&);
void dequantize(const DequantizeArgs& args, const Stream&);
void linear_forward(const LinearForwardArgs& args, const Stream&);
void linear_backward_input(const LinearBackwardInputArgs& args, const Stream&);
void lora_gradients(const LoraGradientsArgs& args, const Stream&);
void cross_entropy(const CrossEntropyArgs& args, const Stream&);
void gated_activation(const GatedActivationArgs& args, const Stream&);
void gated_activation_backward(const GatedActivationBackwardArgs& args, const Stream&);
void rms_norm(const RmsNormArgs& args, const Stream&);
void rms_norm_backward(const RmsNormBackwardArgs& args, const Stream&);
void attention(const AttentionArgs& args, const Stream&);
void attention_backward(const AttentionBackwardArgs& args, const Stream&);
void rotary(const RotaryArgs& args, const Stream&);
void gram(const GramArgs& args, const Stream&);
void weighted_scales(const WeightedScalesArgs& args, const Stream&);
void quantize_with_feedback(const QuantizeWithFeedbackArgs& args, const Stream&);
void optimizer_8bit_step(const Optimizer8bitArgs& args, const Stream&);

}  // namespace qlora_native::reference
