#include "paged/update.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "paged/arena.h"

namespace qlora_native {
namespace {

// Memory counts as short if less than this would be left on the device with all of the state on it. The number was
// chosen, not measured: libraries beside torch allocate memory when they are first used.
constexpr std::size_t kSpareBytes = std::size_t{512} << 20;

}  // namespace

Optimizer8bitTensor segment_of(const Optimizer8bitTensor& tensor, std::int64_t first, std::int64_t elements) {
  const bool in_8_bits = tensor.absmax1 != nullptr;
  const std::size_t state_bytes = in_8_bits ? sizeof(std::uint8_t) : sizeof(float);
  const auto at = [first](auto* p, std::size_t bytes) { return p + static_cast<std::size_t>(first) * bytes; };
  Optimizer8bitTensor segment = tensor;
  segment.elements = elements;
  segment.param = at(static_cast<std::byte*>(tensor.param), size_of(tensor.param_dtype));
  segment.grad = at(static_cast<const std::byte*>(tensor.grad), size_of(tensor.grad_dtype));
  for (int k = 0; k < kMaxMoments; ++k) {
    if (state_of(tensor, k) != nullptr) {
      state_of(segment, k) = at(static_cast<std::byte*>(state_of(tensor, k)), state_bytes);
    }
    if (absmax_of(tensor, k) != nullptr) absmax_of(segment, k) += first / kOptimizer8bitBlocksize;
  }
  return segment;
}

PagedUpdate::PagedUpdate(const Optimizer8bitArgs& args, const Stream& stream) : stream_(stream.handle) {
  std::vector<UpdatePart> others;
  // While a graph is captured, nothing is fetched: kernels access the state wherever it lies.
  std::optional<bool> captured;
  std::map<std::pair<PagedArena::Impl*, std::size_t>, std::size_t> visit_of;
  for (std::int64_t i = 0; i < args.count; ++i) {
    const Optimizer8bitTensor& tensor = args.tensors[i];
    PagedArena::Impl* const arena = tensor.elements > 0 ? PagedArena::Impl::find(tensor.state1) : nullptr;
    const PagedArena::Impl::Entry* const entry = arena != nullptr ? arena->entry_of(tensor, args.algorithm) : nullptr;
    if (entry != nullptr && !captured) captured = arena->driver().is_capturing(stream_);
    if (entry == nullptr || *captured) {
      others.push_back({tensor, i});
      continue;
    }
    if (std::find(arenas_.begin(), arenas_.end(), arena) == arenas_.end()) arenas_.push_back(arena);
    for (std::int64_t first = 0, segment = 0; first < tensor.elements; first += entry->piece, ++segment) {
      const std::pair key{arena, entry->first_segment + static_cast<std::size_t>(segment)};
      const auto [found, is_new] = visit_of.try_emplace(key, visits_.size());
      if (is_new) visits_.push_back({key.first, key.second, {}});
      const std::int64_t elements = std::min(entry->piece, tensor.elements - first);
      visits_[found->second].parts.push_back({segment_of(tensor, first, elements), i});
    }
  }
  if (!others.empty()) visits_.insert(visits_.begin(), {nullptr, 0, std::move(others)});
  begin();
}

void PagedUpdate::begin() {
  if (arenas_.empty()) return;
  std::size_t to_fetch = 0;
  for (const Visit& visit : visits_)
    to_fetch += visit.arena != nullptr ? visit.arena->bytes_to_fetch(visit.segment) : 0;
  is_short_ = arenas_.front()->driver().free_bytes() < to_fetch + kSpareBytes;
  for (PagedArena::Impl* arena : arenas_) arena->begin(stream_);
  fetch(0);
}

void PagedUpdate::fetch(std::size_t visit) {
  if (visit < visits_.size() && visits_[visit].arena != nullptr) visits_[visit].arena->fetch(visits_[visit].segment);
}

void PagedUpdate::prepare(std::size_t i) {
  fetch(i + 1);
  Visit& visit = visits_[i];
  if (visit.arena == nullptr) return;
  visit.arena->begin_update(visit.segment, stream_);
  for (UpdatePart& part : visit.parts) {
    Optimizer8bitTensor& tensor = part.tensor;
    for (int k = 0; k < kMaxMoments; ++k) {
      void*& state = state_of(tensor, k);
      float*& absmax = absmax_of(tensor, k);
      if (state != nullptr) state = visit.arena->resident(visit.segment, state);
      if (absmax != nullptr) absmax = static_cast<float*>(visit.arena->resident(visit.segment, absmax));
    }
  }
}

void PagedUpdate::complete(std::size_t i) {
  if (visits_[i].arena != nullptr) visits_[i].arena->end_update(visits_[i].segment, stream_, is_short_);
}

void PagedUpdate::finish() {
  for (PagedArena::Impl* arena : arenas_) arena->finish(stream_);
}

}  // namespace qlora_native
