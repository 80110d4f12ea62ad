#include "paged/access_order.h"

#include <algorithm>
#include <utility>

namespace qlora_native {
namespace {

// So many uses in a row must repeat earlier ones before what followed these is expected. After one alone a layer would
// be expected to be followed downwards as it was upwards.
constexpr std::size_t kRepeated = 2;

// Longer repetitions count as this long, because the search takes as many comparisons for each place.
constexpr std::size_t kLongest = 256;

// The history keeps at least so many uses, and twice as many at most. A training step uses an item four times or less,
// except for a head whose rows are multiplied in chunks.
std::size_t kept_uses(std::size_t items) { return 16 * items + 1024; }

}  // namespace

AccessOrder::AccessOrder(std::size_t items) : last_use_(items) {}

void AccessOrder::use(std::size_t item) {
  if (history_.empty()) first_ = item;
  if (const std::size_t kept = kept_uses(last_use_.size()); history_.size() == 2 * kept) {
    history_.erase(history_.begin(), history_.begin() + static_cast<std::ptrdiff_t>(kept));
    match_ = match_ == kNone || match_ < kept ? kNone : match_ - kept;
  }
  history_.push_back(item);
  last_use_[item] = ++uses_;
  match_ = match_ != kNone && history_[match_ + 1] == item ? match_ + 1 : find_match();
}

// The latest place that repeats more than half as many uses as any place does. The one that repeats the most may be
// where an order began that has been given up since.
std::size_t AccessOrder::find_match() const {
  const std::size_t last = history_.size() - 1;
  std::vector<std::pair<std::size_t, std::size_t>> lengths;  // {place, uses}, the latest first
  std::size_t longest = 0;
  for (std::size_t i = last; i-- > 0;) {
    std::size_t length = 0;
    while (length <= i && length < kLongest && history_[i - length] == history_[last - length]) ++length;
    if (length > i) length = std::max(length, kRepeated);  // these were the first uses of all
    if (length < kRepeated) continue;
    lengths.emplace_back(i, length);
    longest = std::max(longest, length);
  }
  for (const auto& [place, length] : lengths) {
    if (2 * length > longest) return place;
  }
  return kNone;
}

std::vector<std::size_t> AccessOrder::distances() const {
  std::vector<std::size_t> distances(last_use_.size(), kNone);
  // What followed the match will follow now, up to now itself, where it begins again.
  const std::size_t period = match_ == kNone ? 0 : history_.size() - 1 - match_;
  for (std::size_t i = 0; i < period; ++i) {
    std::size_t& distance = distances[history_[match_ + 1 + i]];
    distance = std::min(distance, i);
  }
  if (period == 0 && uses_ > 0) distances[first_] = 0;  // which is next()
  for (std::size_t item = 0; item < distances.size(); ++item) {
    if (distances[item] == kNone) distances[item] = period + static_cast<std::size_t>(uses_ - last_use_[item]);
  }
  return distances;
}

}  // namespace qlora_native
