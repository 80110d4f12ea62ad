// Guards the checks of arguments: each bad one is an Error that names it and what was expected, and nothing is written.
// The checks that operations share (a matrix, a weight, an adapter) are tested with one of them.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "expect_refused.h"
#include "layer.h"
#include "parameter.h"
#include "qlora_native/qlora_native.h"

namespace {

// A change of the arguments of an operation, and the argument that its error names: BAD(field, value) is that of one
// field, which the error names or, by BAD_FOR(argument, field, value), another argument.
template <class Args>
struct Bad {
  std::string argument;
  std::function<void(Args&)> change;
};
#define BAD_FOR(argument, field, value) {argument, [&](auto& args) { args.field = value; }}
#define BAD(field, value) BAD_FOR(#field, field, value)

using ::expect_refused;
template <class Args>
void expect_refused(const Args& args, void (*operation)(const Args&, const qn::Stream&),
                    const std::vector<Bad<Args>>& all) {
  for (const Bad<Args>& bad : all) {
    Args changed = args;
    bad.change(changed);
    expect_refused(bad.argument, [&] { operation(changed, {}); });
  }
}

bool all_untouched(const std::vector<char>& bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [&](char byte) { return byte == bytes[0]; });
}
constexpr std::int64_t kHuge = std::int64_t{1} << 61;
constexpr DType kNoDType = static_cast<DType>(9);

TEST(quantization_names_a_bad_argument) {
  const Tensor weight = random_weight(5, 63);
  std::vector<std::uint8_t> codes(512, 9);
  std::vector<float> scales(512, 9.0f);
  static float not_finite[16] = {0.0f, NAN};
  qn::NonFinite non_finite;
  expect_refused(qn::QuantizeArgs{.weight = weight.data(),
                                  .elements = 315,
                                  .code = qn::codebook("nf4").data(),
                                  .codes = codes.data(),
                                  .absmax = scales.data(),
                                  .non_finite = &non_finite},
                 qn::quantize,
                 {BAD(elements, -1), BAD(dtype, kNoDType), BAD(bits, 5), BAD(blocksize, 16), BAD(blocksize, 96),
                  BAD(weight, nullptr), BAD(codes, nullptr), BAD(absmax, nullptr), BAD(code, nullptr),
                  BAD(code, not_finite), BAD(non_finite, nullptr)});
  expect_refused("format", [] { qn::codebook("nf5"); });

  expect_refused(qn::QuantizeAbsmaxArgs{.absmax = scales.data(),
                                        .blocks = 5,
                                        .nested_code = qn::dynamic_map().data(),
                                        .codes = codes.data(),
                                        .nested_absmax = scales.data(),
                                        .offset = scales.data()},
                 qn::quantize_absmax,
                 {BAD(blocks, -1), BAD(nested_blocksize, 0), BAD(absmax, nullptr), BAD(nested_code, nullptr),
                  BAD(codes, nullptr), BAD(nested_absmax, nullptr), BAD(offset, nullptr)});

  expect_refused(qn::QuantizeMicroscaledArgs{.weight = weight.data(),
                                             .elements = 315,
                                             .blocksize = 32,
                                             .codes = codes.data(),
                                             .scales = codes.data(),
                                             .nested_code = scales.data(),
                                             .non_finite = &non_finite},
                 qn::quantize_microscaled,
                 {BAD(elements, -1), BAD(blocksize, 64), BAD(weight, nullptr), BAD(codes, nullptr),
                  BAD(scales, nullptr), BAD(nested_code, nullptr), BAD(non_finite, nullptr)});

  const Quantized quantized(weight.in(), format_named("nf4"), 64, true);
  Tensor out(DType::f32, 5, 63);
  expect_refused(qn::DequantizeArgs{.weight = quantized.view(), .out = out.data()}, qn::dequantize,
                 {BAD(weight.N, 0), BAD(weight.N, kHuge), BAD(weight.K, 0), BAD(weight.bits, 3),
                  BAD(weight.blocksize, 48), BAD(weight.blocksize, 8192), BAD(weight.codes, nullptr),
                  BAD(weight.absmax, nullptr), BAD(weight.code, nullptr), BAD(weight.nested_blocksize, 0),
                  BAD(weight.nested_code, nullptr), BAD(weight.offset, nullptr), BAD(out, nullptr)});
  const std::int64_t beyond[] = {0, 4096};
  expect_refused(qn::DequantizeArgs{quantized.view(), DType::f32, beyond, 2, out.data()}, qn::dequantize,
                 {BAD_FOR("rows", row_count, 2), BAD(row_count, -1)});
  EXPECT(std::all_of(codes.begin(), codes.end(), [](std::uint8_t code) { return code == 9; }));
  EXPECT(std::all_of(scales.begin(), scales.end(), [](float scale) { return scale == 9.0f; }));
  EXPECT(all_untouched(out.bytes()));
}

TEST(product_names_a_bad_argument) {
  Layer layer({.M = 5, .N = 6, .K = 63, .dtype = DType::f32, .rank = 2});
  expect_refused(layer.forward_args(), qn::linear_forward,
                 {BAD(weight.N, 0), BAD_FOR("x", x.cols, 64), BAD(x.rows, -1), BAD(x.stride, 62), BAD(x.data, nullptr),
                  BAD(x.dtype, kNoDType), BAD_FOR("y", y.rows, 4), BAD(y.dtype, DType::f16), BAD_FOR("u", u.cols, 3),
                  BAD(lora.a, nullptr), BAD(lora.b, nullptr), BAD(lora.rank, -1), BAD(lora.dtype, kNoDType),
                  BAD(lora.scaling, NAN), BAD(lora.dropout, 1.0f), BAD(lora.dropout, -0.1f), BAD(groups.count, -1),
                  BAD_FOR("groups.offsets", groups.count, 2)});
  const auto expect_groups_refused = [&](const char* argument, std::int64_t weights, std::int64_t adapters,
                                         std::vector<std::int64_t> offsets) {
    qn::LinearForwardArgs args = layer.forward_args();
    args.groups = {.count = 2, .offsets = offsets.data()};
    args.weight.count = weights;
    args.weight.N = args.y.cols = 6 / weights;  // the weight's memory holds 6 rows
    args.lora.count = adapters;
    expect_refused(argument, [&] { qn::linear_forward(args); });
  };
  expect_groups_refused("weight.count", 3, 1, {0, 2, 5});
  expect_groups_refused("lora.count", 1, 3, {0, 2, 5});
  expect_groups_refused("groups.offsets[0]", 2, 2, {1, 2, 5});
  expect_groups_refused("groups.offsets[0]", 1, 2, {-1, 2, 5});
  expect_groups_refused("groups.offsets[1]", 1, 2, {3, 2, 5});
  expect_groups_refused("groups.offsets[2]", 1, 2, {0, 2, 6});
  expect_groups_refused("groups.offsets[2]", 2, 2, {0, 2, 4});

  expect_refused(layer.backward_args(), qn::linear_backward_input,
                 {BAD(weight.N, 0), BAD_FOR("dy", dy.cols, 7), BAD(dy.rows, -1), BAD_FOR("dx", dx.cols, 62),
                  BAD(dx.dtype, DType::bf16), BAD_FOR("v", v.rows, 4), BAD(lora.a, nullptr), BAD(lora.b, nullptr),
                  BAD(lora.rank, -1), BAD(groups.count, -1)});

  expect_refused(layer.gradients_args(), qn::lora_gradients,
                 {BAD(x.rows, -1), BAD(x.cols, 0), BAD(x.data, nullptr), BAD_FOR("dy", dy.rows, 4), BAD(dy.cols, 0),
                  BAD(u.data, nullptr), BAD(v.stride, 1), BAD(lora.dropout, -0.1f), BAD(groups.count, -1)});
  for (const Tensor* tensor : {&layer.y, &layer.u, &layer.dx, &layer.v, &layer.da, &layer.db})
    EXPECT(all_untouched(tensor->bytes()));
}

TEST(loss_names_a_bad_argument) {
  Tensor out(DType::f32, 2, 5);
  const std::int64_t labels[] = {0, 4};
  expect_refused(
      qn::CrossEntropyArgs{
          .logits = out.out(), .labels = labels, .gradient = true, .loss = static_cast<float*>(out.data())},
      qn::cross_entropy,
      {BAD(logits.rows, -1), BAD(logits.cols, 0), BAD(logits.stride, 4), BAD(labels, nullptr),
       BAD_FOR("labels", logits.cols, 4), BAD(loss, nullptr), BAD(scale, INFINITY), BAD(softcap, -1.0f),
       BAD(label_smoothing, 1.5f), BAD(z_loss, -0.5f)});
  EXPECT(all_untouched(out.bytes()));
}

TEST(optimizer_names_a_bad_argument) {
  struct Call : Optimizer {
    qn::Optimizer8bitArgs call = args();
  };
  static float negative_lr = -1e-3f;
  static std::int64_t negative_step = -1;
  const qn::Optimizer8bitGroup logarithm_of_0{.beta1 = 0.0, .t_beta3 = 10.0};
  const auto expect_each_refused = [](const std::vector<Bad<Call>>& all) {
    for (const Bad<Call>& bad : all) {
      Call call;
      const Parameter before = call.parameters[0];
      call.call.algorithm = qn::Algorithm::ademamix;  // which has all fields
      bad.change(call);
      expect_refused(bad.argument, [&] { qn::optimizer_8bit_step(call.call); });
      EXPECT(call.parameters[0] == before);
    }
  };
  expect_each_refused({BAD_FOR("algorithm", call.algorithm, static_cast<qn::Algorithm>(3)),
                       BAD_FOR("count", call.count, -1), BAD_FOR("tensors", call.tensors, nullptr),
                       BAD_FOR("groups", call.groups, nullptr), BAD_FOR("group_count", call.group_count, -1),
                       BAD_FOR("skipped", call.skipped, nullptr)});
  expect_each_refused({BAD(groups[0].lr, -1e-3), BAD(groups[0].lr, NAN),
                       BAD_FOR("groups[0].lr", groups[0].device_lr, &negative_lr), BAD(groups[0].beta1, 1.0),
                       BAD(groups[0].beta2, -0.1), BAD(groups[0].beta3, 1.0), BAD(groups[0].eps, INFINITY),
                       BAD(groups[0].weight_decay, -1.0), BAD(groups[0].alpha, -1.0), BAD(groups[0].t_alpha, NAN),
                       BAD(groups[0].t_beta3, -1.0), BAD_FOR("groups[0].beta1", groups[0], logarithm_of_0)});
  expect_each_refused({BAD(tensors[1].group, 1), BAD(tensors[1].grad, nullptr), BAD(tensors[1].state3, nullptr),
                       BAD(tensors[0].absmax2, nullptr), BAD(tensors[0].absmax3, nullptr), BAD(tensors[0].elements, -1),
                       BAD(tensors[0].step, &negative_step)});
}

TEST(optimizer_checks_no_field_that_its_algorithm_lacks) {
  Optimizer lion;
  lion.groups[0].beta3 = 7.0, lion.groups[0].alpha = -1.0;
  for (qn::Optimizer8bitTensor& tensor : lion.tensors) tensor.state2 = tensor.absmax2 = nullptr;
  qn::Optimizer8bitArgs args = lion.args();
  args.algorithm = qn::Algorithm::lion;
  qn::optimizer_8bit_step(args);
  EXPECT(lion.parameters[0].step == 1);
}

TEST(elementwise_operation_names_a_bad_argument) {
  Tensor a(DType::f32, 2, 5), out(DType::f32, 2, 5);
  std::vector<float> r(2);
  expect_refused(qn::GatedActivationArgs{qn::Activation::silu, a.in(), a.in(), out.out()}, qn::gated_activation,
                 {BAD(activation, static_cast<qn::Activation>(7)), BAD_FOR("gate", gate.cols, 0),
                  BAD_FOR("gate", gate.rows, -1), BAD_FOR("up", up.cols, 4), BAD(h.stride, 4)});
  expect_refused(qn::GatedActivationBackwardArgs{qn::Activation::silu, a.in(), a.in(), a.in(), out.out(), out.out()},
                 qn::gated_activation_backward,
                 {BAD_FOR("dh", dh.rows, 1), BAD(dgate.data, nullptr), BAD(dup.dtype, DType::f16)});
  expect_refused(qn::RmsNormArgs{a.in(), a.data(), 0.0f, 1e-6f, out.out(), r.data()}, qn::rms_norm,
                 {BAD_FOR("x", x.cols, 0), BAD_FOR("y", y.cols, 4), BAD(weight, nullptr), BAD(shift, INFINITY),
                  BAD(eps, -1.0f), BAD(eps, NAN), BAD(r, nullptr)});
  expect_refused(qn::RmsNormBackwardArgs{a.in(), a.data(), 0.0f, a.in(), r.data(), out.out()}, qn::rms_norm_backward,
                 {BAD_FOR("dy", dy.rows, 1), BAD(dx.data, nullptr), BAD(weight, nullptr), BAD(r, nullptr)});
  EXPECT(all_untouched(out.bytes()));
}

TEST(attention_names_a_bad_argument) {
  constexpr std::int64_t kQueries = 6, kKeys = 7, kHeads = 4, kKeyHeads = 2, kDim = 8;  // two sequences
  Tensor memory(DType::f32, 2 * kKeys, kHeads * kDim), out = memory;
  const auto heads = [&](auto* data, std::int64_t count, std::int64_t rows) {
    return qn::BasicHeads<decltype(data)>{data, count, rows, rows * count * kDim, kDim, count * kDim};
  };
  const auto read = [&](std::int64_t count, std::int64_t rows) {
    return heads(static_cast<const void*>(memory.data()), count, rows);
  };
  const auto write = [&](std::int64_t count, std::int64_t rows) { return heads(out.data(), count, rows); };
  std::vector<std::int32_t> ranges;
  for (std::int64_t i = 0; i < 2 * kQueries; ++i) ranges.insert(ranges.end(), {0, 3});
  std::vector<float> lse(2 * kHeads * kQueries);
  const qn::AttentionInputs in{.dtype = DType::f32,
                               .batch = 2,
                               .head_dim = kDim,
                               .q = read(kHeads, kQueries),
                               .k = read(kKeyHeads, kKeys),
                               .v = read(kKeyHeads, kKeys),
                               .scale = 0.5f,
                               .key_ranges = ranges.data(),
                               .key_ranges_stride = 2 * kQueries};
  const qn::AttentionArgs args{in, write(kHeads, kQueries), lse.data()};
  expect_refused(
      args, qn::attention,
      {BAD_FOR("dtype", in.dtype, kNoDType), BAD_FOR("batch", in.batch, -1), BAD_FOR("head_dim", in.head_dim, 0),
       BAD_FOR("q.heads", in.q.heads, 0), BAD_FOR("q.rows", in.q.rows, -1), BAD_FOR("q.data", in.q.data, nullptr),
       BAD_FOR("q.row_stride", in.q.row_stride, 7), BAD_FOR("k.heads", in.k.heads, 3), BAD_FOR("k.rows", in.k.rows, -1),
       BAD_FOR("v", in.v.rows, 6), BAD_FOR("v", in.v.heads, 4), BAD_FOR("scale", in.scale, 0.0f),
       BAD_FOR("scale", in.scale, NAN), BAD_FOR("out", out.heads, 2), BAD(lse, nullptr)});
  for (const std::int32_t bad : {-1, 8}) {
    std::int32_t& range = ranges[2 * (kQueries + 3) + (bad > 0)];  // of query 3 of the second sequence
    const std::int32_t good = range;
    range = bad;
    expect_refused("key_ranges", [&] { qn::attention(args); });
    range = good;
  }
  expect_refused(
      qn::AttentionBackwardArgs{in, read(kHeads, kQueries), lse.data(), read(kHeads, kQueries), write(kHeads, kQueries),
                                write(kKeyHeads, kKeys), write(kKeyHeads, kKeys)},
      qn::attention_backward,
      {BAD_FOR("k.rows", in.k.rows, -1), BAD(out.data, nullptr), BAD(lse, nullptr), BAD_FOR("dout", dout.rows, 5),
       BAD(dq.row_stride, 1), BAD_FOR("dk", dk.heads, 4), BAD(dv.data, nullptr)});
  expect_refused(qn::RotaryArgs{.dtype = DType::f32,
                                .batch = 2,
                                .head_dim = kDim,
                                .x = read(kHeads, kQueries),
                                .cos = memory.data(),
                                .sin = memory.data(),
                                .y = write(kHeads, kQueries)},
                 qn::rotary,
                 {BAD(head_dim, 7), BAD(x.rows, -1), BAD(x.data, nullptr), BAD(cos, nullptr), BAD(sin, nullptr),
                  BAD_FOR("y", y.heads, 1)});
  EXPECT(all_untouched(out.bytes()));
}

// check_quantized_weight() checks the contents of a double-quantized weight when it is loaded: each table in turn holds
// a value that is not finite, or values that only decode to one.
TEST(table_of_a_weight_that_is_not_finite_is_named) {
  const Quantized good(random_weight(53, 131).in(), format_named("nf4"), 32, true);
  const auto check = [&](auto edit) {
    Quantized weight = good;
    edit(weight);
    qn::check_quantized_weight(weight.view());
  };
  check([](Quantized&) {});
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    expect_refused("weight.nested_absmax", [&] { check([&](Quantized& weight) { weight.nested_absmax[0] = bad; }); });
    expect_refused("weight.offset", [&] { check([&](Quantized& weight) { weight.offset = bad; }); });
    expect_refused("weight.nested_code",
                   [&] { check([&](Quantized& weight) { weight.nested_code[weight.absmax_codes.back()] = bad; }); });
  }
  expect_refused("weight.absmax", [&] {
    check([](Quantized& weight) {
      weight.nested_absmax[0] = 3e38f;
      weight.nested_code[weight.absmax_codes[0]] = 2.0f;
    });
  });
  check([](Quantized& weight) {  // allowed: a level that no scale uses, and scales below 0 by double quantization
    std::replace(weight.absmax_codes.begin(), weight.absmax_codes.end(), std::uint8_t{255}, std::uint8_t{254});
    weight.nested_code[255] = 3e38f;
    weight.offset = -1.0f;
    weight.nested_absmax[0] = 100.0f;
  });
}

// The length is no multiple of a vector and exceeds a chunk of the check.
TEST(scale_that_is_not_finite_is_named_with_its_place) {
  std::vector<std::uint8_t> codes(5003 * 16);
  std::vector<float> scales(5003, 1.0f);
  const qn::QuantizedWeightView view{.N = 5003,
                                     .K = 32,
                                     .blocksize = 32,
                                     .codes = codes.data(),
                                     .absmax = scales.data(),
                                     .code = qn::codebook("nf4").data()};
  scales[7] = std::numeric_limits<float>::max();
  scales[8] = -std::numeric_limits<float>::denorm_min();
  qn::check_quantized_weight(view);
  for (const std::size_t place : {0, 17, 4095, 4096, 5002}) {
    for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
      scales[place] = bad;
      try {
        qn::check_quantized_weight(view);
        EXPECT(false);
      } catch (const qn::Error& error) {
        EXPECT(error.argument() == "weight.absmax");
        EXPECT(std::string(error.what()).ends_with(" at " + std::to_string(place)));
      }
    }
    scales[place] = 1.0f;
  }
}

}  // namespace

int main() { return run_tests(); }
