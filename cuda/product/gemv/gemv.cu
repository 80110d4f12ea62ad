// The forward product of up to eight rows of X, where reading W is what takes time: Y = [X | U] . [W | s*B]^T + bias.
//
// A block takes 16 rows of W at a time. Its warps share K: each takes 128 elements of every row in a step, and at the
// end they add up their accumulators, always in one order. Lane (g, t) of a warp, with g = lane / 4 and t = lane % 4,
// has elements 32 t ... 32 t + 31 of rows g and g + 8. In a row these are 16 bytes of 4-bit codes, which share a scale.
//
//   K of a step    0 ... 31  32 ... 63  64 ... 95  96 ... 127
//   row g, g + 8   t = 0     t = 1      t = 2      t = 3
//
// Where each group of rows has its own weight, a block computes some columns of one group after another, for up to
// eight rows at a time.
//
// In bf16 and fp16 a tensor core multiplies: the weights are the operand of 16 rows, and X, filled up with zeros, is
// the operand of 8. K may be summed in any order, so a lane takes its four elements of mma's 16 from its own 32. In
// fp32 CUDA cores multiply.
#include "device/weight_block.cuh"
#include "product/gemv/gemv_part.cuh"
#include "product/gemv/gemv_rows.cuh"

namespace qlora_native::QLN_CUDA {
namespace {

// One copy for each lane that shared memory serves at once, so that each of them has its own banks.
using GemvTable = PairTable<16>;

template <bool kAligned>
struct GemvShared {
  GemvTable::Pair pairs[GemvTable::kPairs];
  typename ScaleReader<kAligned>::Nested nested;
  float partial_sums[kGemvWarps][kGemvRows][kGemvCols];
};

// ---- the weight ----

// A lane's chunk of one row of W, codes and scale, while it is being loaded. kPlain: whether W has_plain_scales(); a W
// that has not is aligned.
template <int kBits, bool kPlain, bool kAligned>
class GemvChunk {
  static_assert(kPlain || kAligned);

 public:
  // Loads a chunk of an aligned weight.
  __device__ __forceinline__ void fetch(const QuantizedWeightView& w, const ScaleReader<true>& scales,
                                        std::uint32_t chunk) {
    fetch_codes(w, chunk);
    scale_.fetch(scales, chunk);
  }
  __device__ __forceinline__ void fetch(const QuantizedWeightView& w, const BlockReader<false>& blocks,
                                        std::uint32_t chunk) {
    fetch_codes(w, chunk);
    scale_ = blocks.fetch(std::int64_t{chunk} * kChunk);
  }
  // Loads a chunk of any other weight, from `element` on; `count` is how many of its elements there are.
  __device__ __forceinline__ void fetch(const QuantizedWeightView& w, const ScaleReader<false>& scales,
                                        std::int64_t element, int count) {
    gather_codes<kBits>(w.codes, element, count, codes_);
    scale_.fetch(w, scales, element, count);
  }
  // What decode() needs to know of the chunk's blocks. With 8-bit codes the scale has been divided by 127.
  __device__ __forceinline__ ChunkScale<kAligned> finish_scale(const QuantizedWeightView&,
                                                               const ScaleReader<kAligned>& scales) const {
    const ChunkScale<kAligned> scale = scale_.finish(scales);
    return kBits == 8 ? scale.divided_by(127.0f) : scale;
  }
  __device__ __forceinline__ BlockScale finish_scale(const QuantizedWeightView& w,
                                                     const BlockReader<false>& blocks) const {
    const BlockScale block = blocks.finish(scale_, blocks.offset());
    return kBits == 8 ? unit_of_bytes<false>(w, block) : block;
  }
  // Decodes the four elements at `first`; they are not rounded yet.
  template <class Scale>
  __device__ __forceinline__ void decode(float (&w)[kGemvVecSize], int first, const Scale& scale,
                                         const GemvTable& table, bool is_e4m3) const {
#pragma unroll
    for (int i = 0; i < kGemvVecSize; i += 2) {
      const int byte = (first + i) * kBits / 8;
      const std::uint32_t word = codes_[byte / kVectorBytes].at[byte % kVectorBytes / 4];
      GemvTable::Pair pair;
      if constexpr (kBits == 4) {
        pair = table.pair_of_byte(word, byte % 4);
      } else if (!kPlain && is_e4m3) {
        pair = {{level_of_e4m3(byte_of(word, byte % 4)), level_of_e4m3(byte_of(word, byte % 4 + 1))}};
      } else {
        pair = {{signed_byte(word, byte % 4), signed_byte(word, byte % 4 + 1)}};
      }
      w[i] = scale.value(pair.at[0], first + i);
      w[i + 1] = scale.value(pair.at[1], first + i + 1);
    }
  }

 private:
  static constexpr int kVectors = kChunk * kBits / 8 / kVectorBytes;
  __device__ __forceinline__ void fetch_codes(const QuantizedWeightView& w, std::uint32_t chunk) {
    constexpr int kBytes = kVectors * kVectorBytes;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      codes_[i] = load_vector<std::uint32_t, 4>(
          reinterpret_cast<const std::uint32_t*>(w.codes + std::uint64_t{chunk} * kBytes + i * kVectorBytes));
    }
  }
  __device__ __forceinline__ static float signed_byte(std::uint32_t word, int i) {
    return static_cast<float>(static_cast<std::int8_t>(byte_of(word, static_cast<std::uint32_t>(i))));
  }
  Vector<std::uint32_t, 4> codes_[kVectors];
  std::conditional_t<kPlain, PendingScale<kAligned>, BlockReader<false>::Raw> scale_;
};

// How many elements the chunk of a lane has that begins at `first`, if a row has `whole` elements.
__device__ __forceinline__ int chunk_elements(std::int64_t whole, std::int64_t first) {
  return whole - first < kChunk ? static_cast<int>(whole - first) : kChunk;
}

// The accumulators of eight rows in fp32 leave enough registers for only one block of an SM.
template <class T, int kRows>
constexpr int kGemvBlocks = std::is_same_v<T, float> && kRows > 1 ? 1 : 2;

template <class T, int kRows, int kBits, bool kPlain, bool kAligned, bool kGrouped>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<T, kRows>)
    gemv_kernel(const __grid_constant__ GemvArgs args) {
  using Rows = GemvRows<T, kRows>;
  const QuantizedWeightView& w = args.weight;
  GemvShared<kAligned>& shared = *dynamic_smem<GemvShared<kAligned>>();
  const auto scales = [&] {
    if constexpr (kPlain) {
      return ScaleReader<kAligned>(w, args.scales, shared.nested);
    } else {
      return BlockReader<false>(w, args.scales);
    }
  }();
  const bool is_e4m3 = !kPlain && kBits == 8 && w.byte_format == ByteFormat::e4m3;
  const GemvLane lane;
  const std::int64_t K = w.K, rank = args.u.cols;
  GemvPart<T, kGrouped> part(args);
  if (kGrouped && !part.next()) return griddepcontrol_wait();
  struct Step {
    GemvChunk<kBits, kPlain, kAligned> chunk[2];
    Rows x;
  } now, next;
  // Loads the step after this one, for the columns of the result from n0 on, and from `k` on.
  const auto fetch = [&](std::int64_t n0, std::int64_t k) {
    const int count = chunk_elements(K, k);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const std::int64_t n = n0 + lane.g + 8 * row, element = part.weight_offset() + n * K + k;
      if constexpr (kAligned) {
        // Beyond W any chunk will do, so the last one is loaded: it is multiplied by zeros of X, or its sum is not
        // stored.
        const auto chunk = static_cast<std::uint32_t>(static_cast<std::uint64_t>(element) / kChunk);
        next.chunk[row].fetch(w, scales, chunk < args.last_chunk ? chunk : args.last_chunk);
      } else {
        next.chunk[row].fetch(w, scales, element, n < w.N ? count : 0);
      }
    }
    next.x.template fetch<kAligned>(part.x() + k, args.x.stride, part.rows(), count, lane);
  };
  // The warp's first step begins at `first` of K, and the lane's chunk begins at `lane_offset` of a step.
  const std::int64_t first = lane.warp * kWarpStep, lane_offset = lane.t * kChunk;
  const auto fetch_first = [&](std::int64_t n0) {
    if (n0 < part.end() && first < K) fetch(n0, first + lane_offset);
  };

  // The first codes are loaded while the tables are filled, and the first codes of the next columns while the partial
  // sums of these are exchanged. This is not done where loading a scale needs those tables (in weights that are not
  // aligned), nor where the accumulators of eight rows in fp32 fill the registers.
  constexpr bool kPrefetch = kAligned && (kRows == 1 || !std::is_same_v<T, float>);
  if constexpr (kPrefetch) fetch_first(part.begin());
  if constexpr (kBits == 4) GemvTable::fill(shared.pairs, w.code);
  if constexpr (kPlain) shared.nested.fill(w);
  sync_threads();
  const GemvTable table(shared.pairs);

  for (std::int64_t n0 = part.begin(); n0 < part.end(); n0 += part.stride()) {
    typename Rows::Accumulators accumulators;
    const std::int64_t n[2] = {n0 + lane.g, n0 + lane.g + 8};
    if constexpr (!kPrefetch) fetch_first(n0);
    for (std::int64_t k = first; k < K; k += kGemvWarps * kWarpStep) {
      now = next;
      const bool is_last = k + kGemvWarps * kWarpStep >= K;
      if constexpr (kPrefetch) {
        const std::int64_t next_n0 = is_last ? n0 + part.stride() : n0;
        if (next_n0 < part.end()) fetch(next_n0, (is_last ? first : k + kGemvWarps * kWarpStep) + lane_offset);
      } else {
        if (!is_last) fetch(n0, k + kGemvWarps * kWarpStep + lane_offset);
      }
      const auto scale0 = now.chunk[0].finish_scale(w, scales), scale1 = now.chunk[1].finish_scale(w, scales);
#pragma unroll
      for (int i = 0; i < kChunk; i += kGemvVecSize) {
        float decoded[2][kGemvVecSize];
        now.chunk[0].decode(decoded[0], i, scale0, table, is_e4m3);
        now.chunk[1].decode(decoded[1], i, scale1, table, is_e4m3);
        Rows::add(accumulators, now.x.vec4_at(i), decoded);
      }
    }

    // The adapter adds to the same accumulators, with B in place of W and four elements of U a lane, for rows first ...
    // last-1. Where there are several adapters, the warps alternate between the adapters too.
    const auto add_adapter = [&](int adapter, int first, int last) {
      const std::int64_t before = adapter * args.lora_elements();
      const int warp = kGrouped ? (lane.warp + adapter) % kGemvWarps : lane.warp;
#pragma unroll 1
      for (std::int64_t r0 = warp * kMmaInner; r0 < rank; r0 += kGemvWarps * kMmaInner) {
        const std::int64_t r = r0 + lane.t * kGemvVecSize;
        float b[2][kGemvVecSize];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
          for (int j = 0; j < kGemvVecSize; ++j) {
            b[row][j] = 0.0f;
            if (n[row] < w.N && r + j < rank) {
              b[row][j] =
                  rounded<T>(args.scaling * load_as_f32(args.lora, args.lora_dtype, before + n[row] * rank + r + j));
            }
          }
        }
        const T* const u = part.u() + r;
        Rows::add(accumulators, Rows::load_vec4(u, args.u.stride, first, last, chunk_elements(rank, r), lane), b);
      }
    };
    griddepcontrol_wait();  // for the kernel that makes U
    if constexpr (!kGrouped) {
      add_adapter(0, 0, part.rows());
    } else {
      TileAdapters<kGemvRows> adapters(args, part.tile());
#pragma unroll 1
      while (adapters.next()) {
        const RowSpan span = adapters.rows();
        const std::int64_t first = span.begin - part.tile().begin, last = span.end - part.tile().begin;
        add_adapter(adapters.adapter(), first < 0 ? 0 : static_cast<int>(first),
                    last < part.rows() ? static_cast<int>(last) : part.rows());
      }
    }

    Rows::store(accumulators, shared.partial_sums[lane.warp], lane);
    sync_threads();
    const int m = thread_index() / kGemvCols, col = thread_index() % kGemvCols;
    if (m < part.rows() && n0 + col < w.N) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kGemvWarps; ++warp) sum += shared.partial_sums[warp][m][col];
      if (args.bias != nullptr) sum += to_f32(static_cast<const T*>(args.bias)[part.bias_offset() + n0 + col]);
      part.out()[m * args.out.stride + n0 + col] = from_f32<T>(sum);
    }
    sync_threads();  // before the partial sums are written again
    if constexpr (kGrouped) {
      if (n0 + part.stride() >= part.end() && part.next()) {
        if constexpr (kPrefetch) fetch_first(part.begin());
        n0 = part.begin() - part.stride();
      }
    }
  }
}

}  // namespace

void multiply(const Product& product, const GemvConfig& config, const Stream& stream) {
  const QuantizedWeightView& w = product.weight;
  const GemvArgs args{product, scales_of(w), last_chunk_of(w)};
  const auto launch_for = [&]<class T, int kRows, int kBits, bool kPlain, bool kAligned>() {
    const LaunchShape shape = {.blocks = config.blocks,
                               .threads = kGemvThreads,
                               .smem_bytes = sizeof(GemvShared<kAligned>),
                               .programmatic_launch = args.follows_low_rank()};
    if constexpr (kRows == kGemvRows && kAligned) {
      if (args.groups.count > 0)
        return launch<gemv_kernel<T, kRows, kBits, kPlain, kAligned, true>>(shape, stream, args);
    }
    launch<gemv_kernel<T, kRows, kBits, kPlain, kAligned, false>>(shape, stream, args);
  };
  const auto with_scales = [&]<class T, int kRows, int kBits>() {
    if constexpr (kBits == 4 || !std::is_same_v<T, float>) {
      if (!has_plain_scales(w)) return launch_for.template operator()<T, kRows, kBits, false, true>();
    }
    if (config.aligned) return launch_for.template operator()<T, kRows, kBits, true, true>();
    return launch_for.template operator()<T, kRows, kBits, true, false>();
  };
  const auto with_weight = [&]<class T, int kRows>() {
    w.bits == 4 ? with_scales.template operator()<T, kRows, 4>() : with_scales.template operator()<T, kRows, 8>();
  };
  with_type(args.x.dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, float>) {
      if (args.x.rows == 1 && args.groups.count == 0) return with_weight.template operator()<T, 1>();
    }
    with_weight.template operator()<T, kGemvRows>();
  });
}

}  // namespace qlora_native::QLN_CUDA
