// The vocabulary of the library: element types, devices, and views of the caller's memory, which is memory of the
// stream's device (Stream). Nothing here owns memory. Every matrix is row-major; a stride counts elements.
#pragma once

#include <cstddef>
#include <cstdint>

// A shared library of qlora_native exports everything that is declared with QLN_API, and nothing else.
#define QLN_API [[gnu::visibility("default")]]

namespace qlora_native {

enum class DType : std::int8_t { f32, bf16, f16 };

constexpr std::size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
constexpr const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "float32" : dtype == DType::bf16 ? "bfloat16" : "float16";
}

enum class Device : std::int8_t { cpu, cuda };

// Where and in which order an operation runs. `handle` is a cudaStream_t on cuda; on cpu it is not used.
//
// The arguments of an operation point to memory of that device. On cuda this is memory that its kernels can read: from
// cudaMalloc, cudaMallocManaged or a mapped cudaHostAlloc. Pointers to the host's memory are marked as such where they
// are declared.
struct Stream {
  Device device = Device::cpu;
  int index = 0;
  void* handle = nullptr;
};

// A matrix [rows, cols] in the caller's memory; element (i,j) is data[i * stride + j].
template <class Pointer>
struct BasicMatrix {
  Pointer data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;  // elements from one row to the next, >= cols
};
using ConstMatrix = BasicMatrix<const void*>;
using Matrix = BasicMatrix<void*>;

// The default number of scales that share one nested scale, which is bitsandbytes'.
constexpr int kNestedBlocksize = 256;

// What a code of 8 bits stands for before it is scaled.
enum class ByteFormat : std::int8_t {
  absmax_int8,  // a signed byte, whose unit is scale / 127
  int8,         // a signed byte
  e4m3,  // FP8 E4M3 with a sign and without infinity; 0x7F and 0xFF are NaN (OCP 8-bit Floating Point, rev. 1.0),
         // and check_quantized_weight() refuses them: what a product makes of them is not defined. Its scales are below
         // 2^120.
};

// A quantized weight W[N,K]; or `count` weights of one shape, one after another, like the experts of a mixture:
// W[count,N,K]. The layout is bitsandbytes', with more ways to store scales. Element (n,k) of weight i has the flat
// index e = (i*N + n)*K + k. The elements of block e / blocksize share a scale, and a minimum in formats that have one,
// so blocks straddle rows if K is not a multiple of the blocksize:
//
//   w = level * scale + minimum
//
//   bits == 4   codes[e/2] holds element e in its high nibble if e is even, in its low one if e is odd;
//               level = code[nibble]
//   bits == 8   codes[e] is a byte, and byte_format says what its level is
//
// The scale of block b is
//
//   absmax[b], of scale_dtype                                                    or, with nested_absmax,
//   nested_code[absmax[b]] * nested_absmax[b / nested_blocksize] + offset        where absmax[b] is a byte
//
// The second form is double quantization (QLoRA, section 3), and that of GGUF's K-quants. The minimum of block b is
//
//   minimum[b], of scale_dtype                                                   or, with nested_minimum,
//   nested_code[minimum[b]] * nested_minimum[b / nested_blocksize]               where minimum[b] is a byte; or
//   -(zero_point[b] * scale), so that w = (level - zero_point[b]) * scale
//
// All arithmetic is fp32, each operation rounded by itself; where nothing is added the sign of a zero stays. Beside a
// minimum level * scale is exact: a scale that is no byte has 16 bits, and one that is a byte has a nested scale of at
// most 11 binary digits, as GGUF's are, or the sum may be off by its last bit.
struct QuantizedWeightView {
  std::int64_t N = 0;
  std::int64_t K = 0;
  std::int64_t count = 1;
  int bits = 4;
  int blocksize = 64;                                // a power of two, 16 ... 4096; of E4M3 32 ... 4096
  ByteFormat byte_format = ByteFormat::absmax_int8;  // not used with 4 bits
  DType scale_dtype = DType::f32;                    // of absmax and of minimum, where these are not bytes
  const std::uint8_t* codes = nullptr;               // [ceil(count*N*K * bits / 8)]
  const void* absmax = nullptr;                      // [blocks] of scale_dtype, or of uint8 if nested_absmax is given
  const float* code = nullptr;                       // [16]; not used with 8 bits
  const float* nested_absmax = nullptr;              // [ceil(blocks / nested_blocksize)] or null
  const float* nested_code = nullptr;                // [256], with nested_absmax
  const float* offset = nullptr;                     // [1], with nested_absmax
  int nested_blocksize = kNestedBlocksize;
  const void* minimum = nullptr;          // [blocks] of scale_dtype, or of uint8 if nested_minimum is given; or null
  const float* nested_minimum = nullptr;  // [ceil(blocks / nested_blocksize)], with nested_absmax and minimum; or null
  const std::int8_t* zero_point = nullptr;  // [blocks], without minimum; or null

  constexpr std::int64_t elements() const { return count * N * K; }
  constexpr std::int64_t blocks() const { return (elements() + blocksize - 1) / blocksize; }
  constexpr bool has_minimum() const { return minimum != nullptr || zero_point != nullptr; }
};

}  // namespace qlora_native
