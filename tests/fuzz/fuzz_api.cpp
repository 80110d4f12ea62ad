// Calls the public C++ API with shapes, strides, settings and pointers from the input, as a caller could get them
// wrong. Every pointer has exactly the memory that its comment promises for these fields, so AddressSanitizer finds any
// access beyond it. A call must work, or throw Error and write nothing.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "common/float16.h"
#include "fuzz.h"
#include "qlora_native/qlora_native.h"

namespace qn = qlora_native;

namespace {

using Wide = __int128;  // holds every product of two fields

// The bytes of an input one after another, then zeros: those choose nothing unusual.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  int below(int n) { return byte() % n; }
  bool rarely() { return byte() >= 248; }
  // An extent of a matrix: small, seldom larger, rarely one that no matrix has.
  std::int64_t extent(int min = 1) {
    const int b = byte();
    return b < 240 ? min + b % 24 : b < 248 ? 40 + 9 * (b - 240) : hostile();
  }
  std::int64_t hostile() {
    constexpr std::int64_t kValues[] = {-1,        0,         std::numeric_limits<std::int64_t>::min(),
                                        1LL << 31, 1LL << 32, std::numeric_limits<std::int64_t>::max(),
                                        1LL << 60, -64,       3037000500};  // whose square is beyond 2^63
    return kValues[below(std::size(kValues))];
  }
  int hostile_int() {
    constexpr int kValues[] = {
        0, -1, 3, 48, 16, 8192, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()};
    return kValues[below(std::size(kValues))];
  }
  qn::DType dtype() {
    constexpr qn::DType kValues[] = {qn::DType::f32, qn::DType::bf16, qn::DType::f16};
    return rarely() ? static_cast<qn::DType>(byte()) : kValues[below(3)];
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

// What the arguments of one call point to.
class Memory {
 public:
  explicit Memory(Input& input) : input_(input), random_(input.byte()) {}

  // Values of a dtype in [-1, 1), or whatever bytes; rarely a null pointer.
  void* values(Wide count, qn::DType dtype) {
    const std::size_t size = qn::size_of(dtype);
    std::byte* const data = give(count, size);
    const bool is_wild = input_.rarely();
    for (std::size_t i = 0; data != nullptr && i < blocks_.back().bytes / size; ++i) {
      const float value = static_cast<float>(static_cast<std::int32_t>(next())) * 0x1p-31f;
      const std::uint16_t half = dtype == qn::DType::bf16 ? qn::bf16_from_f32(value) : qn::f16_from_f32(value);
      const auto bits = static_cast<std::uint32_t>(next());
      std::memcpy(data + i * size,
                  is_wild     ? static_cast<const void*>(&bits)
                  : size == 4 ? static_cast<const void*>(&value)
                              : &half,
                  size);
    }
    return data;
  }
  float* floats(Wide count) { return static_cast<float*>(values(count, qn::DType::f32)); }
  std::uint8_t* bytes(Wide count) {
    std::byte* const data = give(count, 1);
    for (std::size_t i = 0; data != nullptr && i < blocks_.back().bytes; ++i) data[i] = static_cast<std::byte>(next());
    return reinterpret_cast<std::uint8_t*>(data);
  }
  std::int64_t* integer(std::int64_t value) {
    std::byte* const data = give(1, sizeof(value));
    if (data != nullptr) std::memcpy(data, &value, sizeof(value));
    return reinterpret_cast<std::int64_t*>(data);
  }

  // Whether the arguments promise more memory than this program has. Then the call may be made only if it must be
  // refused, because sizes overflow.
  bool is_lacking() const { return is_lacking_; }
  bool overflows() const { return overflows_; }

  std::vector<std::byte> copy() const {
    std::vector<std::byte> all;
    for (const Block& block : blocks_) all.insert(all.end(), block.data.get(), block.data.get() + block.bytes);
    return all;
  }

 private:
  struct Block {
    std::unique_ptr<std::byte[]> data;
    std::size_t bytes;
  };

  std::byte* give(Wide count, std::size_t size) {
    constexpr Wide kMaxBytes = 1 << 18, kMaxElements = Wide{1} << 60;
    if (input_.rarely()) return nullptr;
    count = std::max<Wide>(count, 0);
    if (count > kMaxBytes / static_cast<Wide>(size)) {
      is_lacking_ = true;
      overflows_ |= count >= kMaxElements;
      count = 0;
    }
    const std::size_t bytes = static_cast<std::size_t>(count) * size;
    blocks_.push_back({std::unique_ptr<std::byte[]>(new std::byte[bytes]()), bytes});
    return blocks_.back().data.get();
  }
  std::uint64_t next() { return random_ = random_ * 6364136223846793005u + 1442695040888963407u, random_ >> 32; }

  Input& input_;
  std::uint64_t random_;
  std::vector<Block> blocks_;
  bool is_lacking_ = false, overflows_ = false;
};

[[noreturn]] void found(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

template <class Function>
void call(const Memory& memory, Function&& function) {
  if (memory.is_lacking() && !memory.overflows()) {
    outcome = "not called";
    return;
  }
  const std::vector<std::byte> before = memory.copy();
  try {
    function();
  } catch (const qn::Error& error) {
    outcome = error.what();
    if (memory.copy() != before) found("a call that was refused has written");
    return;
  }
  if (memory.overflows()) found("sizes that overflow were accepted");
}

// ---- arguments ----

template <class Matrix>
Matrix draw_matrix(Input& input, Memory& memory, std::int64_t rows, std::int64_t cols, qn::DType dtype) {
  constexpr std::int64_t kLarge = 1LL << 61;
  Matrix matrix{.dtype = dtype, .rows = rows, .cols = cols};
  if (input.rarely()) matrix.rows = input.hostile();
  if (input.rarely()) matrix.cols = input.hostile();
  if (input.rarely()) matrix.dtype = input.dtype();
  matrix.stride = input.rarely() ? input.hostile() : matrix.cols < kLarge ? matrix.cols + input.below(4) : matrix.cols;
  const bool any = matrix.rows > 0 && matrix.cols > 0;
  matrix.data = memory.values(any ? Wide{matrix.rows - 1} * matrix.stride + matrix.cols : 0, matrix.dtype);
  return matrix;
}

Wide ceil_div(Wide a, Wide b) { return b > 0 ? (a + b - 1) / b : 0; }

int draw_blocksize(Input& input) { return input.rarely() ? input.hostile_int() : 16 << input.below(4); }

qn::QuantizedWeightView draw_weight(Input& input, Memory& memory, std::int64_t N, std::int64_t K) {
  qn::QuantizedWeightView view{.N = N, .K = K};
  view.bits = input.rarely() ? input.hostile_int() : 4 + 4 * input.below(2);
  view.blocksize = draw_blocksize(input);
  constexpr Wide kLarge = Wide{1} << 100;
  const Wide elements = std::clamp(Wide{N} * K, -kLarge, kLarge), blocks = ceil_div(elements, view.blocksize);
  view.codes = memory.bytes(ceil_div(elements * std::clamp(view.bits, 0, 64), 8));
  view.code = memory.floats(16);
  if (input.below(2) == 1) {
    view.nested_blocksize = input.rarely() ? input.hostile_int() : 1 << input.below(9);
    view.nested_absmax = memory.floats(ceil_div(blocks, view.nested_blocksize));
  }
  if (view.nested_absmax == nullptr) {
    view.absmax = memory.floats(blocks);
    return view;
  }
  view.absmax = memory.bytes(blocks);
  view.nested_code = memory.floats(256);
  view.offset = memory.floats(1);
  return view;
}

struct Shape {
  std::int64_t M, N, K, rank;
};
Shape draw_shape(Input& input) {
  return {.M = input.extent(0), .N = input.extent(), .K = input.extent(), .rank = input.below(2) * input.extent(0)};
}

qn::LoraView draw_lora(Input& input, Memory& memory, const Shape& shape) {
  qn::LoraView lora{.rank = shape.rank, .dtype = input.dtype()};
  lora.a = memory.values(Wide{shape.rank} * shape.K, lora.dtype);
  lora.b = memory.values(Wide{shape.N} * shape.rank, lora.dtype);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kValues[] = {0.5f, 0.0f, 1.0f, -0.25f, kInfinity, std::numeric_limits<float>::quiet_NaN(), 0.999999f};
  lora.scaling = kValues[input.below(std::size(kValues))];
  lora.dropout = input.below(3) == 0 ? 0.0f : kValues[input.below(std::size(kValues))];
  lora.seed = input.byte();
  return lora;
}

// ---- calls ----

void quantize(Input& input, Memory& memory) {
  qn::QuantizeArgs args{.dtype = input.dtype(), .elements = input.byte() * input.byte() % 5000};
  if (input.rarely()) args.elements = input.hostile();
  args.bits = input.rarely() ? input.hostile_int() : 4 + 4 * input.below(2);
  args.blocksize = draw_blocksize(input);
  args.weight = memory.values(args.elements, args.dtype);
  args.code = input.below(2) == 0 ? qn::codebook("nf4").data() : memory.floats(16);
  args.codes = memory.bytes(ceil_div(Wide{args.elements} * std::clamp(args.bits, 0, 64), 8));
  args.absmax = memory.floats(ceil_div(args.elements, args.blocksize));
  qn::NonFinite non_finite;
  args.non_finite = input.rarely() ? nullptr : &non_finite;
  call(memory, [&] { qn::quantize(args); });
}

void quantize_microscaled(Input& input, Memory& memory) {
  qn::QuantizeMicroscaledArgs args{.dtype = input.dtype(), .elements = input.byte() * input.byte() % 5000};
  if (input.rarely()) args.elements = input.hostile();
  args.blocksize = input.rarely() ? input.hostile_int() : 16 << input.below(2);
  args.weight = memory.values(args.elements, args.dtype);
  args.codes = memory.bytes(ceil_div(args.elements, 2));
  args.scales = memory.bytes(ceil_div(args.elements, args.blocksize));
  args.nested_code = memory.floats(256);
  qn::NonFinite non_finite;
  args.non_finite = input.rarely() ? nullptr : &non_finite;
  call(memory, [&] { qn::quantize_microscaled(args); });
}

void quantize_absmax(Input& input, Memory& memory) {
  qn::QuantizeAbsmaxArgs args{.blocks = input.byte() * 3};
  if (input.rarely()) args.blocks = input.hostile();
  args.nested_blocksize = input.rarely() ? input.hostile_int() : 1 << input.below(9);
  args.absmax = memory.floats(args.blocks);
  args.nested_code = input.below(2) == 0 ? qn::dynamic_map().data() : memory.floats(256);
  args.codes = memory.bytes(args.blocks);
  args.nested_absmax = memory.floats(ceil_div(args.blocks, args.nested_blocksize));
  args.offset = memory.floats(1);
  call(memory, [&] { qn::quantize_absmax(args); });
}

void dequantize(Input& input, Memory& memory) {
  const std::int64_t N = input.extent(), K = input.extent();
  const qn::DType dtype = input.dtype();
  const qn::DequantizeArgs args{
      .weight = draw_weight(input, memory, N, K), .dtype = dtype, .out = memory.values(Wide{N} * K, dtype)};
  call(memory, [&] { qn::dequantize(args); });
}

void check_quantized_weight(Input& input, Memory& memory) {
  const std::int64_t N = input.extent(), K = input.extent();
  const qn::QuantizedWeightView view = draw_weight(input, memory, N, K);
  call(memory, [&] { qn::check_quantized_weight(view); });
}

void linear_forward(Input& input, Memory& memory) {
  const Shape shape = draw_shape(input);
  const qn::DType dtype = input.dtype();
  qn::LinearForwardArgs args{.weight = draw_weight(input, memory, shape.N, shape.K),
                             .lora = draw_lora(input, memory, shape),
                             .x = draw_matrix<qn::ConstMatrix>(input, memory, shape.M, shape.K, dtype),
                             .y = draw_matrix<qn::Matrix>(input, memory, shape.M, shape.N, dtype)};
  if (input.below(2) == 1) args.bias = memory.values(shape.N, dtype);
  if (input.below(2) == 1) args.u = draw_matrix<qn::Matrix>(input, memory, shape.M, shape.rank, dtype);
  call(memory, [&] { qn::linear_forward(args); });
}

void linear_backward_input(Input& input, Memory& memory) {
  const Shape shape = draw_shape(input);
  const qn::DType dtype = input.dtype();
  qn::LinearBackwardInputArgs args{.weight = draw_weight(input, memory, shape.N, shape.K),
                                   .lora = draw_lora(input, memory, shape),
                                   .dy = draw_matrix<qn::ConstMatrix>(input, memory, shape.M, shape.N, dtype)};
  if (input.below(4) > 0) args.dx = draw_matrix<qn::Matrix>(input, memory, shape.M, shape.K, dtype);
  if (input.below(2) == 1) args.v = draw_matrix<qn::Matrix>(input, memory, shape.M, shape.rank, dtype);
  call(memory, [&] { qn::linear_backward_input(args); });
}

void lora_gradients(Input& input, Memory& memory) {
  const Shape shape = draw_shape(input);
  const qn::DType dtype = input.dtype();
  qn::LoraGradientsArgs args{.lora = draw_lora(input, memory, {.rank = shape.rank}),  // no memory for a and b
                             .x = draw_matrix<qn::ConstMatrix>(input, memory, shape.M, shape.K, dtype),
                             .dy = draw_matrix<qn::ConstMatrix>(input, memory, shape.M, shape.N, dtype),
                             .u = draw_matrix<qn::ConstMatrix>(input, memory, shape.M, shape.rank, dtype),
                             .v = draw_matrix<qn::ConstMatrix>(input, memory, shape.M, shape.rank, dtype)};
  // By the extents of the matrices, which may differ from those above.
  if (input.below(4) > 0) args.da = memory.values(Wide{shape.rank} * args.x.cols, args.lora.dtype);
  if (input.below(4) > 0) args.db = memory.values(Wide{shape.rank} * args.dy.cols, args.lora.dtype);
  call(memory, [&] { qn::lora_gradients(args); });
}

double draw_rate(Input& input) {
  constexpr double kValues[] = {0.0,  0.9, 0.999, 1e-8, 0.01, 1.0, -0.1, std::numeric_limits<double>::quiet_NaN(),
                                1e300};
  return kValues[input.below(std::size(kValues))];
}

void optimizer_8bit_step(Input& input, Memory& memory) {
  std::vector<qn::Optimizer8bitGroup> groups(static_cast<std::size_t>(input.below(3)));
  for (qn::Optimizer8bitGroup& group : groups) {
    if (input.below(4) == 1) group = {draw_rate(input), draw_rate(input), draw_rate(input), draw_rate(input)};
    if (input.below(4) == 1) group.device_lr = memory.floats(1);
  }
  std::vector<qn::Optimizer8bitTensor> tensors(static_cast<std::size_t>(input.below(4)));
  for (qn::Optimizer8bitTensor& tensor : tensors) {
    tensor = {.param_dtype = input.dtype(), .grad_dtype = input.dtype(), .elements = 7 * input.byte() % 1000};
    if (input.rarely()) tensor.elements = input.hostile();
    tensor.param = memory.values(tensor.elements, tensor.param_dtype);
    tensor.grad = memory.values(tensor.elements, tensor.grad_dtype);
    const Wide blocks = ceil_div(tensor.elements, qn::kOptimizer8bitBlocksize);
    if (input.below(2) == 0) {
      tensor.absmax1 = memory.floats(blocks);
      tensor.absmax2 = memory.floats(blocks);
    }
    const bool in_8bit = tensor.absmax1 != nullptr;
    for (void** state : {&tensor.state1, &tensor.state2})
      *state = in_8bit ? static_cast<void*>(memory.bytes(tensor.elements)) : memory.floats(tensor.elements);
    tensor.step = memory.integer(input.rarely() ? input.hostile() : input.below(4) * 1000);
    tensor.group = input.rarely() ? input.hostile_int() : input.below(2);
  }
  qn::Optimizer8bitArgs args{.tensors = tensors.data(),
                             .count = input.rarely() ? -1 : static_cast<std::int64_t>(tensors.size()),
                             .groups = groups.data(),
                             .group_count = input.rarely() ? -1 : static_cast<int>(groups.size())};
  if (input.below(2) == 1) args.inv_scale = memory.floats(1);
  if (input.below(4) == 1) args.found_inf = memory.floats(1);
  args.skipped = memory.integer(0);
  // Last, so that an input from before there were algorithms means what it meant.
  args.algorithm =
      input.rarely() ? static_cast<qn::Algorithm>(input.hostile_int()) : static_cast<qn::Algorithm>(input.below(3));
  for (qn::Optimizer8bitTensor& tensor : tensors) {
    if (args.algorithm != qn::Algorithm::ademamix || input.below(8) == 1) continue;
    const bool in_8bit = tensor.absmax1 != nullptr;
    tensor.state3 = in_8bit ? static_cast<void*>(memory.bytes(tensor.elements)) : memory.floats(tensor.elements);
    if (in_8bit) tensor.absmax3 = memory.floats(ceil_div(tensor.elements, qn::kOptimizer8bitBlocksize));
  }
  for (qn::Optimizer8bitGroup& group : groups) {
    if (input.below(4) != 1) continue;
    group.beta3 = draw_rate(input);
    group.alpha = draw_rate(input);
    group.t_alpha = draw_rate(input);
    group.t_beta3 = draw_rate(input);
  }
  call(memory, [&] { qn::optimizer_8bit_step(args); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr void (*kCalls[])(Input&, Memory&) = {quantize,
                                                 quantize_absmax,
                                                 dequantize,
                                                 check_quantized_weight,
                                                 linear_forward,
                                                 linear_backward_input,
                                                 lora_gradients,
                                                 optimizer_8bit_step,
                                                 quantize_microscaled};
  Input input(data, size);
  const auto operation = kCalls[input.below(std::size(kCalls))];
  Memory memory(input);
  operation(input, memory);
  return 0;
}
