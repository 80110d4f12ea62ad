// The implementation of PagedArena: where the states lie, and how their segments move in a step.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "common/layout.h"
#include "common/optimizer.h"
#include "paged/address_map.h"
#include "paged/driver.h"
#include "qlora_native/paged.h"

namespace qlora_native {

class PagedArena::Impl {
 public:
  struct Entry {  // the state of one parameter
    std::int64_t elements;
    std::int64_t piece;         // elements in each of its segments, except the last
    std::size_t first_segment;  // if the parameter is one piece, it may share this segment with others
    std::size_t element_bytes;
    int moments;
    std::size_t state[kMaxMoments], absmax[kMaxMoments];  // offsets
    bool in_8_bits() const { return element_bytes == 1; }
    std::size_t state_bytes(std::int64_t count) const { return static_cast<std::size_t>(count) * element_bytes; }
    std::size_t absmax_bytes(std::int64_t count) const {
      return in_8_bits() ? static_cast<std::size_t>(ceil_div(count, kOptimizer8bitBlocksize)) * sizeof(float) : 0;
    }
  };

  explicit Impl(std::unique_ptr<Driver> driver) : driver_(std::move(driver)) {}
  ~Impl();  // also cleans up if open() has thrown
  static std::unique_ptr<Impl> make(std::unique_ptr<Driver> driver, const std::vector<PagedState>& states,
                                    const PagedOptions& options);
  // For tests, which pass a driver of their own.
  static std::unique_ptr<PagedArena> make_arena(std::unique_ptr<Driver> driver, const std::vector<PagedState>& states,
                                                const PagedOptions& options) {
    return std::unique_ptr<PagedArena>(new PagedArena(make(std::move(driver), states, options)));
  }
  void open(const std::vector<PagedState>& states, const PagedOptions& options);

  // The arena in which this address lies, or null.
  static Impl* find(const void* state) { return all_.find(state); }

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  const Entry& entry(std::size_t index) const { return entries_[index]; }
  const Entry* entry_of(const Optimizer8bitTensor& tensor, Algorithm algorithm) const;
  Driver& driver() const { return *driver_; }
  PagedStats stats();

  // The order of calls in a step: begin; then fetch, begin_update and end_update for each segment; then finish.
  // `stream` is the caller's stream; the update of a segment is put into it between these two.
  void begin(void* stream);
  void fetch(std::size_t segment);
  void begin_update(std::size_t segment, void* stream);
  void end_update(std::size_t segment, void* stream, bool evict);
  void finish(void* stream);

  std::size_t bytes_to_fetch(std::size_t segment) const { return segments_[segment].resident ? 0 : size_of(segment); }
  // The address at which a kernel finds the data of `home`, an address in a segment whose update has begun.
  void* resident(std::size_t segment, void* home) const;

 private:
  struct Range {  // offsets of bytes in the arena
    std::size_t begin, end;
  };
  struct Segment {
    std::vector<Range> ranges;
    void* fetched = nullptr;  // event: the segment is on the device
    void* ready = nullptr;    // event: the caller's stream has reached the update
    void* updated = nullptr;
    bool resident = false;   // only for managed memory: the segment was fetched and not sent back
    bool uncounted = false;  // it is not known yet whether the update had to wait
    std::size_t slot = 0;    // its place in the ring
  };
  struct Slot {
    void* copied_back = nullptr;  // event
    bool used = false;
  };

  void lay_out(const std::vector<PagedState>& states, std::size_t segment_bytes);
  std::size_t array(std::size_t bytes, std::size_t alignment);
  std::size_t size_of(std::size_t segment) const;
  void count_stall(Segment& segment);
  template <class F>
  void each_in_slot(const Segment& segment, const F& f) const;

  std::unique_ptr<Driver> driver_;
  std::vector<Entry> entries_;
  std::vector<Segment> segments_;
  std::size_t bytes_ = 0;
  std::byte* data_ = nullptr;
  bool pinned_ = false;

  std::byte* ring_ = nullptr;
  std::size_t slot_bytes_ = 0;
  std::vector<Slot> slots_;
  std::size_t next_slot_ = 0;

  void *in_ = nullptr, *out_ = nullptr;  // the streams that copy to the device and from it
  void *step_began_ = nullptr, *step_ended_ = nullptr, *evicted_ = nullptr;
  PagedStats stats_;

  static AddressMap<Impl*> all_;
};

}  // namespace qlora_native
