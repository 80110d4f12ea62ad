#include "cpu/scratch.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "huge_pages.h"

namespace qlora_native {
namespace {

// What fills much of a core's second-level cache must be spread evenly over its sets. Pages of 4 KB come from anywhere,
// and where several fall on the same sets they put each other out: dX of 64 rows takes 5 % less time in pages of 2 MB.
// From this size on.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kLeastBytes = SIZE_MAX;  // every slot ends where its memory does
#else
constexpr std::size_t kLeastBytes = std::size_t{256} << 10;
#endif
constexpr std::size_t kAlignment = 64;

constexpr std::size_t round_up(std::size_t bytes, std::size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

std::byte* allocate(std::size_t bytes, std::size_t alignment) {
  void* const data = std::aligned_alloc(alignment, bytes);
  if (data == nullptr) throw std::bad_alloc();
  return static_cast<std::byte*>(data);
}

std::byte* huge_pages(std::size_t bytes) {
  std::byte* const data = allocate(bytes, kHugePageBytes);
  ask_for_huge_pages(data, bytes);
  return data;
}

// Halves of huge pages, so that a task's memory takes 1 MB of each thread.
class Halves {
 public:
  static constexpr std::size_t kBytes = kHugePageBytes / 2;

  std::byte* take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
      all_ += 2;
      free_.reserve(all_);  // give_back() must not fail
      std::byte* const page = huge_pages(kHugePageBytes);
      free_ = {page + kBytes, page};
    }
    std::byte* const half = free_.back();
    free_.pop_back();
    return half;
  }
  void give_back(std::byte* half) {
    const std::lock_guard lock(mutex_);
    free_.push_back(half);
  }

 private:
  std::mutex mutex_;
  std::vector<std::byte*> free_;
  std::size_t all_ = 0;
};
// Never destroyed: threads end after it would be.
Halves& halves() {
  static Halves* const all = new Halves;
  return *all;
}

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  std::byte* at_least(std::size_t bytes) {
    if (bytes > capacity_) {
      release();
      if (bytes < kLeastBytes) {
        bytes = round_up(bytes, kAlignment);
        data_ = allocate(bytes, kAlignment);
      } else if (bytes <= Halves::kBytes) {
        bytes = Halves::kBytes;
        data_ = halves().take();
        is_half_ = true;
      } else {
        bytes = round_up(bytes, kHugePageBytes);
        data_ = huge_pages(bytes);
      }
      capacity_ = bytes;
    }
    return data_;
  }

 private:
  void release() {
    if (is_half_)
      halves().give_back(data_);
    else
      std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    is_half_ = false;
  }

  std::byte* data_ = nullptr;
  std::size_t capacity_ = 0;
  bool is_half_ = false;
};

}  // namespace

std::byte* scratch(Slot slot, std::size_t bytes) {
  thread_local Buffer call, thread;
  return (slot == Slot::call ? call : thread).at_least(bytes);
}

}  // namespace qlora_native
