// What is behind PagedArena: where the states lie, and how their stretches come and go in a step.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <shared_mutex>
#include <vector>

#include "common/layout.h"
#include "common/optimizer.h"
#include "paged/driver.h"
#include "qlora_native/paged.h"

namespace qlora_native {

class PagedArena::Impl {
 public:
  struct Entry {  // a parameter's state
    std::int64_t elements;
    std::int64_t piece;         // elements in each of its stretches, but the last
    std::size_t first_stretch;  // shared with others where one piece is all
    std::size_t element_bytes;
    int moments;
    std::size_t state[kMostMoments], absmax[kMostMoments];  // offsets
    bool in_8_bits() const { return element_bytes == 1; }
    std::size_t state_bytes(std::int64_t count) const { return static_cast<std::size_t>(count) * element_bytes; }
    std::size_t absmax_bytes(std::int64_t count) const {
      return in_8_bits() ? static_cast<std::size_t>(ceil_div(count, kOptimizer8bitBlocksize)) * sizeof(float) : 0;
    }
  };

  explicit Impl(std::unique_ptr<Driver> driver) : driver_(std::move(driver)) {}
  ~Impl();  // also of what open() left half done
  void open(const std::vector<PagedState>& states, const PagedOptions& options);

  static Impl* find(const void* state);  // the arena in which this address lies, or null

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  const Entry& entry(std::size_t index) const { return entries_[index]; }
  const Entry* entry_of(const Optimizer8bitTensor& tensor, Algorithm algorithm) const;
  Driver& driver() const { return *driver_; }
  PagedStats stats();

  // The order of calls in a step: begin, then fetch, enter and leave of each stretch, then finish. `stream` is the
  // caller's, in which the stretch is updated between enter and leave.
  void begin(void* stream);
  void fetch(std::size_t stretch);
  void enter(std::size_t stretch, void* stream);
  void leave(std::size_t stretch, void* stream, bool evict);
  void finish(void* stream);

  std::size_t bytes_to_come(std::size_t stretch) const { return stretches_[stretch].resident ? 0 : size_of(stretch); }
  // Where a kernel finds what lies at `home`, in a stretch that was entered.
  void* resident(std::size_t stretch, void* home) const;

 private:
  struct Range {  // bytes of the arena
    std::size_t begin, end;
  };
  struct Stretch {
    std::vector<Range> ranges;
    void* fetched = nullptr;  // an event: it has come
    void* ready = nullptr;    // the update could begin
    void* updated = nullptr;
    bool resident = false;   // managed memory: it was asked for, and not sent back
    bool uncounted = false;  // whether it stalled is not known yet
    std::size_t slot = 0;    // of the ring
  };
  struct Slot {
    void* copied_back = nullptr;  // an event
    bool used = false;
  };

  void lay_out(const std::vector<PagedState>& states, std::size_t stretch_bytes);
  std::size_t array(std::size_t bytes, std::size_t alignment);
  std::size_t size_of(std::size_t stretch) const;
  void count_stall(Stretch& stretch);
  template <class F>
  void each_in_slot(const Stretch& stretch, const F& f) const;

  std::unique_ptr<Driver> driver_;
  std::vector<Entry> entries_;
  std::vector<Stretch> stretches_;
  std::size_t bytes_ = 0;
  std::byte* data_ = nullptr;
  bool pinned_ = false;

  std::byte* ring_ = nullptr;
  std::size_t slot_bytes_ = 0;
  std::vector<Slot> slots_;
  std::size_t next_slot_ = 0;

  void *in_ = nullptr, *out_ = nullptr;  // streams, to the device and from it
  void *entered_ = nullptr, *left_ = nullptr, *sent_ = nullptr;
  PagedStats stats_;

  static std::map<const std::byte*, Impl*> all_;  // by where they end
  static std::shared_mutex all_mutex_;
};

}  // namespace qlora_native
