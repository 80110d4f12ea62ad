// quantize: a subwarp finds the largest element of a block of the weight, then writes the block's codes. It has a lane
// for each eight elements of the block, up to a warp. The weight is read once, except for blocks of more than 256
// elements, which are read from the L1 cache again.
#include "common/layout.h"
#include "device/elements.cuh"
#include "device/weight_chunk.cuh"
#include "quantize/nearest_code.cuh"
#include "runtime/operations.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;
// The resident blocks of an SM, with 48 registers a thread. While one block waits for its loads, others compute.
constexpr int kBlocksPerSm = 5;

__device__ void report(NonFinite* non_finite, std::int64_t element) {
  // `first` begins as -1 (none), which is the largest unsigned number, so that any index is less.
  atomic_add(reinterpret_cast<std::uint64_t*>(&non_finite->count), 1);
  atomic_min(reinterpret_cast<std::uint64_t*>(&non_finite->first), static_cast<std::uint64_t>(element));
}

__device__ __forceinline__ bool is_finite(float value) { return value - value == 0.0f; }

// Encodes eight elements in [-1, 1], up to a rounding error; the codes are in the order in which they are stored.
template <int kBits>
class Encoder;
template <>
class Encoder<4> {
 public:
  using Codes = Vector<std::uint32_t, 1>;
  static constexpr std::size_t kSmemBytes = sizeof(NearestCodes::Table);
  // To be called by all threads of a block. Its shared memory becomes the table.
  __device__ explicit Encoder(const float* code) : nearest_(filled(code)) {}
  __device__ __forceinline__ Codes operator()(const float (&t)[kVecSize]) const {
    return {{nearest_.codes_of_vec8(t)}};
  }

 private:
  __device__ static const NearestCodes::Table& filled(const float* code) {
    NearestCodes::Table& table = *dynamic_smem<NearestCodes::Table>();
    table.fill(code);
    return table;
  }
  const NearestCodes nearest_;
};
template <>
class Encoder<8> {
 public:
  using Codes = Vector<std::uint32_t, 2>;
  static constexpr std::size_t kSmemBytes = 0;
  __device__ explicit Encoder(const float*) {}
  __device__ __forceinline__ Codes operator()(const float (&t)[kVecSize]) const {
    const auto word = [&](int i) {
      const std::uint32_t low = pick_bytes(level(t[i]), level(t[i + 1]), 0x40);
      return pick_bytes(low, pick_bytes(level(t[i + 2]), level(t[i + 3]), 0x40), 0x5410);
    };
    return {{word(0), word(4)}};
  }

 private:
  // The nearest integer to 127 t, in the lowest bits.
  __device__ __forceinline__ static std::uint32_t level(float t) {
    return std::bit_cast<std::uint32_t>(t * 127.0f + CodebookBuckets::kInteger);
  }
};

// A subwarp of 2^lane_bits lanes quantizes a block of 2^block_bits elements.
struct Subwarps {
  int block_bits, lane_bits;
  std::int64_t vector_blocks;  // these first blocks are whole, and vectors load their elements and store their codes
};

// Quantizes the blocks begin ... end - 1.
template <class T, int kBits, bool kVectors>
__device__ __forceinline__ void quantize_blocks(const QuantizeArgs& args, const Subwarps& subwarps,
                                                const Encoder<kBits>& encoder, std::int64_t begin, std::int64_t end) {
  const int lane = thread_index() & ((1 << subwarps.lane_bits) - 1);
  const int chunk_elements = kVecSize << subwarps.lane_bits, block_elements = 1 << subwarps.block_bits;
  const int subwarp_of_warp = thread_index() % kWarp >> subwarps.lane_bits;
  const std::int64_t subwarp = (block_index() * kThreads + thread_index()) >> subwarps.lane_bits;
  const std::int64_t all_subwarps = grid_blocks() * kThreads >> subwarps.lane_bits;
  // All lanes of a warp take part in every iteration. Those that have no more block read the first one again.
  for (std::int64_t block = begin + subwarp; block - subwarp_of_warp < end; block += all_subwarps) {
    const bool has_block = block < end;
    const std::int64_t at = ((has_block ? block : begin) << subwarps.block_bits) + lane * kVecSize;
    const T* const weight = static_cast<const T*>(args.weight) + at;
    const std::int64_t remaining = args.elements - at;
    float w[kVecSize];
    const auto load = [&](int chunk) {
      if constexpr (kVectors) {
        load_vec8_aligned_as_f32(weight + chunk, w);
      } else {
        const T* const from = weight + in_register(static_cast<std::uint32_t>(chunk));  // one address, not eight
#pragma unroll
        for (int i = 0; i < kVecSize; ++i) w[i] = chunk + i < remaining ? to_f32(from[i]) : 0.0f;
      }
    };
    float absmax = 0.0f;
    int chunk = block_elements;
    do {
      chunk -= chunk_elements;
      load(chunk);
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) absmax = larger_or_nan(absmax, fabsf(w[i]));
    } while (chunk > 0);
    // Compared as bits, NaN is larger than infinity, and infinity larger than any number.
    absmax = std::bit_cast<float>(max_of_lanes(std::bit_cast<std::uint32_t>(absmax), 1 << subwarps.lane_bits));
    if (!has_block) continue;
    if (lane == 0) args.absmax[block] = absmax;
    if (!is_finite(absmax)) {  // no codes are written, because the caller throws
      for (; chunk < block_elements; chunk += chunk_elements) {
#pragma unroll 1
        for (int i = chunk; i < chunk + kVecSize && i < remaining; ++i) {
          if (!is_finite(to_f32(weight[i]))) report(args.non_finite, at + i);
        }
      }
      continue;
    }
    const float inverse = inverse_absmax(absmax);
    const auto codes = [&](int chunk) { return args.codes + static_cast<std::uint64_t>(at + chunk) * kBits / 8; };
    while (true) {  // w still holds the first chunk
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) w[i] *= inverse;
      const auto words = encoder(w);
      if constexpr (kVectors) {
        store_vector(reinterpret_cast<std::uint32_t*>(codes(chunk)), words);
      } else {
#pragma unroll
        for (int i = 0; i < kBits; ++i) {
          if (chunk + i * 8 / kBits < remaining)
            codes(chunk)[i] = static_cast<std::uint8_t>(byte_of(words.at[i / 4], i % 4));
        }
      }
      chunk += chunk_elements;
      if (chunk >= block_elements) break;
      load(chunk);
    }
  }
}

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    quantize_kernel(const QuantizeArgs args, const Subwarps subwarps) {
  const Encoder<kBits> encoder(args.code);
  quantize_blocks<T, kBits, true>(args, subwarps, encoder, 0, subwarps.vector_blocks);
  quantize_blocks<T, kBits, false>(args, subwarps, encoder, subwarps.vector_blocks,
                                   ceil_div(args.elements, args.blocksize));
}

}  // namespace

void quantize(const QuantizeArgs& args, const Stream& stream) {
  fill_bytes(&args.non_finite->count, 0, sizeof(args.non_finite->count), stream);
  fill_bytes(&args.non_finite->first, 0xFF, sizeof(args.non_finite->first), stream);
  const int block_bits = log2_of(args.blocksize), vector_bits = block_bits - log2_of(kVecSize);
  const bool are_vectors = is_aligned(args.weight, kVectorBytes) && is_aligned(args.codes, args.bits);
  const Subwarps subwarps{.block_bits = block_bits,
                          .lane_bits = vector_bits < log2_of(kWarp) ? vector_bits : log2_of(kWarp),
                          .vector_blocks = are_vectors ? args.elements / args.blocksize : 0};
  LaunchShape shape = looping_grid(ceil_div(args.elements, kVecSize), kThreads, stream);
  const auto launch_for = [&]<class T, int kBits>() {
    shape.smem_bytes = Encoder<kBits>::kSmemBytes;
    launch<quantize_kernel<T, kBits>>(shape, stream, args, subwarps);
  };
  with_type(args.dtype, [&]<class T>() {
    if (args.bits == 4) {
      launch_for.template operator()<T, 4>();
    } else {
      launch_for.template operator()<T, 8>();
    }
  });
}

}  // namespace qlora_native::QLN_CUDA
