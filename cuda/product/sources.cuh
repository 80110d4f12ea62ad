// Sources, the operands of a product (general.cuh). A source is a small object that gives elements (i, k), already
// rounded to the dtype in which the product takes them. kAlongInner says whether its memory runs along k or along i.
//
// A product loads eight elements at a time, which are adjacent in memory. The first of them is element e, which is
// i * stride + k or k * stride + i, and the index along which memory runs is a multiple of 8. load() starts the loads
// of eight elements that are vectors, gather() those of any others. finish() makes elements from what was loaded, after
// the multiply of the step before.
#pragma once

#include <bit>
#include <type_traits>

#include "common/layout.h"
#include "device/elements.cuh"
#include "device/weight_block.cuh"
#include "product/dropout.cuh"
#include "qlora_native/linear.h"

namespace qlora_native::QLN_CUDA {

template <class T>
struct MatrixElements {
  using Element = T;
  using Raw = Vec8Of<T>;
  const T* data;
  std::int64_t stride;
  __device__ static std::int64_t first() { return 0; }
  // Whether eight elements can be loaded as vectors.
  __device__ bool has_vectors() const { return is_aligned(data, kVectorBytes) && stride % kVecSize == 0; }
  __device__ Raw load(std::int64_t e) const { return load_words_aligned(data + e); }
  __device__ Raw gather(std::int64_t e, int count) const { return gather_words(data + e, count); }
  __device__ Vec8Of<T> finish(const Raw& raw, std::int64_t, std::int64_t) const { return raw; }
};
// Element (i, k) of a matrix whose rows are numbered i.
template <class T>
struct Rows : MatrixElements<T> {
  static constexpr bool kAlongInner = true;
};
// Element (i, k) of a matrix whose columns are numbered i.
template <class T>
struct Columns : MatrixElements<T> {
  static constexpr bool kAlongInner = false;
};

// X after dropout, but without its factor 1 / (1 - p): by rows m, or by columns k.
template <class T>
struct DropoutRows : Rows<T> {
  Dropout dropout;
  __device__ Vec8Of<T> finish(const Vec8Of<T>& raw, std::int64_t m, std::int64_t k) const {
    return dropout.keep(raw, m, k);
  }
};
template <class T>
struct DropoutColumns : Columns<T> {
  Dropout dropout;
  __device__ Vec8Of<T> finish(const Vec8Of<T>& raw, std::int64_t k, std::int64_t m) const {
    return dropout.keep(raw, m, k);
  }
};

// A source as a kernel uses it: the seed of its dropout has been read.
template <class Source>
__device__ Source with_seed(const Source& source) {
  return source;
}
template <class T>
__device__ DropoutRows<T> with_seed(const DropoutRows<T>& source) {
  return {Rows<T>(source), source.dropout.with_seed()};
}
template <class T>
__device__ DropoutColumns<T> with_seed(const DropoutColumns<T>& source) {
  return {Columns<T>(source), source.dropout.with_seed()};
}

// Elements of a quantized weight. kPlain: whether it has_plain_scales(). Most 4-bit weights that have are multiplied
// elsewhere in a 16-bit dtype (gemm/), so that they have no vectors here.
template <class T, bool kPlain>
struct WeightElements {
  using Element = T;
  using Reader = BlockReader<kPlain>;
  static constexpr bool kMayBe4Bit = sizeof(T) == 4 || !kPlain;
  // With vectors: two words of codes, and those of Reader::Raw, which are two with plain scales and else four. Without
  // vectors: the elements themselves.
  using Raw = std::conditional_t<kPlain, Vec8Of<T>, Vec8Of<float>>;
  QuantizedWeightView w;
  WeightScales scales;
  std::int64_t stride;
  bool vectors;             // eight adjacent elements are 4 or 8 aligned bytes of one block
  std::int64_t offset = 0;  // elements of the weights before this one

  explicit WeightElements(const QuantizedWeightView& w)
      : w(w), scales(scales_of(w)), stride(w.K), vectors((w.bits == 8 || kMayBe4Bit) && is_aligned(w)) {}

  __device__ std::int64_t first() const { return offset; }
  // Goes on to the weight that begins `elements` elements behind this one; it may begin within a byte.
  __device__ void advance(std::int64_t elements) { offset += elements; }

  __device__ bool has_vectors() const { return vectors; }
  __device__ Raw load(std::int64_t e) const {
    Raw raw{};
    if (kMayBe4Bit && w.bits == 4) {
      raw.at[0] = *reinterpret_cast<const std::uint32_t*>(w.codes + e / 2);
    } else {
      const auto codes = load_vector<std::uint32_t, 2>(reinterpret_cast<const std::uint32_t*>(w.codes + e));
      raw.at[0] = codes.at[0];
      raw.at[1] = codes.at[1];
    }
    const typename Reader::Raw block = Reader(w, scales).fetch(e);
    raw.at[2] = block.scale;
    raw.at[3] = std::bit_cast<std::uint32_t>(block.nested_absmax);
    if constexpr (!kPlain) {
      raw.at[4] = block.minimum;
      raw.at[5] = std::bit_cast<std::uint32_t>(block.nested_minimum);
    }
    return raw;
  }
  __device__ Raw gather(std::int64_t e, int count) const {
    constexpr int kWords = sizeof(Vec8Of<T>) / 4;
    Raw raw{};
#pragma unroll 1
    for (int word = 0; word < kWords; ++word) {
#pragma unroll
      for (int i = 1; i < kWords; ++i) raw.at[i - 1] = raw.at[i];
      raw.at[kWords - 1] =
          word_of<T>(word, [&](int i) { return i < count ? value_of<kPlain>(w, scales, e + i) : 0.0f; });
    }
    return raw;
  }
  // All lanes of a warp call this, because together they hold the codebook.
  __device__ Vec8Of<T> finish(const Raw& raw, std::int64_t, std::int64_t) const {
    if (!vectors) return first_words(raw);
    typename Reader::Raw from{.scale = raw.at[2], .nested_absmax = std::bit_cast<float>(raw.at[3])};
    if constexpr (!kPlain) {
      from.minimum = raw.at[4];
      from.nested_minimum = std::bit_cast<float>(raw.at[5]);
    }
    const Reader reader(w, scales);
    const BlockScale block = reader.finish(from, reader.offset());
    if (kMayBe4Bit && w.bits == 4) {
      const float level = w.code[thread_index() % 16];
      return words_of<T>([&](int i) {
        const std::uint32_t code = raw.at[0] >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
        return block.value(shfl(level, static_cast<int>(code % 16)));
      });
    }
    float values[kVecSize];
    decode_bytes<kPlain>(w, block, raw, values);
    return words_of<T>([&](int i) { return values[i]; });
  }

 private:
  __device__ static Vec8Of<T> first_words(const Raw& raw) {
    Vec8Of<T> words;
#pragma unroll
    for (unsigned i = 0; i < sizeof(words) / 4; ++i) words.at[i] = raw.at[i];
    return words;
  }
};
// The source of the weight, or of the adapter, that begins `elements` elements behind that of `source`.
template <class Source>
__device__ Source advanced(Source source, std::int64_t elements) {
  source.advance(elements);
  return source;
}
// W, by its rows n or by its columns k.
template <class T, bool kPlain>
struct WeightRows : WeightElements<T, kPlain> {
  using WeightElements<T, kPlain>::WeightElements;
  static constexpr bool kAlongInner = true;
};
template <class T, bool kPlain>
struct WeightColumns : WeightElements<T, kPlain> {
  using WeightElements<T, kPlain>::WeightElements;
  static constexpr bool kAlongInner = false;
};

// `factor` times A or B, rounded to T.
template <class T>
struct LoraElements {
  using Element = T;
  using Raw = Vec8Of<float>;  // or half as many words of 16-bit elements
  const void* data;
  DType dtype;
  std::int64_t stride;
  float factor;

  __device__ static std::int64_t first() { return 0; }
  // Goes on to the adapter that begins `elements` elements behind this one.
  __device__ void advance(std::int64_t elements) {
    data = static_cast<const std::byte*>(data) + elements * static_cast<std::int64_t>(size_of(dtype));
  }

  __device__ bool has_vectors() const { return is_aligned(data, kVectorBytes) && stride % kVecSize == 0; }
  __device__ Raw load(std::int64_t e) const {
    if (dtype == DType::f32) return load_words_aligned(static_cast<const float*>(data) + e);
    return raw_of(load_words_aligned(static_cast<const Bf16*>(data) + e));  // or F16
  }
  __device__ Raw gather(std::int64_t e, int count) const {
    if (dtype == DType::f32) return gather_words(static_cast<const float*>(data) + e, count);
    return raw_of(gather_words(static_cast<const Bf16*>(data) + e, count));
  }
  __device__ Vec8Of<T> finish(const Raw& raw, std::int64_t, std::int64_t) const {
    return words_of<T>([&](int i) {
      if (dtype == DType::f32) return factor * std::bit_cast<float>(raw.at[i]);
      const auto bits = static_cast<std::uint16_t>(raw.at[i / 2] >> (i % 2 * 16));
      return factor * (dtype == DType::bf16 ? to_f32(Bf16{bits}) : to_f32(F16{bits}));
    });
  }

 private:
  __device__ static Raw raw_of(const Vec8& eight) {
    return {{eight.at[0], eight.at[1], eight.at[2], eight.at[3], 0, 0, 0, 0}};
  }
};
// A or B, by its rows or by its columns.
template <class T>
struct LoraRows : LoraElements<T> {
  static constexpr bool kAlongInner = true;
};
template <class T>
struct LoraColumns : LoraElements<T> {
  static constexpr bool kAlongInner = false;
};

}  // namespace qlora_native::QLN_CUDA
