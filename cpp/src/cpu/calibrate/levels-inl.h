// What an element of a weight can become: the 16 levels of a codebook, or 255 equally spaced ones.
#pragma once

#include "common/codebook.h"
#include "cpu/quantize/nearest_level-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// The level that is nearest to t, and its code. The level times step(scale) is what the code decodes to.
struct Nearest {
  F32 level;
  I32 code;
};

template <class Search>
class Levels4 {
 public:
  static constexpr int kBits = 4;
  // Whether this search finds the places of all floats, and not only of those within [-1, 1].
  static constexpr bool kUnbounded = std::is_same_v<Search, Bisection>;

  explicit Levels4(const SortedCodebook& codebook)
      : search_(codebook), values_(table16(codebook.value)), order_(order_table(codebook)) {}

  F32 step(F32 scale) const { return scale; }
  float step(float scale) const { return scale; }
  F32 level(F32 t) const { return lookup(values_, place(t)); }
  Nearest nearest(F32 t) const {
    const I32 found = place(t);
    return {lookup(values_, found), as_i32(lookup(order_, found))};
  }

 private:
  I32 place(F32 t) const {
    if constexpr (!kUnbounded) t = min(max(t, set1(-1.0f)), set1(1.0f));
    return search_.place_of(t);
  }

  Search search_;
  Table16 values_, order_;
};

class Levels8 {
 public:
  static constexpr int kBits = 8;

  F32 step(F32 scale) const { return divide(scale, set1(127.0f)); }
  float step(float scale) const { return scale / 127.0f; }
  F32 level(F32 t) const {
    const F32 bounded = min(max(mul(t, set1(127.0f)), set1(-127.0f)), set1(127.0f));
    return add(add(bounded, set1(kInteger)), set1(-kInteger));
  }
  Nearest nearest(F32 t) const {
    const F32 found = level(t);
    return {found, round_to_i32(found)};
  }

 private:
  static constexpr float kInteger = 0x1.8p23f;  // added to a float and subtracted again, this rounds it to an integer
};

// Calls f(levels) with the class that is fastest for these levels.
template <class F>
void with_levels(int bits, const float* code, const F& f) {
  if (bits == 8) return f(Levels8());
  const SortedCodebook codebook = sort_codebook(code);
  // Elements beyond [-1, 1] are moved to its ends, which must not change their place.
  const bool bounded = codebook.midpoint[0] > -1.0f && codebook.midpoint[14] < 1.0f;
  if (bounded && Buckets::serve(codebook))
    f(Levels4<Buckets>(codebook));
  else
    f(Levels4<Bisection>(codebook));
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
