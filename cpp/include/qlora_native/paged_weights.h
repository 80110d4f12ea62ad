// PagedWeights: memory for frozen weights that do not fit on the GPU.
//
// The weights lie in pinned memory of the host. linear_forward and linear_backward_input recognize a weight by its
// address, and read a copy of it in a part of the device's memory that has a fixed size. While one product runs, the
// weight of the next is copied to the device on a stream of its own: the order of the products is learnt from the first
// training step. Only what the device has no copy of is copied, and nothing is copied back. If there is no room, the
// weights that are needed last make room. Only the caller's stream waits, on events.
//
// The other operations read a paged weight where it lies, over the bus; so do an application's kernels. A product with
// a paged weight in a stream that is captured into a graph is an Error, because the graph would keep the address of a
// copy.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "qlora_native/types.h"

namespace qlora_native {

struct PagedWeightsStats {
  std::int64_t bytes_managed = 0;   // the weights in the host's memory
  std::int64_t bytes_resident = 0;  // the part of them of which the device has a copy
  std::int64_t bytes_fetched = 0;   // what was copied to the device, all in all
  std::int64_t prefetches = 0;      // how many weights were copied ahead of their product
  std::int64_t stalls = 0;          // how many of these a product had to wait for; counted once both have happened
  std::int64_t faults = 0;          // how many were copied when their product was called, because it was not expected
};

// Several threads may multiply by the weights of one object; they call their products one after another.
class QLN_API PagedWeights {
 public:
  // weights[i] has the bytes of each array of a weight: its codes, and what else of QuantizedWeightView has an element
  // for each block. They move together. The device of `stream` multiplies, and gives at most `device_bytes` of its
  // memory, which must hold the two largest weights. Throws Error; throws Unavailable if the backend of the device has
  // no paging, as the cpu's.
  PagedWeights(const std::vector<std::vector<std::size_t>>& weights, std::size_t device_bytes, const Stream& stream);
  PagedWeights(const PagedWeights&) = delete;
  PagedWeights& operator=(const PagedWeights&) = delete;
  ~PagedWeights();  // waits until the device has done the products with these weights

  // An array of a weight, in memory of the host which the device can read. The first call for a weight allocates its
  // memory. It is for the host to fill; what is written later must be told by paged_weight_written().
  std::byte* data(std::size_t weight, std::size_t array);
  // Frees the memory of a weight, once the device has done the products with it.
  void release(std::size_t weight);
  PagedWeightsStats stats();  // waits for nothing

  class Impl;

 private:
  explicit PagedWeights(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// To be called after an array of a paged weight was written by the host, or by work that was put into the stream: the
// copy on the device no longer counts. Does nothing if no PagedWeights has memory at this address.
QLN_API void paged_weight_written(const void* array, const Stream& stream);

}  // namespace qlora_native
