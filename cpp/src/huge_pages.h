// Pages of 2 MB, which Linux gives to who asks for them where /sys/kernel/mm/transparent_hugepage/enabled says
// "madvise" or "always".
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace qlora_native {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

// For what of [data, data + bytes) is whole pages. A refusal costs only time.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + page - 1) / page * page, end = begin + bytes;
  if (first < end) madvise(reinterpret_cast<void*>(first), (end - first) / page * page, MADV_HUGEPAGE);
#endif
}

}  // namespace qlora_native
