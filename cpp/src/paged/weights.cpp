#include "paged/weights.h"

#include <algorithm>
#include <exception>
#include <string>
#include <type_traits>
#include <utility>

#include "backend.h"
#include "check.h"

namespace qlora_native {
namespace {

std::size_t aligned(std::size_t bytes) {
  return std::max<std::size_t>((bytes + kPagedAlignment - 1) / kPagedAlignment, 1) * kPagedAlignment;
}

std::vector<std::size_t> sizes_of(const PagedWeights::Impl::Arrays& weights) {
  std::vector<std::size_t> sizes;
  for (const std::vector<std::size_t>& arrays : weights) {
    std::size_t bytes = 0;
    for (const std::size_t array : arrays) bytes += aligned(array);
    sizes.push_back(std::max(bytes, kPagedAlignment));
  }
  return sizes;
}

// Not more than all weights need.
std::size_t checked_device_bytes(const std::vector<std::size_t>& sizes, std::size_t device_bytes) {
  check(!sizes.empty(), "weights", "at least one", "none");
  const std::size_t least = Placement::least_bytes(sizes), largest = *std::max_element(sizes.begin(), sizes.end());
  check(
      device_bytes >= least, "device_bytes",
      [&] {
        return "at least " + std::to_string(least) + ", for the two largest weights, of " + std::to_string(largest) +
               " and " + std::to_string(least - largest) + " bytes: one is multiplied by while the next arrives";
      },
      device_bytes);
  std::size_t all = 0;
  for (const std::size_t size : sizes) all += size;
  return std::min(device_bytes, all);
}

std::unique_ptr<Driver> driver_of(const Stream& stream) {
  const Backend& backend = backend_for(stream);
  if (backend.make_driver == nullptr) {
    throw Unavailable("PagedWeights: the backend cpu pages nothing; weights of the CPU are ordinary memory");
  }
  return backend.make_driver(stream.index);
}

}  // namespace

AddressMap<PagedWeights::Impl::Owner> PagedWeights::Impl::all_;

// ---- memory ----

PagedWeights::Impl::Impl(std::unique_ptr<Driver> driver, const Arrays& weights, std::size_t device_bytes)
    : driver_(std::move(driver)),
      weights_(weights.size()),
      order_(weights.size()),
      device_bytes_(checked_device_bytes(sizes_of(weights), device_bytes)),
      placement_(device_bytes_, sizes_of(weights)) {
  for (std::size_t i = 0; i < weights.size(); ++i) {
    Weight& weight = weights_[i];
    for (const std::size_t bytes : weights[i]) {
      weight.arrays.push_back(weight.bytes);
      weight.bytes += aligned(bytes);
    }
  }
}

void PagedWeights::Impl::open() {
  device_ = static_cast<std::byte*>(driver_->allocate(Driver::Memory::device, device_bytes_));
  copies_ = driver_->create_stream();
  written_ = driver_->create_event();
}

PagedWeights::Impl::~Impl() {
  try {
    for (std::size_t i = 0; i < weights_.size(); ++i) release(i);
    if (written_ != nullptr) {
      driver_->record(written_, copies_);  // the stream waits for the products with each copy that it has dropped
      driver_->synchronize(written_);
    }
  } catch (const std::exception&) {
    // The device has failed, or the program ends and the driver is gone.
  }
  if (written_ != nullptr) driver_->destroy_event(written_);
  if (copies_ != nullptr) driver_->destroy_stream(copies_);
  if (device_ != nullptr) driver_->release(Driver::Memory::device, device_);
}

std::byte* PagedWeights::Impl::data(std::size_t index, std::size_t array) {
  const std::unique_lock held = lock();
  Weight& weight = weights_.at(index);
  const std::size_t offset = weight.arrays.at(array);
  if (weight.home == nullptr) allocate(weight, index);
  return weight.home + offset;
}

// If this throws, the weight is as it was.
void PagedWeights::Impl::allocate(Weight& weight, std::size_t index) {
  Weight made{.arrays = weight.arrays, .bytes = weight.bytes};
  made.home = static_cast<std::byte*>(driver_->allocate(Driver::Memory::pinned, weight.bytes));
  try {
    for (void** event : {&made.fetched, &made.ready}) *event = driver_->create_event(/*timed=*/true);
    made.used = driver_->create_event();
    all_.insert(made.home, made.bytes, {this, index});
  } catch (...) {
    for (void* event : {made.fetched, made.ready, made.used})
      if (event != nullptr) driver_->destroy_event(event);
    driver_->release(Driver::Memory::pinned, made.home);
    throw;
  }
  weight = std::move(made);
  stats_.bytes_managed += static_cast<std::int64_t>(weight.bytes);
}

// Products read the copy on the device, so only copies read the host's memory.
void PagedWeights::Impl::release(std::size_t index) {
  const std::unique_lock held = lock();
  Weight& weight = weights_.at(index);
  if (weight.home == nullptr) return;
  all_.erase(weight.home, weight.bytes);
  drop(index);
  if (weight.was_fetched) driver_->synchronize(weight.fetched);
  count_stall(weight);
  for (void* event : {weight.fetched, weight.ready, weight.used}) driver_->destroy_event(event);
  driver_->release(Driver::Memory::pinned, weight.home);
  stats_.bytes_managed -= static_cast<std::int64_t>(weight.bytes);
  weight = {.arrays = std::move(weight.arrays), .bytes = weight.bytes};
}

void PagedWeights::Impl::check_not_captured(void* stream) const {
  check(!driver_->is_capturing(stream), "stream", "one that is not captured into a graph, for paged weights move",
        "one that is");
}

// Later copies may overwrite the copy of this weight, once the products with it have ended.
void PagedWeights::Impl::free_copy(Weight& weight) {
  if (weight.was_used) driver_->wait(copies_, weight.used);
  weight.was_used = false;
}

void PagedWeights::Impl::drop(std::size_t index) {
  if (!placement_.holds(index)) return;
  free_copy(weights_[index]);
  placement_.remove(index);
}

void PagedWeights::Impl::written(std::size_t index, void* stream) {
  const std::unique_lock held = lock();
  check_not_captured(stream);
  driver_->record(written_, stream);
  driver_->wait(copies_, written_);
  drop(index);
}

PagedWeightsStats PagedWeights::Impl::stats() {
  const std::unique_lock held = lock();
  stats_.bytes_resident = 0;
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    if (weights_[i].home != nullptr) count_stall(weights_[i]);
    if (placement_.holds(i)) stats_.bytes_resident += static_cast<std::int64_t>(weights_[i].bytes);
  }
  return stats_;
}

void PagedWeights::Impl::count_stall(Weight& weight) {
  if (!weight.is_uncounted || !driver_->is_done(weight.ready) || !driver_->is_done(weight.fetched)) return;
  if (driver_->is_earlier(weight.ready, weight.fetched)) ++stats_.stalls;
  weight.is_uncounted = false;
}

// ---- products ----

const void* PagedWeights::Impl::resident(std::size_t index, const void* array) const {
  return device_ + placement_.begin(index) + (static_cast<const std::byte*>(array) - weights_[index].home);
}

void PagedWeights::Impl::fetch(std::size_t index, std::size_t kept) {
  Weight& weight = weights_[index];
  count_stall(weight);
  weight.is_expected = weight.is_uncounted = false;
  for (const std::size_t gone : placement_.place(index, kept, order_.distances())) free_copy(weights_[gone]);
  driver_->copy(device_ + placement_.begin(index), weight.home, weight.bytes, copies_);
  driver_->record(weight.fetched, copies_);
  weight.was_fetched = true;
  stats_.bytes_fetched += static_cast<std::int64_t>(weight.bytes);
}

void PagedWeights::Impl::begin_use(std::size_t index, void* stream) {
  check_not_captured(stream);
  order_.use(index);
  Weight& weight = weights_[index];
  if (!placement_.holds(index)) {
    fetch(index, Placement::kNone);
    ++stats_.faults;
  }
  const std::size_t next = order_.next();
  if (next != index && weights_[next].home != nullptr && !placement_.holds(next)) {
    fetch(next, index);
    weights_[next].is_expected = true;
    ++stats_.prefetches;
  }
  if (weight.is_expected) {
    driver_->record(weight.ready, stream);
    weight.is_expected = false;
    weight.is_uncounted = true;
  }
  driver_->wait(stream, weight.fetched);
}

void PagedWeights::Impl::end_use(std::size_t index, void* stream) {
  Weight& weight = weights_[index];
  free_copy(weight);  // the event is about to forget the use before, which may be of another stream
  driver_->record(weight.used, stream);
  weight.was_used = true;
}

WeightUse::WeightUse(QuantizedWeightView& weight, const Stream& stream)
    : owner_(PagedWeights::Impl::find(weight.codes)), stream_(stream.handle) {
  if (owner_.impl == nullptr) return;
  lock_ = owner_.impl->lock();
  owner_.impl->begin_use(owner_.weight, stream_);
  const auto to_copy = [this](auto*& array) {
    // Arrays that are not paged with the codes stay where they are.
    const PagedWeights::Impl::Owner owner = PagedWeights::Impl::find(array);
    if (owner.impl != owner_.impl || owner.weight != owner_.weight) return;
    array = static_cast<std::remove_reference_t<decltype(array)>>(owner.impl->resident(owner.weight, array));
  };
  to_copy(weight.codes);
  to_copy(weight.absmax);
  to_copy(weight.minimum);
  to_copy(weight.zero_point);
}

WeightUse::~WeightUse() {
  if (owner_.impl == nullptr) return;
  try {
    owner_.impl->end_use(owner_.weight, stream_);
  } catch (const std::exception&) {
    // The device has failed, which the next call says too.
  }
}

// ---- the public class ----

std::unique_ptr<PagedWeights::Impl> PagedWeights::Impl::make(std::unique_ptr<Driver> driver, const Arrays& weights,
                                                             std::size_t device_bytes) {
  auto impl = std::make_unique<Impl>(std::move(driver), weights, device_bytes);
  impl->open();
  return impl;
}

PagedWeights::PagedWeights(const std::vector<std::vector<std::size_t>>& weights, std::size_t device_bytes,
                           const Stream& stream)
    : impl_(Impl::make(driver_of(stream), weights, device_bytes)) {}
PagedWeights::PagedWeights(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

PagedWeights::~PagedWeights() = default;

std::byte* PagedWeights::data(std::size_t weight, std::size_t array) { return impl_->data(weight, array); }
void PagedWeights::release(std::size_t weight) { impl_->release(weight); }
PagedWeightsStats PagedWeights::stats() { return impl_->stats(); }

void paged_weight_written(const void* array, const Stream& stream) {
  const PagedWeights::Impl::Owner owner = PagedWeights::Impl::find(array);
  if (owner.impl != nullptr) owner.impl->written(owner.weight, stream.handle);
}

}  // namespace qlora_native
