#include "paged/arena.h"

#include <algorithm>
#include <cstring>

#include "backend.h"
#include "check.h"
#include "common/layout.h"

namespace qlora_native {
namespace {

// Segments begin at multiples of this. The driver moves managed memory in blocks of this size, so no block belongs to
// two segments.
constexpr std::size_t kPage = std::size_t{2} << 20;
// The slots of the ring: one is filled while one is updated and one is copied back.
constexpr std::size_t kSlots = 3;

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::int64_t piece_of(std::int64_t elements, std::size_t bytes_of_element, std::size_t segment_bytes) {
  const auto block = static_cast<std::size_t>(kOptimizer8bitBlocksize);
  const std::size_t blocks = std::max<std::size_t>(segment_bytes / (bytes_of_element * block), 1);
  return std::min(elements, static_cast<std::int64_t>(blocks * block));
}

}  // namespace

AddressMap<PagedArena::Impl*> PagedArena::Impl::all_;

// ---- layout ----

// Adds an array and returns its offset. Even an empty array gets an address of its own, because torch cannot save two
// tensors at one address.
std::size_t PagedArena::Impl::array(std::size_t bytes, std::size_t alignment) {
  const std::size_t begin = round_up(bytes_, alignment);
  bytes_ = begin + std::max<std::size_t>(bytes, 1);
  return begin;
}

// Small parameters share a segment as long as they fit; it is one range of the arena. A parameter that is larger than a
// segment gets segments of its own; each is a piece of the parameter, with a range in each of its arrays.
void PagedArena::Impl::lay_out(const std::vector<PagedState>& states, std::size_t segment_bytes) {
  bool is_open = false;  // whether the last segment may take more parameters
  for (const PagedState& state : states) {
    Entry entry{.elements = state.elements,
                .element_bytes = state.in_8_bits ? sizeof(std::uint8_t) : sizeof(float),
                .moments = moments_of(state.algorithm)};
    const auto moments = static_cast<std::size_t>(entry.moments);
    entry.piece = piece_of(entry.elements, moments * entry.element_bytes, segment_bytes);
    const std::size_t state_bytes = entry.state_bytes(entry.elements),
                      absmax_bytes = entry.absmax_bytes(entry.elements);
    const bool is_whole = entry.piece == entry.elements;
    const std::size_t bytes =
        moments * (round_up(state_bytes, kPagedAlignment) + round_up(absmax_bytes, kPagedAlignment));
    if (is_whole && is_open && bytes_ + bytes - segments_.back().ranges[0].begin > segment_bytes) is_open = false;
    if (!is_whole) is_open = false;
    const std::size_t between = is_whole ? kPagedAlignment : kPage;
    // The third moment follows the first in the same array. (If the array is cut into segments, these share blocks of
    // managed memory where one moment ends and the other begins.)
    const std::size_t arrays_in_first = moments == 3 ? 2 : 1;
    entry.state[0] = array(arrays_in_first * state_bytes, is_whole && is_open ? kPagedAlignment : kPage);
    entry.state[2] = entry.state[0] + state_bytes;
    if (moments > 1) entry.state[1] = array(state_bytes, between);
    if (entry.in_8_bits()) {
      entry.absmax[0] = array(arrays_in_first * absmax_bytes, between);
      entry.absmax[2] = entry.absmax[0] + absmax_bytes;
      if (moments > 1) entry.absmax[1] = array(absmax_bytes, between);
    }
    if (is_whole) {
      if (!is_open) segments_.push_back({.ranges = {{entry.state[0], entry.state[0]}}});
      is_open = true;
      segments_.back().ranges[0].end = bytes_;
      entry.first_segment = segments_.size() - 1;
    } else {
      entry.first_segment = segments_.size();
      for (std::int64_t first = 0; first < entry.elements; first += entry.piece) {
        const std::int64_t end = std::min(first + entry.piece, entry.elements);
        Segment segment;
        for (int k = 0; k < entry.moments; ++k) {
          const std::size_t at = entry.state[k];
          segment.ranges.push_back({at + entry.state_bytes(first), at + entry.state_bytes(end)});
        }
        for (int k = 0; k < entry.moments && entry.in_8_bits(); ++k) {
          const std::size_t at = entry.absmax[k];
          segment.ranges.push_back({at + entry.absmax_bytes(first), at + entry.absmax_bytes(end)});
        }
        segments_.push_back(std::move(segment));
      }
    }
    entries_.push_back(entry);
  }
}

std::size_t PagedArena::Impl::size_of(std::size_t segment) const {
  std::size_t bytes = 0;
  for (const Range& range : segments_[segment].ranges) bytes += round_up(range.end - range.begin, kPagedAlignment);
  return bytes;
}

// ---- memory ----

void PagedArena::Impl::open(const std::vector<PagedState>& states, const PagedOptions& options) {
  lay_out(states, options.segment_bytes);
  bytes_ = std::max(bytes_, kPagedAlignment);  // even an empty arena gets an address of its own
  pinned_ = options.pinned || !driver_->is_concurrent();
  data_ =
      static_cast<std::byte*>(driver_->allocate(pinned_ ? Driver::Memory::pinned : Driver::Memory::managed, bytes_));
  if (pinned_) {
    for (std::size_t i = 0; i < segments_.size(); ++i) slot_bytes_ = std::max(slot_bytes_, size_of(i));
    slots_.resize(std::min(kSlots, segments_.size()));
    if (slot_bytes_ > 0) {
      ring_ = static_cast<std::byte*>(driver_->allocate(Driver::Memory::device, slot_bytes_ * slots_.size()));
    }
    for (Slot& slot : slots_) slot.copied_back = driver_->create_event();
  } else {
    driver_->advise(data_, bytes_);
  }
  std::memset(data_, 0, bytes_);  // the host writes it, so it stays on the host until it is fetched
  in_ = driver_->create_stream();
  out_ = driver_->create_stream();
  for (void** event : {&step_began_, &step_ended_, &evicted_}) *event = driver_->create_event();
  for (Segment& segment : segments_) {
    for (void** event : {&segment.fetched, &segment.ready}) *event = driver_->create_event(/*timed=*/true);
    segment.updated = driver_->create_event();
  }
  all_.insert(data_, bytes_, this);
}

PagedArena::Impl::~Impl() {
  if (data_ != nullptr) all_.erase(data_, bytes_);
  std::vector<void*> events{step_began_, step_ended_, evicted_};
  for (const Slot& slot : slots_) events.push_back(slot.copied_back);
  for (const Segment& segment : segments_) {
    events.insert(events.end(), {segment.fetched, segment.ready, segment.updated});
  }
  for (void* event : {step_ended_, evicted_}) {
    if (event != nullptr) driver_->synchronize(event);
  }
  for (void* stream : {in_, out_}) {
    if (stream != nullptr) driver_->destroy_stream(stream);
  }
  for (void* event : events) {
    if (event != nullptr) driver_->destroy_event(event);
  }
  if (ring_ != nullptr) driver_->release(Driver::Memory::device, ring_);
  if (data_ != nullptr) driver_->release(pinned_ ? Driver::Memory::pinned : Driver::Memory::managed, data_);
}

// The entry of the arena whose arrays are exactly this tensor's state. Null if there is none: then the caller uses the
// memory in its own way, and a kernel accesses it without paging, only more slowly.
const PagedArena::Impl::Entry* PagedArena::Impl::entry_of(const Optimizer8bitTensor& tensor,
                                                          Algorithm algorithm) const {
  const auto offset = static_cast<std::size_t>(static_cast<const std::byte*>(tensor.state1) - data_);
  auto found = std::upper_bound(entries_.begin(), entries_.end(), offset,
                                [](std::size_t at, const Entry& entry) { return at < entry.state[0]; });
  if (found == entries_.begin()) return nullptr;
  const Entry& entry = *--found;
  const bool in_8_bits = tensor.absmax1 != nullptr;
  bool matches =
      entry.elements == tensor.elements && entry.in_8_bits() == in_8_bits && entry.moments == moments_of(algorithm);
  for (int k = 0; k < entry.moments; ++k) {
    matches &= state_of(tensor, k) == data_ + entry.state[k];
    if (matches && in_8_bits) matches = reinterpret_cast<std::byte*>(absmax_of(tensor, k)) == data_ + entry.absmax[k];
  }
  return matches ? &entry : nullptr;
}

PagedStats PagedArena::Impl::stats() {
  stats_.bytes_managed = stats_.bytes_resident = 0;
  for (Segment& segment : segments_) {
    count_stall(segment);
    for (const Range& range : segment.ranges) {
      const std::size_t bytes = range.end - range.begin;
      stats_.bytes_managed += static_cast<std::int64_t>(bytes);
      if (pinned_ || bytes == 0 || !driver_->is_on_device(data_ + range.begin, bytes)) continue;
      stats_.bytes_resident += static_cast<std::int64_t>(bytes);
    }
  }
  return stats_;
}

void PagedArena::Impl::count_stall(Segment& segment) {
  if (!segment.uncounted || !driver_->is_done(segment.ready) || !driver_->is_done(segment.fetched)) return;
  if (driver_->is_earlier(segment.ready, segment.fetched)) ++stats_.stalls;
  segment.uncounted = false;
}

// ---- a step ----

// Calls f(home, address in the slot, bytes) for each range of a segment.
template <class F>
void PagedArena::Impl::each_in_slot(const Segment& segment, const F& f) const {
  std::byte* at = ring_ + segment.slot * slot_bytes_;
  for (const Range& range : segment.ranges) {
    f(data_ + range.begin, at, range.end - range.begin);
    at += round_up(range.end - range.begin, kPagedAlignment);
  }
}

void* PagedArena::Impl::resident(std::size_t segment, void* home) const {
  if (!pinned_) return home;
  auto* const p = static_cast<std::byte*>(home);
  void* found = nullptr;
  each_in_slot(segments_[segment], [&](std::byte* begin, std::byte* at, std::size_t bytes) {
    if (p >= begin && p < begin + bytes) found = at + (p - begin);
  });
  return found;
}

// Nothing moves before the caller's stream has reached this point: the stream may have written to the state, and until
// the backward pass has ended, its activations need the memory. Fetching also waits for what the last step sent back.
void PagedArena::Impl::begin(void* stream) {
  driver_->record(step_began_, stream);
  driver_->wait(in_, step_began_);
  driver_->wait(out_, step_began_);
  driver_->wait(in_, evicted_);
}

void PagedArena::Impl::fetch(std::size_t index) {
  Segment& segment = segments_[index];
  count_stall(segment);
  if (pinned_) {
    segment.slot = next_slot_++ % slots_.size();
    Slot& slot = slots_[segment.slot];
    if (slot.used) driver_->wait(in_, slot.copied_back);
    each_in_slot(segment, [&](std::byte* home, std::byte* at, std::size_t n) { driver_->copy(at, home, n, in_); });
  } else {
    for (const Range& range : segment.ranges) {
      driver_->prefetch(data_ + range.begin, range.end - range.begin, Driver::Place::device, in_);
    }
    segment.resident = true;
  }
  driver_->record(segment.fetched, in_);
  ++stats_.prefetches;
}

void PagedArena::Impl::begin_update(std::size_t index, void* stream) {
  Segment& segment = segments_[index];
  driver_->record(segment.ready, stream);
  driver_->wait(stream, segment.fetched);
  segment.uncounted = true;
}

void PagedArena::Impl::end_update(std::size_t index, void* stream, bool evict) {
  Segment& segment = segments_[index];
  if (!pinned_ && !evict) return;
  driver_->record(segment.updated, stream);
  driver_->wait(out_, segment.updated);
  if (pinned_) {
    Slot& slot = slots_[segment.slot];
    each_in_slot(segment, [&](std::byte* home, std::byte* at, std::size_t n) { driver_->copy(home, at, n, out_); });
    driver_->record(slot.copied_back, out_);
    slot.used = true;
  } else {
    for (const Range& range : segment.ranges) {
      driver_->prefetch(data_ + range.begin, range.end - range.begin, Driver::Place::host, out_);
    }
    segment.resident = false;
  }
}

// After this, work in the caller's stream finds the updated state. Managed memory is valid wherever it lies; the ring
// must first have been copied back.
void PagedArena::Impl::finish(void* stream) {
  driver_->record(evicted_, out_);
  if (pinned_) driver_->wait(stream, evicted_);
  driver_->record(step_ended_, stream);
}

// ---- the public class ----

namespace {

std::unique_ptr<Driver> driver_of(const Stream& stream) {
  const Backend& backend = backend_for(stream);
  if (backend.make_driver == nullptr) {
    throw Unavailable("PagedArena: the backend cpu pages nothing; state of the CPU is ordinary memory");
  }
  return backend.make_driver(stream.index);
}

}  // namespace

std::unique_ptr<PagedArena::Impl> PagedArena::Impl::make(std::unique_ptr<Driver> driver,
                                                         const std::vector<PagedState>& states,
                                                         const PagedOptions& options) {
  for (std::size_t i = 0; i < states.size(); ++i) {
    const std::int64_t elements = states[i].elements;
    check(elements >= 0, [&] { return "states[" + std::to_string(i) + "].elements"; }, ">= 0", elements);
  }
  check(options.segment_bytes >= 1, "segment_bytes", ">= 1", options.segment_bytes);
  auto impl = std::make_unique<Impl>(std::move(driver));
  impl->open(states, options);
  return impl;
}

PagedArena::PagedArena(const std::vector<PagedState>& states, const Stream& stream, const PagedOptions& options)
    : impl_(Impl::make(driver_of(stream), states, options)) {}
PagedArena::PagedArena(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

PagedArena::~PagedArena() = default;

std::byte* PagedArena::data() const { return impl_->data(); }
std::size_t PagedArena::bytes() const { return impl_->bytes(); }
PagedStats PagedArena::stats() { return impl_->stats(); }

void PagedArena::place(std::size_t index, Optimizer8bitTensor& tensor) const {
  const Impl::Entry& entry = impl_->entry(index);
  for (int k = 0; k < kMaxMoments; ++k) {
    const bool is_there = k < entry.moments;
    state_of(tensor, k) = is_there ? data() + entry.state[k] : nullptr;
    absmax_of(tensor, k) = is_there && entry.in_8_bits() ? reinterpret_cast<float*>(data() + entry.absmax[k]) : nullptr;
  }
}

}  // namespace qlora_native
