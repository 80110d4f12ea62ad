// Implements hopper.cuh over the emulator (emulator/async.h says which mistakes it finds).
#pragma once

#include <memory>
#include <string>

#include "device/instructions_emulated.h"
#include "qlora_native/error.h"

namespace qlora_native::cuda_emulated {

// ---- for host code ----

class TensorMap {
 public:
  TensorMap() { source_.name = nullptr; }
  explicit TensorMap(const TileSource& source) : source_(source) {
    emulator::check_context("cuTensorMapEncodeTiled");
    if (const std::string fault = source.fault(); !fault.empty()) {
      throw Error(source.name, "an operand of which TMA can load tiles", fault);
    }
    source_.name = nullptr;  // an address of the host's must not be in a kernel's argument
  }
  const TileSource& source() const { return source_; }

 private:
  TileSource source_;
};

// ---- barriers ----

inline std::uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

// Like sync_threads(), but for only `threads` threads of the block, at the barrier kNumber (1 ... 15).
template <int kNumber>
void sync_named_barrier(int threads, Site site = Site::current()) {
  emulator::named_barrier(kNumber, threads, site);
}

inline void mbarrier_init(std::uint64_t* barrier, int arrivals) { emulator::mbarrier_init(barrier, arrivals); }
// The thread that has initialized barriers calls this; then TMA may arrive at them.
inline void fence_mbarrier_init() { emulator::mbarrier_publish(); }
inline void mbarrier_arrive(std::uint64_t* barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  emulator::mbarrier_arrive(barrier, bytes);
}
// Waits until the phase of this parity is complete. It is the current phase or the one before, which is complete.
inline void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity, Site site = Site::current()) {
  emulator::mbarrier_wait(barrier, parity, /*in_cluster=*/false, site);
}
// The same for a barrier at which the bytes of other blocks' store_async() count: they are visible after this.
inline void mbarrier_wait_in_cluster(std::uint64_t* barrier, std::uint32_t parity, Site site = Site::current()) {
  emulator::mbarrier_wait(barrier, parity, /*in_cluster=*/true, site);
}

// ---- clusters ----

// Waits for all threads of all blocks of the cluster. What they have loaded and stored before precedes what any of them
// does after it, for which a device waits for all stores of each thread.
inline void sync_cluster(Site site = Site::current()) { emulator::cluster_barrier(/*releases=*/true, site); }
// The same without that order: it only shows barriers that fence_mbarrier_init() has published.
inline void sync_cluster_relaxed(Site site = Site::current()) { emulator::cluster_barrier(/*releases=*/false, site); }
// Stores a vector where block `rank` of the cluster, from 0 on, has what this block has at `to`, in shared memory. Its
// bytes count at the barrier that has the place of `barrier` there. The other block must not end before. A
// sync_cluster() must separate this from what the other block has done with that memory.
inline void store_async(const SharedAddress& to, const Vector<float, 4>& value, std::uint64_t* barrier, int rank) {
  emulator::store_async(to.address, reinterpret_cast<const std::byte*>(&value), barrier, rank);
}

// The barriers that block `rank` of the cluster has where this block has `barriers`; rank 0 is this block where there
// are no clusters. To arrive at one orders nothing that threads store or load, but what wgmma has read before the wait
// for it.
class ClusterMbarriers {
 public:
  ClusterMbarriers(std::uint64_t* barriers, int rank) : barriers_(barriers), rank_(rank) {}
  void arrive(std::uint32_t i) const { emulator::mbarrier_arrive_at_block(barriers_ + i, rank_); }

 private:
  std::uint64_t* const barriers_;
  const int rank_;
};

// ---- the copy engine, and what it and wgmma may read ----

inline void tma_load_tile(void* to, const TensorMap& map, int row, int col, std::uint64_t* barrier) {
  emulator::load_tile(to, map.source(), row, col, barrier);
}
// Copies a tile to the same place in the shared memory of several blocks of the cluster, those whose bits are set in
// `ranks`. In each of them its bytes count at the barrier that has the place of `barrier`.
inline void tma_load_tile_multicast(void* to, const TensorMap& map, int row, int col, std::uint64_t* barrier,
                                    std::uint16_t ranks) {
  emulator::load_tile_to_blocks(to, map.source(), row, col, barrier, ranks);
}
inline void prefetch_map(const TensorMap&) {}
// Prefetches the kSectorBytes of global memory around an address into L2.
inline void prefetch_sector(const std::byte* global) {
  static_cast<void>(*static_cast<const volatile std::byte*>(global));
}
inline void fence_proxy_async() { emulator::publish_shared_stores(); }

// ---- products of a warpgroup ----

// Must precede the first product, and again each one after registers that products use may have been changed.
inline void wgmma_fence() { emulator::wgmma_queue().fence(); }

// d[64, kCols] += a[64, 16] . b[16, kCols] by the warpgroup, whose warps have 16 rows each. The lanes of a warp hold a
// and d as in mma_16x8x16 (device/instructions_emulated.h), with d for eight columns after the other. d must not be
// read, nor a or d changed, before wgmma_wait().
template <class T, int kCols>
void wgmma(float (&d)[kCols / 2], const std::uint32_t (&a)[4], std::uint64_t b_descriptor,
           Site site = Site::current()) {
  struct Lane {
    const std::uint32_t (&a)[4];
    std::uint64_t b_descriptor;
    std::shared_ptr<emulator::WgmmaProduct> product;
  } lane{a, b_descriptor, nullptr};
  emulator::warpgroup_collective(
      &lane,
      [](void* const* lanes) {
        const auto of = [&](int i) -> Lane& { return *static_cast<Lane*>(lanes[i]); };
        const auto product =
            emulator::begin_wgmma([](std::uint16_t bits) { return to_f32(T{bits}); }, kCols, of(0).b_descriptor);
        for (int i = 0; i < 4 * kWarp; ++i) {
          if (of(i).b_descriptor != of(0).b_descriptor) emulator::fail("wgmma: threads have other descriptors");
          product->set_a(i, of(i).a);
          of(i).product = product;
        }
        emulator::compute_if_early(*product);
      },
      site);
  emulator::wgmma_queue().add(lane.product, thread_index() % (4 * kWarp), a, d, kCols / 2);
}
inline void wgmma_commit() { emulator::wgmma_queue().commit(); }
// Waits until at most kGroupsLeft groups of products are in flight.
template <int kGroupsLeft>
void wgmma_wait() {
  emulator::wgmma_queue().wait(kGroupsLeft);
}
// Waits until no group is in flight; then d may be read.
template <int kCount>
void wgmma_wait_for(float (&)[kCount]) {
  wgmma_wait<0>();
}

// Sets how many registers each thread of the warpgroup may use: fewer or more than the kernel begins with.
template <int kCount>
void decrease_max_registers(Site site = Site::current()) {
  emulator::set_max_registers(kCount, site);
}
template <int kCount>
void increase_max_registers(Site site = Site::current()) {
  emulator::set_max_registers(kCount, site);
}

}  // namespace qlora_native::cuda_emulated
