// Implements hopper.cuh by PTX: each instruction of sm_90a is a function here. The comments in
// instructions_hopper_emulated.h say what each does. Only files of cuda/product/wgmma/ include this one, because no
// other architecture has these instructions.
#pragma once

#include <cuda.h>

#include "device/instructions.cuh"

namespace qlora_native::cuda {

// ---- for host code ----

// A kernel must take this as a __grid_constant__ parameter, because TMA reads the map at its address.
class TensorMap {
 public:
  TensorMap() = default;
  explicit TensorMap(const TileSource& source);  // product/wgmma/tensor_map.cu
  __device__ __forceinline__ const CUtensorMap* map() const { return &map_; }

 private:
  CUtensorMap map_;
};

// ---- barriers ----

template <int kNumber>
__device__ __forceinline__ void sync_named_barrier(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "r"(threads) : "memory");
}

__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for a time that the device chooses; returns false if the phase is not complete by then.
__device__ __forceinline__ bool mbarrier_try_wait(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t is_complete;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(is_complete)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return is_complete != 0;
}
__device__ __forceinline__ void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
// The default above acquires in the scope of the block (.acquire.cta).
__device__ __forceinline__ bool mbarrier_try_wait_in_cluster(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t is_complete;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(is_complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return is_complete != 0;
}
__device__ __forceinline__ void mbarrier_wait_in_cluster(std::uint64_t* barrier, std::uint32_t parity) {
  while (!mbarrier_try_wait_in_cluster(barrier, parity)) {
  }
}

// ---- clusters ----

__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void sync_cluster_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address, in the cluster's shared memory, of what block `rank` has at this block's `address`.
__device__ __forceinline__ std::uint32_t address_in_cluster(std::uint32_t address, int rank) {
  std::uint32_t result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}
__device__ __forceinline__ void store_async(const SharedAddress& to, const Vector<float, 4>& value,
                                            std::uint64_t* barrier, int rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_in_cluster(to.address, rank)),
               "f"(value.at[0]), "f"(value.at[1]), "f"(value.at[2]), "f"(value.at[3]),
               "r"(address_in_cluster(shared_address(barrier), rank))
               : "memory");
}

// This releases to the block alone, as is the default. With .release.cluster ptxas puts a fence of the whole device
// (MEMBAR.ALL.GPU) before each arrival, and with .acquire.cluster it empties the L1 cache after each wait (CCTL.IVALL).
// Only fences can order what threads store and load, but all that passes here is that wgmma has read a tile, which the
// wait for it says already.
class ClusterMbarriers {
 public:
  __device__ __forceinline__ ClusterMbarriers(std::uint64_t* barriers, int rank)
      : address_(in_register(address_in_cluster(shared_address(barriers), rank))) {}
  __device__ __forceinline__ void arrive(std::uint32_t i) const {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_ + i * kMbarrierBytes) : "memory");
  }

 private:
  const std::uint32_t address_;
};

// ---- the copy engine, and what it and wgmma may read ----

__device__ __forceinline__ void tma_load_tile(void* to, const TensorMap& map, int row, int col,
                                              std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map.map()), "r"(col), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void tma_load_tile_multicast(void* to, const TensorMap& map, int row, int col,
                                                        std::uint64_t* barrier, std::uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map.map()), "r"(col), "r"(row), "r"(shared_address(barrier)), "h"(ranks)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map.map()) : "memory");
}
__device__ __forceinline__ void prefetch_sector(const std::byte* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
}
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- products of a warpgroup ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroupsLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}
// The compiler does not know that wgmma changes d until the wait. Empty assembly tells it that d changes here.
template <int kCount>
__device__ __forceinline__ void wgmma_wait_for(float (&d)[kCount]) {
  wgmma_wait<0>();
#pragma unroll
  for (float& accumulator : d) asm volatile("" : "+f"(accumulator)::"memory");
}

template <int kCount>
__device__ __forceinline__ void decrease_max_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void increase_max_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// wgmma names each register of d (%0, %1, ...), then those of a, then the descriptor. QLN_NAMES writes ten names, and
// QLN_OPERANDS eight operands.
// clang-format off
#define QLN_NAMES(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define QLN_D_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QLN_D_32 QLN_NAMES() "%10, %11, %12, %13, %14, %15"
#define QLN_D_64 QLN_NAMES() QLN_NAMES(1) QLN_NAMES(2) "%30, %31"
#define QLN_D_128 QLN_NAMES() QLN_NAMES(1) QLN_NAMES(2) QLN_NAMES(3) QLN_NAMES(4) QLN_NAMES(5) "%60, %61, %62, %63"
#define QLN_D_256 QLN_NAMES() QLN_NAMES(1) QLN_NAMES(2) QLN_NAMES(3) QLN_NAMES(4) QLN_NAMES(5) QLN_NAMES(6) QLN_NAMES(7) QLN_NAMES(8) \
  QLN_NAMES(9) QLN_NAMES(10) QLN_NAMES(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define QLN_A_16 "{%8, %9, %10, %11}, %12"
#define QLN_A_32 "{%16, %17, %18, %19}, %20"
#define QLN_A_64 "{%32, %33, %34, %35}, %36"
#define QLN_A_128 "{%64, %65, %66, %67}, %68"
#define QLN_A_256 "{%128, %129, %130, %131}, %132"
#define QLN_OPERANDS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
  "+f"(d[i + 6]), "+f"(d[i + 7])
#define QLN_OPERANDS_16 QLN_OPERANDS(0)
#define QLN_OPERANDS_32 QLN_OPERANDS_16, QLN_OPERANDS(8)
#define QLN_OPERANDS_64 QLN_OPERANDS_32, QLN_OPERANDS(16), QLN_OPERANDS(24)
#define QLN_OPERANDS_128 QLN_OPERANDS_64, QLN_OPERANDS(32), QLN_OPERANDS(40), QLN_OPERANDS(48), QLN_OPERANDS(56)
#define QLN_OPERANDS_256 QLN_OPERANDS_128, QLN_OPERANDS(64), QLN_OPERANDS(72), QLN_OPERANDS(80), QLN_OPERANDS(88), QLN_OPERANDS(96), \
  QLN_OPERANDS(104), QLN_OPERANDS(112), QLN_OPERANDS(120)
#define QLN_WGMMA(cols, type) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #cols "k16.f32." type "." type " {" QLN_D_##cols "}, " QLN_A_##cols \
               ", 1, 1, 1, 0;" : QLN_OPERANDS_##cols : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor) : "memory")
// clang-format on

template <class T, int kCols>
__device__ __forceinline__ void wgmma(float (&d)[kCols / 2], const std::uint32_t (&a)[4], std::uint64_t b_descriptor) {
  static_assert(kCols == 16 || kCols == 32 || kCols == 64 || kCols == 128 || kCols == 256);
  if constexpr (std::is_same_v<T, Bf16>) {
    if constexpr (kCols == 16) QLN_WGMMA(16, "bf16");
    if constexpr (kCols == 32) QLN_WGMMA(32, "bf16");
    if constexpr (kCols == 64) QLN_WGMMA(64, "bf16");
    if constexpr (kCols == 128) QLN_WGMMA(128, "bf16");
    if constexpr (kCols == 256) QLN_WGMMA(256, "bf16");
  } else {
    static_assert(std::is_same_v<T, F16>);
    if constexpr (kCols == 16) QLN_WGMMA(16, "f16");
    if constexpr (kCols == 32) QLN_WGMMA(32, "f16");
    if constexpr (kCols == 64) QLN_WGMMA(64, "f16");
    if constexpr (kCols == 128) QLN_WGMMA(128, "f16");
    if constexpr (kCols == 256) QLN_WGMMA(256, "f16");
  }
}

#undef QLN_NAMES
#undef QLN_D_16
#undef QLN_D_32
#undef QLN_D_64
#undef QLN_D_128
#undef QLN_D_256
#undef QLN_A_16
#undef QLN_A_32
#undef QLN_A_64
#undef QLN_A_128
#undef QLN_A_256
#undef QLN_OPERANDS
#undef QLN_OPERANDS_16
#undef QLN_OPERANDS_32
#undef QLN_OPERANDS_64
#undef QLN_OPERANDS_128
#undef QLN_OPERANDS_256
#undef QLN_WGMMA

}  // namespace qlora_native::cuda
