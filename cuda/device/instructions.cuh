// Implements simt.cuh by PTX: each instruction that has no name in C++ is a function here. The comments in
// instructions_emulated.h say what each function does.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <type_traits>

namespace qlora_native::cuda {

// ---- who a thread is ----

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ std::int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ std::int64_t grid_blocks() { return gridDim.x; }
template <class T>
__device__ __forceinline__ T* dynamic_smem() {
  extern __shared__ __align__(128) unsigned char qln_dynamic_smem[];
  return reinterpret_cast<T*>(qln_dynamic_smem);
}

// ---- what threads do together ----

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
template <class T>
__device__ __forceinline__ T shfl(T value, int source) {
  return __shfl_sync(kAllLanes, value, source);
}
template <class T>
__device__ __forceinline__ T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
// The largest value of any lane. The bits of floats >= 0 can be compared so, too.
__device__ __forceinline__ std::uint32_t max_of_warp(std::uint32_t value) {
  return __reduce_max_sync(kAllLanes, value);
}

// ---- between blocks ----

__device__ __forceinline__ void signal(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ std::uint32_t load_acquire(const std::uint32_t* flag) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
// An acquiring load invalidates the L1 cache, which the multiply uses. So wait_for() polls with relaxed loads, and does
// one acquiring load at the end.
__device__ __forceinline__ std::uint32_t load_relaxed(const std::uint32_t* flag) {
  std::uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ void wait_for(const std::uint32_t* flag, std::uint32_t value) {
  while (load_relaxed(flag) != value) {
  }
  load_acquire(flag);
}
// Returns how many times any block has called this before, and adds one.
__device__ __forceinline__ int take_ticket(std::uint32_t* counter) { return static_cast<int>(atomicAdd(counter, 1u)); }
// Adds one to the counter, and returns whether `count` blocks have now called this. All threads of a block call it.
__device__ __forceinline__ bool is_last_to_arrive(std::uint32_t* counter, int count) {
  sync_threads();
  int is_last = 0;
  if (thread_index() == 0) {
    std::uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    is_last = static_cast<int>(before) == count - 1;
  }
  return __syncthreads_or(is_last) != 0;
}
// Before compute capability 9.0 a kernel begins when the one before it has ended.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Ends the kernel: the next call of the runtime reports the failure.
__device__ __forceinline__ void trap() { asm volatile("trap;"); }
__device__ __forceinline__ void atomic_add(std::uint64_t* at, std::uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
__device__ __forceinline__ void atomic_min(std::uint64_t* at, std::uint64_t value) {
  atomicMin(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}

// ---- copies and vectors ----

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}
template <class T, int kCount>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(to) = vector;
}

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
// The compiler cannot see through the assembly, so it keeps the value in a register instead of computing it again.
__device__ __forceinline__ std::uint32_t in_register(std::uint32_t value) {
  std::uint32_t result;
  asm volatile("mov.u32 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}
__device__ __forceinline__ std::uint64_t in_register(std::uint64_t value) {
  std::uint64_t result;
  asm volatile("mov.u64 %0, %1;" : "=l"(result) : "l"(value));
  return result;
}
// An address in shared memory, in 32 bits.
struct SharedAddress {
  std::uint32_t address;
  __device__ __forceinline__ explicit SharedAddress(const void* p) : address(shared_address(p)) {}
  __device__ __forceinline__ explicit SharedAddress(std::uint32_t address) : address(address) {}
  __device__ __forceinline__ SharedAddress at(std::uint32_t bytes) const { return SharedAddress(address + bytes); }
  __device__ __forceinline__ SharedAddress xor_swizzled(std::uint32_t bits) const {
    return SharedAddress(address ^ bits);
  }
  __device__ __forceinline__ SharedAddress in_register() const { return SharedAddress(cuda::in_register(address)); }
  __device__ __forceinline__ SharedAddress row_of_byte(std::uint32_t word, std::uint32_t i) const {
    return SharedAddress(__byte_perm(word, address, 0x7604 | i << 4) + kRowsBegin);  // the sum is the load's offset
  }
};
// A known address makes what lies behind it operands of instructions: wgmma's kernels have fewer instructions so, while
// those of gemm/ have more.
template <class T, bool kIsKnown = false>
__device__ __forceinline__ T* dynamic_smem_for_rows() {
  const std::uint32_t before = (kRowsBegin - shared_address(dynamic_smem<std::byte>())) & 0xFFFF;
  if (before > kRowsBegin) trap();
  if constexpr (kIsKnown) return reinterpret_cast<T*>(__cvta_shared_to_generic(kRowsBegin));
  return reinterpret_cast<T*>(dynamic_smem<std::byte>() + before);
}
// This takes one instruction beside the comparison; the compiler makes more from `a < b ? address.at(bytes) : address`.
__device__ __forceinline__ void advance_if_less(SharedAddress& address, std::uint32_t bytes, float a, float b) {
  asm("{ .reg .pred p; setp.lt.f32 p, %2, %3; @p add.u32 %0, %0, %1; }"
      : "+r"(address.address)
      : "r"(bytes), "f"(a), "f"(b));
}
template <class V>
__device__ __forceinline__ V load_shared(const SharedAddress& from) {
  if constexpr (sizeof(V) == 16) {
    Vector<std::uint32_t, 4> v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.at[0]), "=r"(v.at[1]), "=r"(v.at[2]), "=r"(v.at[3])
                 : "r"(from.address)
                 : "memory");
    return std::bit_cast<V>(v);
  } else if constexpr (sizeof(V) == 8) {
    Vector<std::uint32_t, 2> v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.at[0]), "=r"(v.at[1]) : "r"(from.address) : "memory");
    return std::bit_cast<V>(v);
  } else if constexpr (sizeof(V) == 4) {
    std::uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from.address) : "memory");
    return std::bit_cast<V>(v);
  } else if constexpr (std::is_same_v<V, std::uint16_t>) {
    std::uint32_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(from.address) : "memory");
    return static_cast<std::uint16_t>(v);
  } else {
    static_assert(std::is_same_v<V, std::uint8_t>);
    std::uint32_t v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(from.address) : "memory");
    return static_cast<std::uint8_t>(v);
  }
}
template <class V>
__device__ __forceinline__ void store_shared(const SharedAddress& to, const V& value) {
  if constexpr (std::is_same_v<V, Vector<float, 4>>) {
    // ptxas takes a move to an integer register for a use of wgmma's accumulators before the wait for them.
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to.address), "f"(value.at[0]), "f"(value.at[1]),
                 "f"(value.at[2]), "f"(value.at[3])
                 : "memory");
  } else if constexpr (sizeof(V) == 16) {
    const auto v = std::bit_cast<Vector<std::uint32_t, 4>>(value);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to.address), "r"(v.at[0]), "r"(v.at[1]), "r"(v.at[2]),
                 "r"(v.at[3])
                 : "memory");
  } else {
    static_assert(sizeof(V) == 4);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to.address), "r"(std::bit_cast<std::uint32_t>(value)) : "memory");
  }
}

template <int kBytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {  // bypasses the L1 cache, because one block alone uses each byte
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid),
                 "n"(kBytes)
                 : "memory");
  }
}
// Copies 16 bytes, or writes 16 zeros if `there` is 0. One cp.async does either, with the condition as a predicate.
__device__ __forceinline__ void cp_async_or_zeros(const SharedAddress& to, const void* from, std::uint32_t there) {
  asm volatile(
      "{ .reg .pred p; .reg .b32 n; setp.ne.u32 p, %2, 0; selp.b32 n, 16, 0, p; "
      "cp.async.cg.shared.global [%0], [%1], 16, n; }" ::"r"(to.address),
      "l"(from), "r"(there)
      : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// ---- numbers ----

__device__ __forceinline__ float to_f32(float value) { return value; }
__device__ __forceinline__ float to_f32(Bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
__device__ __forceinline__ float to_f32(F16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

template <class T>
__device__ __forceinline__ T from_f32(float value) {
  if constexpr (std::is_same_v<T, Bf16>) {
    Bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
  } else if constexpr (std::is_same_v<T, F16>) {
    F16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
  } else {
    return value;
  }
}

// Packs two elements into a register, the first in its low half.
template <class T>
__device__ __forceinline__ std::uint32_t pack_pair(float first, float second) {
  std::uint32_t result;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  } else {
    static_assert(std::is_same_v<T, F16>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  }
  return result;
}

// Byte `i` of a word; byte 0 is the lowest.
__device__ __forceinline__ std::uint32_t byte_of(std::uint32_t word, std::uint32_t i) {
  return __byte_perm(word, 0, 0x4440 | i);
}

// Picks four bytes out of `low` (bytes 0 ... 3) and `high` (bytes 4 ... 7): byte i of the result is the one that hex
// digit i of `which` names.
__device__ __forceinline__ std::uint32_t pick_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t which) {
  return __byte_perm(low, high, which);
}

__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float larger_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// ---- tensor cores ----

__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const SharedAddress& row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  ldmatrix_x4(r, SharedAddress(row));
}
__device__ __forceinline__ void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const SharedAddress& row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* row) {
  ldmatrix_x4_transposed(r, SharedAddress(row));
}

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, F16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace qlora_native::cuda
