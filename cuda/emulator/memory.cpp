#include "emulator/memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#include "emulator/fibers.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace qlora_native::cuda_emulated::emulator {
namespace {

constexpr std::size_t kAlignment = 256;  // as cudaMalloc's

struct Range {
  std::uintptr_t end;
  std::size_t mapped_bytes;  // pages that are the device's alone; 0 if the host may access them too
  std::string name;
};

struct Registry {
  std::mutex mutex;
  std::map<std::uintptr_t, Range> ranges;  // by their first address
  int at_work = 0;                         // how many DeviceWork objects live

  const Range* find(std::uintptr_t address) const {
    const auto after = ranges.upper_bound(address);
    if (after == ranges.begin()) return nullptr;
    const Range& range = std::prev(after)->second;
    return address <= range.end ? &range : nullptr;  // the end counts too: an empty tensor may lie there
  }
};
// The registry is never destroyed: an application's statics may give memory back after our statics were destroyed.
Registry& registry() {
  static auto& all = *new Registry;
  return all;
}

std::uintptr_t integer_of(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }
std::size_t page_bytes() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

void protect(std::uintptr_t begin, const Range& range, bool open) {
  if (range.mapped_bytes == 0) return;
  mprotect(reinterpret_cast<void*>(begin), range.mapped_bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

// ---- host code that touches memory of the device ----

struct sigaction previous_action{};

void on_fault(int signal, siginfo_t* info, void* context) {
  // try_lock, because a mistake in this file could make the thread fault while it holds the lock itself.
  Registry& all = registry();
  if (all.mutex.try_lock()) {
    const Range* const range = all.find(integer_of(info->si_addr));
    if (range != nullptr && range->mapped_bytes > 0) {
      fail("the host reads or writes memory of the device while no kernel runs: " + range->name);
    }
    all.mutex.unlock();
  }
  if ((previous_action.sa_flags & SA_SIGINFO) != 0 && previous_action.sa_sigaction != nullptr) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal);
  } else {
    sigaction(signal, &previous_action, nullptr);  // then the access is repeated and faults as it did before
  }
}

void catch_faults() {
  static const bool done = [] {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGSEGV, &action, &previous_action) == 0;
  }();
  static_cast<void>(done);
}

void add_range(std::uintptr_t begin, Range range) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  if (all.at_work == 0) protect(begin, range, false);
  all.ranges.insert_or_assign(begin, std::move(range));
}

Range remove_range(const void* memory) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.ranges.find(integer_of(memory));
  if (found == all.ranges.end()) fail("memory is released that the device does not have");
  Range range = std::move(found->second);
  all.ranges.erase(found);
  return range;
}

// The kernel's NAME out of "... [with auto kKernel = NAME; Args = {...}]".
std::string kernel_of(const std::string& call) {
  constexpr char kBegin[] = "kKernel = ";
  const std::size_t found = call.find(kBegin);
  if (found == std::string::npos) return call;
  const std::size_t begin = found + sizeof(kBegin) - 1;
  return call.substr(begin, call.find_first_of(";,]", begin) - begin);
}

bool is_mapped(std::uintptr_t address) {
  // User space, without the first pages, which are never mapped.
  constexpr std::uintptr_t kFirst = 1 << 16, kLast = std::uintptr_t{1} << 47;
  if (address < kFirst || address >= kLast) return false;
#ifdef __SANITIZE_ADDRESS__
  // Two small numbers in one word look like an address of the sanitizer's shadow, where the host keeps nothing.
  std::size_t scale = 0, offset = 0;
  __asan_get_shadow_mapping(&scale, &offset);
  if (address >= offset && address < offset + (kLast >> scale)) return false;
#endif
  unsigned char resident = 0;
  return mincore(reinterpret_cast<void*>(address / page_bytes() * page_bytes()), 1, &resident) == 0;
}

}  // namespace

std::byte* allocate_on_device(std::size_t bytes, const std::string& name) {
  catch_faults();
  const std::size_t pages = (bytes + page_bytes()) / page_bytes() * page_bytes();  // at least one byte more
  void* const memory = mmap(nullptr, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(static_cast<std::byte*>(memory) + bytes, pages - bytes);
#endif
  add_range(integer_of(memory), {integer_of(memory) + bytes, pages, name});
  return static_cast<std::byte*>(memory);
}

void release_on_device(void* memory) {
  const Range range = remove_range(memory);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, range.mapped_bytes);
#endif
  munmap(memory, range.mapped_bytes);
}

std::byte* allocate_managed(std::size_t bytes, const std::string& name) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes) != 0) throw std::bad_alloc();
  register_managed(memory, bytes, name);
  return static_cast<std::byte*>(memory);
}

void release_managed(void* memory) {
  remove_range(memory);
  std::free(memory);
}

void register_managed(const void* memory, std::size_t bytes, const std::string& name) {
  add_range(integer_of(memory), {integer_of(memory) + bytes, 0, name});
}

void unregister_managed(const void* memory) { remove_range(memory); }

bool is_reachable(const void* address) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  return all.find(integer_of(address)) != nullptr;
}

DeviceWork::DeviceWork() {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  if (all.at_work++ > 0) return;
  for (const auto& [begin, range] : all.ranges) protect(begin, range, true);
}

DeviceWork::~DeviceWork() {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  if (--all.at_work > 0) return;
  for (const auto& [begin, range] : all.ranges) protect(begin, range, false);
}

void check_argument(const char* call, int number, const std::byte* bytes, std::size_t size) {
  for (std::size_t at = 0; at + sizeof(std::uintptr_t) <= size; at += sizeof(std::uintptr_t)) {
    std::uintptr_t word = 0;
    std::memcpy(&word, bytes + at, sizeof(word));
    if (!is_mapped(word) || is_reachable(reinterpret_cast<const void*>(word))) continue;
    fail(kernel_of(call) + ": argument " + std::to_string(number) + " has at byte " + std::to_string(at) +
         " an address of the host's memory, which a kernel on a device cannot read");
  }
}

}  // namespace qlora_native::cuda_emulated::emulator
