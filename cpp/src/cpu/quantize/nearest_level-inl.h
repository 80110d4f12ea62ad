// The level of a codebook that is nearest to each lane of a vector.
#pragma once

#include "common/codebook.h"
#include "cpu/isa/primitives-inl.h"

namespace qlora_native::QLN_ISA {
namespace {

// Counts by four steps of bisection how many of 15 ascending limits (and a 16th, infinite) lie below t.
inline I32 count_below(Table16 limits, F32 t) {
  I32 position = set1_i32(0);
  for (int step = 8; step > 0; step /= 2)
    position = add_where_above(position, t, lookup(limits, add_i32(position, set1_i32(step - 1))), step);
  return position;
}

// The place of the nearest level is the number of a codebook's 15 midpoints that lie below t, where |t| <= 1. Two
// classes find it.

class Bisection {
 public:
  explicit Bisection(const SortedCodebook& codebook) {
    float midpoints[16];
    for (int i = 0; i < 15; ++i) midpoints[i] = codebook.midpoint[i];
    midpoints[15] = __builtin_inff();
    midpoints_ = table16(midpoints);
  }
  I32 place_of(F32 t) const { return count_below(midpoints_, t); }

 private:
  Table16 midpoints_;
};

// Compares once. No two midpoints may share one of CodebookBuckets.
class Buckets : CodebookBuckets {
 public:
  explicit Buckets(const SortedCodebook& codebook) {
    float midpoint[kCount], below[kCount];
    for (int bucket = 0, i = 0; bucket < kCount; ++bucket) {
      while (i < 15 && bucket_of(codebook.midpoint[i]) < bucket) ++i;
      const std::uint32_t count = static_cast<std::uint32_t>(i);
      __builtin_memcpy(&below[bucket], &count, sizeof(count));
      const bool here = i < 15 && bucket_of(codebook.midpoint[i]) == bucket;
      midpoint[bucket] = here ? codebook.midpoint[i] : __builtin_inff();
    }
    midpoint_ = table32(midpoint);
    below_ = table32(below);
  }
  static bool serve(const SortedCodebook& codebook) {
    for (int i = 0; i < 14; ++i)
      if (bucket_of(codebook.midpoint[i]) == bucket_of(codebook.midpoint[i + 1])) return false;
    return true;
  }
  I32 place_of(F32 t) const {
    const I32 bucket = as_i32(fma(t, set1(kPerUnit), set1(kOrigin)));
    return add_where_above(as_i32(lookup(below_, bucket)), t, lookup(midpoint_, bucket), 1);
  }

 private:
  static int bucket_of(float t) {
    const float bounded = t < -2.0f ? -2.0f : t > 2.0f ? 2.0f : t;  // beyond every bucket of [-1, 1]
    return static_cast<int>(__builtin_fmaf(bounded, kPerUnit, kOrigin) - kInteger);
  }

  Table32 midpoint_, below_;
};

// A table of codes, which are stored as the bits of floats, so that one kind of table is enough.
inline Table16 order_table(const SortedCodebook& codebook) {
  float order[16];
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t code = codebook.order[i];
    __builtin_memcpy(&order[i], &code, sizeof(code));
  }
  return table16(order);
}

}  // namespace
}  // namespace qlora_native::QLN_ISA
