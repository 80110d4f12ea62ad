// AccessOrder learns in which order items are used, and says which is used next and how soon each one is used again. It
// knows nothing of what the items are, or of where a step begins.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace qlora_native {

// The order is that of a training step, which uses layers upwards, then downwards, and may use some again on the way
// (gradient checkpointing). So one item before tells little of what follows: AccessOrder looks for the place in its
// history that the latest uses repeat, and expects what followed there. The first uses of all count as a repetition,
// whatever came before: that is where the next step begins.
class AccessOrder {
 public:
  explicit AccessOrder(std::size_t items);

  // Item 0 ... items-1 is used now.
  void use(std::size_t item);

  // The item that is expected to be used next. Before anything repeats, this is what was used first of all. To be
  // called after the first use.
  std::size_t next() const { return match_ == kNone ? first_ : history_[match_ + 1]; }

  // For each item after how many uses it is expected to be used: 0 is the next one. Items of which nothing is expected
  // come after all others, and among these what was used longest ago comes last.
  std::vector<std::size_t> distances() const;

 private:
  static constexpr std::size_t kNone = ~std::size_t{0};
  std::size_t find_match() const;

  std::vector<std::size_t> history_;
  std::vector<std::uint64_t> last_use_;  // of each item, as a count of uses; 0 if there is none
  std::uint64_t uses_ = 0;
  std::size_t first_ = 0;
  std::size_t match_ = kNone;  // the place in the history that the latest use repeats
};

}  // namespace qlora_native
