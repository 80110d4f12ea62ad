// Implements simt.cuh over the emulator, whose rules emulator/fibers.h has: a kernel computes the values that a device
// would compute, up to the rounding inside an mma.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/float16.h"
#include "emulator/fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static

namespace qlora_native::cuda_emulated {

// ---- who a thread is ----

inline int thread_index() { return emulator::position->thread; }
inline int block_threads() { return emulator::position->threads; }
inline std::int64_t block_index() { return emulator::position->block; }
inline std::int64_t grid_blocks() { return emulator::position->blocks; }
template <class T>
T* dynamic_smem() {
  return reinterpret_cast<T*>(emulator::position->smem);
}

// ---- what threads do together ----

inline void sync_threads(Site site = Site::current()) { emulator::barrier(site); }

// `exchange` reads and changes the operands of all lanes.
template <class Lane, class Exchange>
void collective(Lane& lane, const Exchange&, Site site) {
  emulator::warp_collective(
      &lane,
      [](void* const* lanes) {
        static_assert(std::is_empty_v<Exchange>);
        Exchange{}(reinterpret_cast<Lane* const*>(lanes));
      },
      site);
}

inline void sync_warp(Site site = Site::current()) {
  emulator::share_stores();
  int nothing = 0;
  collective(nothing, [](int* const*) {}, site);
}

template <class T>
T shfl(T value, int source, Site site = Site::current()) {
  struct Lane {
    T in, out;
    int source;
  } lane{value, {}, source};
  collective(
      lane,
      [](Lane* const* lanes) {
        for (int i = 0; i < kWarp; ++i) lanes[i]->out = lanes[lanes[i]->source]->in;
      },
      site);
  return lane.out;
}

template <class T>
T shfl_xor(T value, int mask, Site site = Site::current()) {
  return shfl(value, (thread_index() % kWarp) ^ mask, site);
}

// The largest value of any lane. The bits of floats >= 0 can be compared so, too.
inline std::uint32_t max_of_warp(std::uint32_t value, Site site = Site::current()) {
  collective(
      value,
      [](std::uint32_t* const* lanes) {
        std::uint32_t max = 0;
        for (int i = 0; i < kWarp; ++i) max = *lanes[i] > max ? *lanes[i] : max;
        for (int i = 0; i < kWarp; ++i) *lanes[i] = max;
      },
      site);
  return value;
}

// ---- between blocks ----

// A block that waits for a flag sees what the other block has written before its signal().
inline void signal(std::uint32_t* flag, std::uint32_t value) { emulator::signal(flag, value); }
inline void wait_for(const std::uint32_t* flag, std::uint32_t value, Site site = Site::current()) {
  emulator::wait_for(flag, value, site);
}
inline int take_ticket(std::uint32_t* counter) {
  emulator::yield();
  return static_cast<int>((*counter)++);
}
inline bool is_last_to_arrive(std::uint32_t* counter, int count, Site site = Site::current()) {
  return emulator::is_last_to_arrive(counter, count, site);
}

// A kernel that has called this in every block lets a kernel begin that is launched with programmatic_launch.
inline void griddepcontrol_launch_dependents() {}
// Waits until the kernel launched before this one has ended. Does nothing without programmatic_launch.
inline void griddepcontrol_wait(Site site = Site::current()) { emulator::griddepcontrol_wait(site); }

[[noreturn]] inline void trap() { emulator::fail("a kernel has trapped"); }
inline void atomic_add(std::uint64_t* at, std::uint64_t value) {
  emulator::yield();
  *at += value;
}
inline void atomic_min(std::uint64_t* at, std::uint64_t value) {
  emulator::yield();
  *at = value < *at ? value : *at;
}

// ---- copies and vectors ----

template <class T, int kCount>
Vector<T, kCount> load_vector(const T* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % (sizeof(T) * kCount) != 0) emulator::fail("a misaligned load");
  Vector<T, kCount> vector;
  if (emulator::concurrent) {
    emulator::load(&vector, from, sizeof(vector));
  } else {
    std::memcpy(&vector, from, sizeof(vector));
  }
  return vector;
}

template <class T, int kCount>
void store_vector(T* to, const Vector<T, kCount>& vector) {
  if (reinterpret_cast<std::uintptr_t>(to) % (sizeof(T) * kCount) != 0) emulator::fail("a misaligned store");
  static_assert(sizeof(vector) <= 16);
  if (emulator::concurrent) {
    emulator::store(to, &vector, sizeof(vector));
  } else {
    std::memcpy(to, &vector, sizeof(vector));
  }
}

// On a device this keeps a value in a register that the compiler would otherwise compute again in each step of a loop.
inline std::uint32_t in_register(std::uint32_t value) { return value; }
inline std::uint64_t in_register(std::uint64_t value) { return value; }
// An address in shared memory. On a device it has 32 bits, so an addition or an XOR is one instruction.
struct SharedAddress {
  std::byte* address;
  explicit SharedAddress(const void* p) : address(static_cast<std::byte*>(const_cast<void*>(p))) {}
  SharedAddress at(std::uint32_t bytes) const { return SharedAddress(address + bytes); }
  SharedAddress xor_swizzled(std::uint32_t bits) const {
    return SharedAddress(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(address) ^ bits));
  }
  SharedAddress in_register() const { return *this; }
  // A table of 256 rows of 256 bytes begins at kRowsBegin. Byte `i` of `word` is the number of a row: the result is the
  // address in that row with the same column as this address.
  SharedAddress row_of_byte(std::uint32_t word, std::uint32_t i) const {
    const std::uintptr_t row = (word >> (8 * i) & 0xFF) * kRowBytes;
    const std::uintptr_t kept_bits = reinterpret_cast<std::uintptr_t>(address) & ~std::uintptr_t{0xFF00};
    return SharedAddress(reinterpret_cast<const void*>((kept_bits | row) + kRowsBegin));
  }
};
// Dynamic shared memory from kRowsBegin on. The launch must request kRowsBegin bytes more, because dynamic_smem() may
// begin anywhere before. With kIsKnown a device's compiler knows this address.
template <class T, bool kIsKnown = false>
T* dynamic_smem_for_rows() {
  auto* const smem = dynamic_smem<std::byte>();
  const auto before = static_cast<std::uint32_t>(kRowsBegin - reinterpret_cast<std::uintptr_t>(smem)) & 0xFFFF;
  if (before > kRowsBegin) emulator::fail("shared memory begins behind the address of a table of rows");
  return reinterpret_cast<T*>(smem + before);
}
// Moves the address on by `bytes` if a < b.
inline void advance_if_less(SharedAddress& address, std::uint32_t bytes, float a, float b) {
  if (a < b) address = address.at(bytes);
}
template <class V>
V load_shared(const SharedAddress& from) {
  emulator::check_shared(from.address, sizeof(V));
  if (reinterpret_cast<std::uintptr_t>(from.address) % sizeof(V) != 0) emulator::fail("a misaligned load");
  V value;
  std::memcpy(&value, from.address, sizeof(V));
  return value;
}
template <class V>
void store_shared(const SharedAddress& to, const V& value) {
  emulator::check_shared(to.address, sizeof(V));
  if (reinterpret_cast<std::uintptr_t>(to.address) % sizeof(V) != 0) emulator::fail("a misaligned store");
  std::memcpy(to.address, &value, sizeof(V));
  emulator::note_shared_store(to.address, sizeof(V));
}

// Copies `valid` bytes of `from` to shared memory and fills up to kBytes (4, 8 or 16) with zeros.
template <int kBytes>
void cp_async(void* to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::check_shared(to, kBytes);
  emulator::copy_async(to, from, valid, kBytes - valid);
}
// Copies 16 bytes, or writes 16 zeros if `there` is 0.
inline void cp_async_or_zeros(const SharedAddress& to, const void* from, std::uint32_t there) {
  cp_async<16>(to.address, from, there != 0 ? 16 : 0);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kGroupsLeft>
void cp_async_wait() {
  emulator::wait_for_copies(kGroupsLeft);
}

// ---- numbers ----

inline float to_f32(float value) { return value; }
inline float to_f32(Bf16 value) { return f32_from_bf16(value.bits); }
inline float to_f32(F16 value) { return f32_from_f16(value.bits); }

template <class T>
T from_f32(float value) {
  if constexpr (std::is_same_v<T, Bf16>)
    return {bf16_from_f32(value)};
  else if constexpr (std::is_same_v<T, F16>)
    return {f16_from_f32(value)};
  else
    return value;
}

// Packs two elements into a register, the first in its low half.
template <class T>
std::uint32_t pack_pair(float first, float second) {
  return from_f32<T>(first).bits | std::uint32_t{from_f32<T>(second).bits} << 16;
}

// Byte `i` of a word; byte 0 is the lowest.
inline std::uint32_t byte_of(std::uint32_t word, std::uint32_t i) { return word >> (8 * i) & 0xFF; }

// Picks four bytes out of `low` (bytes 0 ... 3) and `high` (bytes 4 ... 7): byte i of the result is the one that hex
// digit i of `which` names.
inline std::uint32_t pick_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t which) {
  const std::uint64_t both = std::uint64_t{high} << 32 | low;
  std::uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    picked |= static_cast<std::uint32_t>(both >> (8 * (which >> (4 * i) & 7)) & 0xFF) << (8 * i);
  }
  return picked;
}

// a * b + c. The product is exact; the sum is rounded to double and then to float. (libm's fmaf is slow if the compiler
// may not use the FMA instruction.)
inline float fma(float a, float b, float c) { return static_cast<float>(double{a} * double{b} + double{c}); }
// The larger of a and b; if either is NaN, the result is the NaN whose sign bit is 0.
inline float larger_or_nan(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<float>::quiet_NaN();
  return a > b ? a : b;
}

// ---- tensor cores ----

// Loads four 8x8 matrices of 16-bit elements. Lane 8i+j gives the address of row j of matrix i. r[i] becomes two
// elements of matrix i: row lane/4, columns 2*(lane%4) and 2*(lane%4)+1. With kTranspose they are elements of the
// transposed matrix.
template <bool kTranspose>
void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, Site site) {
  struct Lane {
    const void* row;
    std::uint32_t* r;
  } lane{row, r};
  collective(
      lane,
      [](Lane* const* lanes) {
        for (int i = 0; i < kWarp; ++i) {
          emulator::check_shared(lanes[i]->row, 16);
          if (reinterpret_cast<std::uintptr_t>(lanes[i]->row) % 16 != 0) emulator::fail("ldmatrix of a misaligned row");
          for (int matrix = 0; matrix < 4; ++matrix) {
            std::uint16_t pair[2];
            for (int j = 0; j < 2; ++j) {
              const int row = kTranspose ? 2 * (i % 4) + j : i / 4, col = kTranspose ? i / 4 : 2 * (i % 4) + j;
              pair[j] = static_cast<const std::uint16_t*>(lanes[8 * matrix + row]->row)[col];
            }
            std::memcpy(&lanes[i]->r[matrix], pair, sizeof(pair));
          }
        }
      },
      site);
}
inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  ldmatrix_x4<false>(r, row, site);
}
inline void ldmatrix_x4(std::uint32_t (&r)[4], const SharedAddress& row, Site site = Site::current()) {
  ldmatrix_x4<false>(r, row.address, site);
}
inline void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  ldmatrix_x4<true>(r, row, site);
}
inline void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const SharedAddress& row, Site site = Site::current()) {
  ldmatrix_x4<true>(r, row.address, site);
}

// c[16,8] += a[16,16] . b[16,8] by the warp. With g = lane / 4 and t = lane % 4, a register holds two elements:
//   a[0]: (g, 2t) (g, 2t+1)   a[1]: the same of row g+8   a[2], a[3]: the same of columns + 8
//   b[0]: (2t, g) (2t+1, g)   b[1]: the same of rows + 8
//   c[0], c[1]: (g, 2t) (g, 2t+1)   c[2], c[3]: the same of row g+8
template <class T>
void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Site site = Site::current()) {
  struct Lane {
    float* c;
    const std::uint32_t *a, *b;
  } lane{c, a, b};
  collective(
      lane,
      [](Lane* const* lanes) {
        const auto half = [](std::uint32_t pair, int i) {
          return to_f32(T{static_cast<std::uint16_t>(pair >> (16 * i))});
        };
        float a[16][16], b[8][16];
        for (int i = 0; i < kWarp; ++i) {
          const int g = i / 4, t = i % 4;
          for (int j = 0; j < 2; ++j) {
            for (int part = 0; part < 4; ++part) {
              a[g + 8 * (part % 2)][2 * t + j + 8 * (part / 2)] = half(lanes[i]->a[part], j);
            }
            for (int part = 0; part < 2; ++part) b[g][2 * t + j + 8 * part] = half(lanes[i]->b[part], j);
          }
        }
        for (int i = 0; i < kWarp; ++i) {
          for (int part = 0; part < 4; ++part) {
            const float* row = a[i / 4 + 8 * (part / 2)];
            const float* col = b[2 * (i % 4) + part % 2];
            float sum = 0.0f;  // the products are exact; a device keeps a few more bits of the sum
            for (int k = 0; k < 16; ++k) sum += row[k] * col[k];
            lanes[i]->c[part] += sum;
          }
        }
      },
      site);
}

}  // namespace qlora_native::cuda_emulated
