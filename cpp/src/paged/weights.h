// The implementation of PagedWeights: where the weights lie, and when they move. WeightUse is what a product knows of
// it.
//
// The weights lie in pinned memory, where PagedArena prefers managed memory. Weights do not change, so a copy need only
// be overwritten when its place is needed: after the products that read it, which a stream can wait for. Managed memory
// would either be sent back over the bus, or, as read-mostly memory, lose its copy by cudaMemAdvise, which follows no
// stream. And the budget holds by construction: over-subscribed managed memory can hang a card.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "paged/access_order.h"
#include "paged/address_map.h"
#include "paged/driver.h"
#include "paged/placement.h"
#include "qlora_native/paged_weights.h"

namespace qlora_native {

class PagedWeights::Impl {
 public:
  using Arrays = std::vector<std::vector<std::size_t>>;

  Impl(std::unique_ptr<Driver> driver, const Arrays& weights, std::size_t device_bytes);
  ~Impl();  // also cleans up if open() has thrown
  static std::unique_ptr<Impl> make(std::unique_ptr<Driver> driver, const Arrays& weights, std::size_t device_bytes);
  // For tests, which pass a driver of their own.
  static std::unique_ptr<PagedWeights> make_weights(std::unique_ptr<Driver> driver, const Arrays& weights,
                                                    std::size_t device_bytes) {
    return std::unique_ptr<PagedWeights>(new PagedWeights(make(std::move(driver), weights, device_bytes)));
  }
  void open();

  std::byte* data(std::size_t weight, std::size_t array);
  void release(std::size_t weight);
  void written(std::size_t weight, void* stream);
  PagedWeightsStats stats();

  struct Owner {  // of an address
    Impl* impl = nullptr;
    std::size_t weight = 0;
  };
  static Owner find(const void* array) { return all_.find(array); }

  // A use of a weight: the product is put into the stream between these two, under the lock.
  std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }
  void begin_use(std::size_t weight, void* stream);
  void end_use(std::size_t weight, void* stream);
  // The address of the copy of an array of a weight whose use has begun.
  const void* resident(std::size_t weight, const void* array) const;

 private:
  struct Weight {
    std::vector<std::size_t> arrays;  // the offset of each
    std::size_t bytes = 0;
    std::byte* home = nullptr;  // in the host's memory; null before data() and after release()
    void* fetched = nullptr;    // event: the copy is complete
    void* ready = nullptr;  // event: the caller's stream has reached the first product with a copy that was expected
    void* used = nullptr;   // event: the latest product has ended
    bool was_fetched = false;
    bool was_used = false;      // since the copy was made
    bool is_expected = false;   // the copy was made ahead of a product that has not come yet
    bool is_uncounted = false;  // it is not known yet whether that product had to wait
  };

  void allocate(Weight& weight, std::size_t index);
  void fetch(std::size_t weight, std::size_t kept);
  void check_not_captured(void* stream) const;
  void free_copy(Weight& weight);
  void drop(std::size_t weight);
  void count_stall(Weight& weight);

  std::mutex mutex_;
  std::unique_ptr<Driver> driver_;
  std::vector<Weight> weights_;
  AccessOrder order_;
  std::size_t device_bytes_;
  Placement placement_;
  std::byte* device_ = nullptr;
  void* copies_ = nullptr;   // the stream that copies to the device
  void* written_ = nullptr;  // event
  PagedWeightsStats stats_;

  static AddressMap<Owner> all_;
};

// While it lives, a product may read `weight`: if it is paged, its pointers become those of the copy on the device. The
// product is put into `stream` meanwhile.
class WeightUse {
 public:
  WeightUse(QuantizedWeightView& weight, const Stream& stream);
  WeightUse(const WeightUse&) = delete;
  WeightUse& operator=(const WeightUse&) = delete;
  ~WeightUse();

 private:
  PagedWeights::Impl::Owner owner_;
  std::unique_lock<std::mutex> lock_;
  void* stream_ = nullptr;
};

}  // namespace qlora_native
