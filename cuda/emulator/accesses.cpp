// How the threads of a block read and write global memory, and pass flags to other blocks. Under the schedule
// "concurrent" a store becomes visible late (fibers.h).
#include <cstring>
#include <utility>

#include "emulator/block.h"

namespace qlora_native::cuda_emulated::emulator {
namespace {

// Whether the address lies in the thread's stack or in the block's shared memory.
bool is_of_block(const Fiber& fiber, const void* p) {
  const auto* const at = static_cast<const std::byte*>(p);
  return (at >= fiber.stack && at < fiber.stack + kStackBytes) ||
         (at >= fiber.block->smem && at < fiber.block->smem + fiber.block->grid().smem_bytes);
}

// Reads global memory as the running fiber sees it, with the stores that are still in its buffers.
void load_global(void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
  if (!concurrent) return;
  current->block->stores.overlay(to, from, bytes);
  current->stores.overlay(to, from, bytes);
}

}  // namespace

void Copy::run() const {
  load_global(to, from, static_cast<std::size_t>(bytes));
  std::memset(static_cast<std::byte*>(to) + bytes, 0, static_cast<std::size_t>(zeros));
}

void yield() {
  if (concurrent) suspend(*current, Fiber::State::ready, current->site);
}

void load(void* to, const void* from, std::size_t bytes) {
  if (is_of_block(*current, from)) {
    std::memcpy(to, from, bytes);
    return;
  }
  if (schedule.coin()) yield();
  load_global(to, from, bytes);
}

void store(void* to, const void* from, std::size_t bytes) {
  if (is_of_block(*current, to)) {
    std::memcpy(to, from, bytes);
    return;
  }
  if (schedule.coin()) yield();
  current->stores.put(to, from, bytes);
}

void share_stores() {
  if (concurrent) current->stores.move_to(current->block->stores);
}

void signal(std::uint32_t* flag, std::uint32_t value) {
  yield();
  if (concurrent) {
    current->stores.publish_all();
    current->block->stores.publish_all();
  }
  *flag = value;
}

bool is_last_to_arrive(std::uint32_t* counter, int count, Site site) {
  Block& block = *current->block;
  barrier(site);
  if (current->position.thread == 0) {
    yield();
    if (concurrent) block.stores.publish_all();
    block.is_last = ++*counter == static_cast<std::uint32_t>(count);
  }
  barrier(site);
  return block.is_last;
}

void griddepcontrol_wait(Site site) {
  current->block->run.has_waited = true;
  const GridRun* const before = current->block->run.before;
  if (before != nullptr) wait_for(&before->has_ended, 1, site);
}

void wait_for(const std::uint32_t* flag, std::uint32_t value, Site site) {
  yield();
  if (*flag == value) return;
  current->flag = flag;
  current->value = value;
  suspend(*current, Fiber::State::waiting, site);
}

void copy_async(void* to, const void* from, int bytes, int zeros) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % (bytes + zeros) == 0; };
  if (!aligned(to) || (bytes > 0 && !aligned(from))) fail("cp.async of a misaligned address");
  const Copy copy{to, from, bytes, zeros};
  if (concurrent && schedule.coin()) yield();
  if (schedule.coin()) return copy.run();
  current->copies.push_back(copy);
}

void commit_copies() {
  current->groups.push_back(std::move(current->copies));
  current->copies.clear();
}

void wait_for_copies(int groups_left) {
  auto& groups = current->groups;
  while (groups.size() > static_cast<std::size_t>(groups_left)) {
    for (const Copy& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

}  // namespace qlora_native::cuda_emulated::emulator
