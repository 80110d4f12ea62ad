#include "paged/placement.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace qlora_native {

Placement::Placement(std::size_t bytes, std::vector<std::size_t> sizes)
    : bytes_(bytes), sizes_(std::move(sizes)), begin_(sizes_.size(), kNone) {
  const auto largest = std::max_element(sizes_.begin(), sizes_.end());
  largest_ = static_cast<std::size_t>(largest - sizes_.begin());
  second_bytes_ = least_bytes(sizes_) - (sizes_.empty() ? 0 : *largest);
}

std::size_t Placement::least_bytes(const std::vector<std::size_t>& sizes) {
  std::size_t largest = 0, second = 0;
  for (const std::size_t size : sizes) {
    second = std::max(second, std::min(size, largest));
    largest = std::max(largest, size);
  }
  return largest + second;
}

// Whether any other item fits before or behind this one. While an item is in use it cannot be moved, so the one after
// it must find room.
bool Placement::leaves_room(std::size_t item, std::size_t begin) const {
  const std::size_t needed = item == largest_ ? second_bytes_ : sizes_[largest_];
  return std::max(begin, bytes_ - begin - sizes_[item]) >= needed;
}

std::vector<std::size_t> Placement::overlapping(std::size_t begin, std::size_t end) const {
  std::vector<std::size_t> items;
  auto at = item_at_.lower_bound(begin);
  if (at != item_at_.begin()) {
    const auto before = std::prev(at);
    if (before->first + sizes_[before->second] > begin) at = before;
  }
  for (; at != item_at_.end() && at->first < end; ++at) items.push_back(at->second);
  return items;
}

std::vector<std::size_t> Placement::place(std::size_t item, std::size_t kept,
                                          const std::vector<std::size_t>& distances) {
  const std::size_t size = sizes_[item];
  std::vector<std::size_t> candidates = {0, bytes_ - size};
  for (const auto& [begin, other] : item_at_) {
    candidates.push_back(begin + sizes_[other]);
    if (begin >= size) candidates.push_back(begin - size);
  }
  // The place from which the first item to be used again goes as late as possible; free memory is best.
  std::size_t chosen = kNone, latest = 0;
  for (const std::size_t begin : candidates) {
    if (begin > bytes_ - size || !leaves_room(item, begin)) continue;
    std::size_t soonest = kNone;
    bool is_kept = false;
    for (const std::size_t other : overlapping(begin, begin + size)) {
      soonest = std::min(soonest, distances[other]);
      is_kept |= other == kept;
    }
    if (is_kept || (chosen != kNone && (soonest < latest || (soonest == latest && begin >= chosen)))) continue;
    chosen = begin;
    latest = soonest;
  }
  std::vector<std::size_t> gone = overlapping(chosen, chosen + size);
  for (const std::size_t other : gone) remove(other);
  begin_[item] = chosen;
  item_at_[chosen] = item;
  return gone;
}

void Placement::remove(std::size_t item) {
  item_at_.erase(begin_[item]);
  begin_[item] = kNone;
}

}  // namespace qlora_native
