// Placement decides where in a range of memory items of different sizes lie, and which of them make room for another.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

namespace qlora_native {

class Placement {
 public:
  static constexpr std::size_t kNone = ~std::size_t{0};

  // The range must hold the two largest items (least_bytes). It then always has room for an item beside another one.
  Placement(std::size_t bytes, std::vector<std::size_t> sizes);
  static std::size_t least_bytes(const std::vector<std::size_t>& sizes);

  bool holds(std::size_t item) const { return begin_[item] != kNone; }
  std::size_t begin(std::size_t item) const { return begin_[item]; }  // of an item that it holds

  // Places an item, and returns those that had to go: the ones with the largest distances (access_order.h), but not
  // `kept`, which may be kNone.
  std::vector<std::size_t> place(std::size_t item, std::size_t kept, const std::vector<std::size_t>& distances);
  void remove(std::size_t item);

 private:
  bool leaves_room(std::size_t item, std::size_t begin) const;
  std::vector<std::size_t> overlapping(std::size_t begin, std::size_t end) const;

  std::size_t bytes_;
  std::vector<std::size_t> sizes_, begin_;
  std::map<std::size_t, std::size_t> item_at_;  // {where an item begins: the item}
  std::size_t largest_ = 0;                     // an item
  std::size_t second_bytes_ = 0;                // the size of the largest other item
};

}  // namespace qlora_native
