// quantize, quantize_absmax, dequantize.
#pragma once

#include "common/codebook.h"
#include "cpu/quantize/decode_elements-inl.h"
#include "cpu/quantize/nearest_level-inl.h"
#include "cpu/runtime/blocking.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "qlora_native/quantize.h"
#include "qlora_native/runtime.h"

namespace qlora_native::QLN_ISA {
namespace {

// Encodes 2 * kLanes adjacent elements, which are scaled to [-1, 1].
template <class Search>
struct Encode4 {
  static constexpr int kBits = 4;
  Search search;
  Table16 order;

  explicit Encode4(const SortedCodebook& codebook) : search(codebook), order(order_table(codebook)) {}
  void operator()(F32 even, F32 odd, std::uint8_t* codes) const {
    const auto code = [&](F32 t) { return as_i32(lookup(order, search.place_of(t))); };
    store_nibble_pairs(codes, code(even), code(odd));
  }
};
struct Encode8 {
  static constexpr int kBits = 8;

  void operator()(F32 even, F32 odd, std::uint8_t* codes) const {
    store_byte_pairs(codes, round_to_i32(mul(even, set1(127.0f))), round_to_i32(mul(odd, set1(127.0f))));
  }
};

constexpr std::uint32_t kAbsMask = 0x7FFFFFFF;

// Weights are read once, from memory, and prefetched so far ahead. What the processor prefetches by itself is too
// little where a line takes many instructions: on an Intel Xeon (Emerald Rapids) quantize took 1.4 times as long
// without.
constexpr std::int64_t kPrefetchedBytes = 4096;

// Quantizes one block, `blocksize` elements from p on. Returns its absmax, and writes codes unless an element is NaN or
// infinite.
template <DType kType, class Encode>
inline float quantize_block(const char* p, int blocksize, const Encode& encode, std::uint8_t* codes) {
  constexpr int kGroup = 2 * kLanes;
  constexpr auto kSize = static_cast<int>(size_of(kType));
  I32 max_bits = set1_i32(0);
  for (int i = 0; i < blocksize; i += kGroup) {
    for (int line = 0; line < kGroup * kSize; line += 64)
      __builtin_prefetch(p + kPrefetchedBytes + i * kSize + line, 0, 2);
    F32 even, odd;
    load_pairs<kType>(p + i * kSize, even, odd);
    max_bits = max_i32(max_bits, max_i32(as_i32(abs(even)), as_i32(abs(odd))));
  }
  const auto bits = static_cast<std::uint32_t>(reduce_max_i32(max_bits));
  float absmax;
  __builtin_memcpy(&absmax, &bits, sizeof(absmax));
  if (bits >= kInfinityBits) return absmax;
  const F32 inverse = set1(inverse_absmax(absmax));
  for (int i = 0; i < blocksize; i += kGroup) {
    F32 even, odd;
    load_pairs<kType>(p + i * kSize, even, odd);
    encode(mul(even, inverse), mul(odd, inverse), codes + i * Encode::kBits / 8);
  }
  return absmax;
}

template <DType kType>
inline NonFinite count_non_finite(const char* p, std::int64_t first, std::int64_t count) {
  NonFinite found;
  for (std::int64_t i = 0; i < count; ++i) {
    alignas(64) float value[kLanes];
    char copy[kLanes * sizeof(float)] = {};
    __builtin_memcpy(copy, p + i * static_cast<std::int64_t>(size_of(kType)), size_of(kType));
    store(value, load_as_f32<kType>(copy));
    std::uint32_t bits;
    __builtin_memcpy(&bits, value, sizeof(bits));
    if ((bits & kAbsMask) < kInfinityBits) continue;
    if (found.count++ == 0) found.first = first + i;
  }
  return found;
}

template <DType kType, class Encode>
inline void quantize_as(const QuantizeArgs& args, const Encode& encode) {
  constexpr std::int64_t kTaskElements = 64 << 10;
  constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
  constexpr std::int64_t kBits = Encode::kBits;
  const std::int64_t tasks = ceil_div(args.elements, kTaskElements);
  NonFinite* found =
      reinterpret_cast<NonFinite*>(scratch(Slot::call, static_cast<std::size_t>(tasks) * sizeof(NonFinite)));
  parallel_for(tasks, [&](std::int64_t task) {
    found[task] = NonFinite{};
    const std::int64_t end = smaller((task + 1) * kTaskElements, args.elements);
    for (std::int64_t e = task * kTaskElements; e < end; e += args.blocksize) {
      const std::int64_t count = smaller<std::int64_t>(args.blocksize, end - e);
      const char* p = static_cast<const char*>(args.weight) + e * kSize;
      std::uint8_t* codes = args.codes + e * kBits / 8;
      float absmax;
      if (count == args.blocksize) {
        absmax = quantize_block<kType>(p, args.blocksize, encode, codes);
      } else {  // the last block: zeros change neither its absmax nor another's code
        char copy[4096 * kSize];
        std::uint8_t padded[4096];
        __builtin_memset(copy, 0, static_cast<std::size_t>(args.blocksize * kSize));
        __builtin_memcpy(copy, p, static_cast<std::size_t>(count * kSize));
        absmax = quantize_block<kType>(copy, args.blocksize, encode, padded);
        __builtin_memcpy(codes, padded, static_cast<std::size_t>((count * kBits + 7) / 8));
      }
      args.absmax[e / args.blocksize] = absmax;
      std::uint32_t bits;
      __builtin_memcpy(&bits, &absmax, sizeof(bits));
      if (bits >= kInfinityBits) {
        const NonFinite block = count_non_finite<kType>(p, e, count);
        if (found[task].count == 0) found[task].first = block.first;
        found[task].count += block.count;
      }
    }
  });
  NonFinite total;
  for (std::int64_t task = 0; task < tasks; ++task) {
    if (total.count == 0) total.first = found[task].first;
    total.count += found[task].count;
  }
  *args.non_finite = total;
}

inline void quantize_weight(const QuantizeArgs& args, const Stream&) {
  with_dtype(args.dtype, [&](auto dtype) {
    if (args.bits == 8) return quantize_as<dtype()>(args, Encode8{});
    const SortedCodebook codebook = sort_codebook(args.code);
    if (Buckets::serve(codebook))
      quantize_as<dtype()>(args, Encode4<Buckets>(codebook));
    else
      quantize_as<dtype()>(args, Encode4<Bisection>(codebook));
  });
}

// Searches the midpoints of any ascending map. A gather is not used: it takes far longer where its microcode was
// mended.
class MapMidpoints {
 public:
  explicit MapMidpoints(const float* map) : midpoints_(midpoints_of(map)) {
    float every16th[16];
    for (int i = 0; i < 16; ++i) every16th[i] = midpoints_[16 * i + 15];
    every16th_ = table16(every16th);
  }
  MapMidpoints(const MapMidpoints&) = delete;
  MapMidpoints& operator=(const MapMidpoints&) = delete;

  // Stores how many midpoints lie below each element of `t`: the codes of the nearest levels.
  void store_nearest(const F32 (&t)[kTableVectors], std::uint8_t* codes) const {
    I32 place[kTableVectors];
    for (int k = 0; k < kTableVectors; ++k) place[k] = shift_left<4>(count_below(every16th_, t[k]));
    F32 limit[kTableVectors];
    for (int step = 8; step > 1; step /= 2) {
      I32 middle[kTableVectors];
      for (int k = 0; k < kTableVectors; ++k) middle[k] = add_i32(place[k], set1_i32(step - 1));
      lookup(table_, pack(middle), limit);
      for (int k = 0; k < kTableVectors; ++k) place[k] = add_where_above(place[k], t[k], limit[k], step);
    }
    const Codes last = pack(place);
    lookup(table_, last, limit);
    store_codes(codes, last, t, limit);
  }

 private:
  std::array<float, 256> midpoints_;
  Table16 every16th_;
  Table256 table_{midpoints_.data()};
};

// Tasks have a fixed size, so that the mean does not depend on the threads.
inline float mean(const float* values, std::int64_t count) {
  constexpr std::int64_t kTaskValues = 4096;
  const std::int64_t tasks = ceil_div(count, kTaskValues);
  double* partial_sums =
      reinterpret_cast<double*>(scratch(Slot::call, static_cast<std::size_t>(tasks) * sizeof(double)));
  parallel_for(tasks, [&](std::int64_t task) {
    const std::int64_t end = smaller((task + 1) * kTaskValues, count);
    double part[8] = {};
    std::int64_t i = task * kTaskValues;
    for (; i + 8 <= end; i += 8)
      for (int k = 0; k < 8; ++k) part[k] += double{values[i + k]};
    for (; i < end; ++i) part[i % 8] += double{values[i]};
    partial_sums[task] = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
  });
  double sum = 0.0;
  for (std::int64_t task = 0; task < tasks; ++task) sum += partial_sums[task];
  return count > 0 ? static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
}

inline void quantize_scales(const QuantizeAbsmaxArgs& args, const Stream&) {
  constexpr int kGroup = kTableVectors * kLanes;
  const float offset = mean(args.absmax, args.blocks);
  *args.offset = offset;
  const MapMidpoints midpoints(args.nested_code);
  parallel_for(ceil_div(args.blocks, args.nested_blocksize), [&](std::int64_t nested) {
    const std::int64_t first = nested * args.nested_blocksize;
    const std::int64_t end = smaller<std::int64_t>(first + args.nested_blocksize, args.blocks);
    const auto centred = [&](std::int64_t i) {  // zeros past the end
      float copy[kLanes] = {};
      const float* p = args.absmax + i;
      if (end - i < kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) copy[lane] = i + lane < end ? p[lane] : offset;
        p = copy;
      }
      return add(load(p), set1(-offset));
    };
    F32 largest = zero();
    for (std::int64_t i = first; i < end; i += kLanes) largest = max(largest, abs(centred(i)));
    const float absmax = reduce_max(largest);
    args.nested_absmax[nested] = absmax;
    const F32 divisor = set1(larger(absmax, 1e-38f));
    for (std::int64_t i = first; i < end; i += kGroup) {
      F32 scaled[kTableVectors];
      for (int k = 0; k < kTableVectors; ++k) scaled[k] = divide(centred(i + k * kLanes), divisor);
      std::uint8_t codes[kGroup];
      midpoints.store_nearest(scaled, codes);
      __builtin_memcpy(args.codes + i, codes, static_cast<std::size_t>(smaller<std::int64_t>(kGroup, end - i)));
    }
  });
}

template <DType kType>
inline void dequantize_all(const DequantizeArgs& args) {
  // Tasks are long: with a sixteenth of these a large weight took 7 to 37 % longer.
  constexpr std::int64_t kMinTaskChunks = 1 << 10, kMaxTaskChunks = 1 << 14;
  constexpr auto kSize = static_cast<std::int64_t>(size_of(kType));
  QuantizedWeightView flat = args.weight;  // rows do not matter here
  flat.K = args.weight.elements();
  flat.N = flat.count = 1;
  const std::int64_t chunks = ceil_div(flat.K, kChunk);
  const std::int64_t chunks_per_thread = ceil_div(chunks, num_threads() * kTasksPerThread);
  const std::int64_t task_chunks = smaller(larger(chunks_per_thread, kMinTaskChunks), kMaxTaskChunks);
  const bool stream = wants_streaming_stores(args.out, flat.K * kSize);
  with_rows<DotF32<kType>>(flat, 0, [&](const auto& rows) {
    const ElementRows elements = elements_of<kType>(rows);
    parallel_for(ceil_div(chunks, task_chunks), [&](std::int64_t task) {
      const std::int64_t first = task * task_chunks;
      elements.decode(0, {first, smaller(first + task_chunks, chunks)},
                      static_cast<char*>(args.out) + first * kChunk * kSize, stream);
    });
  });
}

// Decodes the requested rows. They lie anywhere in the weight, and the next product reads the result, so no store is
// non-temporal.
template <DType kType>
inline void dequantize_rows(const DequantizeArgs& args) {
  constexpr std::int64_t kTaskElements = 1 << 14;  // as many as take some microseconds
  QuantizedWeightView all = args.weight;
  all.N *= all.count;
  all.count = 1;
  const std::int64_t row_bytes = all.K * static_cast<std::int64_t>(size_of(kType));
  const std::int64_t task_rows = ceil_div(kTaskElements, all.K);
  with_rows<DotF32<kType>>(all, 0, [&](const auto& rows) {
    const ElementRows elements = elements_of<kType>(rows);
    parallel_for(ceil_div(args.row_count, task_rows), [&](std::int64_t task) {
      const std::int64_t end = smaller((task + 1) * task_rows, args.row_count);
      for (std::int64_t i = task * task_rows; i < end; ++i)
        elements.decode(args.rows[i], {0, ceil_div(all.K, kChunk)}, static_cast<char*>(args.out) + i * row_bytes);
    });
  });
}

inline void dequantize_weight(const DequantizeArgs& args, const Stream&) {
  with_dtype(args.dtype, [&](auto dtype) {
    args.rows != nullptr ? dequantize_rows<dtype()>(args) : dequantize_all<dtype()>(args);
  });
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
