#include "cpu/runtime/scratch.h"

#include <cstdlib>
#include <new>

namespace qlora_native {
namespace {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  std::byte* at_least(std::size_t bytes) {
    if (bytes > capacity_) {
      constexpr std::size_t kAlignment = 64;
      std::free(data_);
      capacity_ = 0;
      const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      data_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = rounded;
    }
    return data_;
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t capacity_ = 0;
};

}  // namespace

std::byte* scratch(Slot slot, std::size_t bytes) {
  thread_local Buffer call, thread;
  return (slot == Slot::call ? call : thread).at_least(bytes);
}

float* scratch_floats(Slot slot, std::int64_t count) {
  return reinterpret_cast<float*>(scratch(slot, static_cast<std::size_t>(count) * sizeof(float)));
}

}  // namespace qlora_native
