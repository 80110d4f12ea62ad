// quantize: as many lanes as a block of the weight has eights, up to a warp, find its largest element together and then
// write its codes. The second reading of the weight comes from the first cache.
#include "common/codebook.h"
#include "device/elements.cuh"
#include "kernels/kernels.h"

namespace qlora_native::QLN_CUDA {
namespace {

constexpr int kThreads = 256;

__device__ void report(NonFinite* non_finite, std::int64_t element) {
  // -1, which means none, is the largest of the unsigned.
  atomic_add(reinterpret_cast<std::uint64_t*>(&non_finite->count), 1);
  atomic_min(reinterpret_cast<std::uint64_t*>(&non_finite->first), static_cast<std::uint64_t>(element));
}

__device__ __forceinline__ bool is_finite(float value) { return value - value == 0.0f; }

// The codes of eight elements: 4 bytes of pairs, or 8 signed bytes.
__device__ __forceinline__ void encode_4bit(const SortedCodebook& codebook, const float (&t)[kEight],
                                            std::uint8_t (&codes)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    codes[i] = static_cast<std::uint8_t>(nearest_code(codebook, t[2 * i]) << 4 | nearest_code(codebook, t[2 * i + 1]));
  }
}
__device__ __forceinline__ void encode_8bit(const float (&t)[kEight], std::uint8_t (&codes)[kEight]) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const float level = is_finite(t[i] * 127.0f) ? fminf(fmaxf(rintf(t[i] * 127.0f), -127.0f), 127.0f) : 0.0f;
    codes[i] = static_cast<std::uint8_t>(static_cast<std::int8_t>(level));
  }
}

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const QuantizeArgs args) {
  SortedCodebook* const codebook = dynamic_smem<SortedCodebook>();
  if constexpr (kBits == 4) {
    if (thread_index() == 0) sort_codebook(args.code, *codebook);  // where it is to lie: no thread's own memory
    sync_threads();
  }
  const int lanes = args.blocksize < kEight * kWarp ? args.blocksize / kEight : kWarp;
  const int chunks = args.blocksize / (kEight * lanes);  // that a lane takes of one block
  const std::int64_t blocks = (args.elements + args.blocksize - 1) / args.blocksize;
  const std::int64_t team = (block_index() * block_threads() + thread_index()) / lanes;
  const std::int64_t teams = grid_blocks() * block_threads() / lanes;
  const T* const weight = static_cast<const T*>(args.weight);
  // All lanes of a warp take part in every round, those without a block too.
  for (std::int64_t round = 0; round * teams < blocks; ++round) {
    const std::int64_t block = round * teams + team;
    const std::int64_t first = block * args.blocksize + thread_index() % lanes * kEight;
    const auto load = [&](int chunk, float (&w)[kEight]) {
      const std::int64_t at = first + chunk * lanes * kEight, left = args.elements - at;
      const int count = block >= blocks || left <= 0 ? 0 : left < kEight ? static_cast<int>(left) : kEight;
      load_eight_as_f32(weight + (count > 0 ? at : 0), count, w);
      return count;
    };
    float w[kEight];
    float absmax = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int count = load(chunk, w);
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        if (is_finite(w[i])) {
          absmax = fmaxf(absmax, fabsf(w[i]));
        } else if (i < count) {
          report(args.non_finite, first + chunk * lanes * kEight + i);
        }
      }
    }
    absmax = max_of_lanes(absmax, lanes);
    if (block < blocks && thread_index() % lanes == 0) args.absmax[block] = absmax;
    const float inverse = inverse_absmax(absmax);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int count = load(chunk, w);
      const std::int64_t at = first + chunk * lanes * kEight;
#pragma unroll
      for (int i = 0; i < kEight; ++i) w[i] *= inverse;
      if constexpr (kBits == 4) {
        std::uint8_t codes[4];
        encode_4bit(*codebook, w, codes);
        if (count > 0) store_elements(args.codes + at / 2, (count + 1) / 2, codes);
      } else {
        std::uint8_t codes[kEight];
        encode_8bit(w, codes);
        if (count > 0) store_elements(args.codes + at, count, codes);
      }
    }
  }
}

}  // namespace

void quantize(const QuantizeArgs& args, const Stream& stream) {
  fill_bytes(&args.non_finite->count, 0, sizeof(args.non_finite->count), stream);
  fill_bytes(&args.non_finite->first, 0xFF, sizeof(args.non_finite->first), stream);
  LaunchShape shape = looping_grid((args.elements + kEight - 1) / kEight, kThreads, stream);
  shape.smem_bytes = sizeof(SortedCodebook);
  with_type(args.dtype, [&]<class T>() {
    if (args.bits == 4) {
      launch<quantize_kernel<T, 4>>(shape, stream, args);
    } else {
      launch<quantize_kernel<T, 8>>(shape, stream, args);
    }
  });
}

}  // namespace qlora_native::QLN_CUDA
