// AddressMap finds what the memory at an address belongs to. Several threads may use it at once.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <shared_mutex>

namespace qlora_native {

template <class Owner>
class AddressMap {
 public:
  void insert(const std::byte* data, std::size_t bytes, const Owner& owner) {
    const std::unique_lock lock(mutex_);
    by_end_[data + bytes] = {data, owner};
  }
  void erase(const std::byte* data, std::size_t bytes) {
    const std::unique_lock lock(mutex_);
    by_end_.erase(data + bytes);
  }
  // The owner of the byte at this address; Owner{} if there is none.
  Owner find(const void* address) const {
    const auto* const at = static_cast<const std::byte*>(address);
    const std::shared_lock lock(mutex_);
    const auto found = by_end_.upper_bound(at);
    return found != by_end_.end() && found->second.data <= at ? found->second.owner : Owner{};
  }

 private:
  struct Range {
    const std::byte* data;
    Owner owner;
  };
  std::map<const std::byte*, Range> by_end_;
  mutable std::shared_mutex mutex_;
};

}  // namespace qlora_native
