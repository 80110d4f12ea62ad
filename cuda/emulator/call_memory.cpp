#include "emulator/call_memory.h"

#include <algorithm>
#include <cstring>

#include "emulator/fibers.h"
#include "emulator/memory.h"

namespace qlora_native::cuda_emulated {
namespace {

// Kernels choose by the alignment of an address: so a copy has the same remainder by kAlignment as its original.
constexpr std::size_t kAlignment = 256;
// At least so many bytes of NaN lie between two tensors.
constexpr std::size_t kGapBytes = 256;

std::size_t misalignment(const std::byte* address) { return reinterpret_cast<std::uintptr_t>(address) % kAlignment; }

}  // namespace

CallMemory::~CallMemory() {
  emulator::run_pending_grids();  // of a call that has thrown
  if (memory_ != nullptr) emulator::release_on_device(memory_);
}

void CallMemory::add_rows(void* pointer, const void* host, std::int64_t rows, std::int64_t row_bytes,
                          std::int64_t stride_bytes, bool is_written) {
  if (host == nullptr || emulator::is_reachable(host)) return;  // there is no tensor, or the device reaches it already
  views_.push_back(
      {pointer, static_cast<std::byte*>(const_cast<void*>(host)), rows, row_bytes, stride_bytes, is_written});
}

void CallMemory::move_to_device() {
  if (views_.empty()) return;
  // Tensors that overlap are copied as one region, so that they overlap on the device too.
  std::vector<View*> order;
  for (View& view : views_) order.push_back(&view);
  std::sort(order.begin(), order.end(), [](const View* a, const View* b) { return a->host < b->host; });
  struct Region {
    std::byte *begin, *end;
    std::size_t offset;
  };
  std::vector<Region> regions;
  std::size_t bytes = 0;
  for (const View* view : order) {
    if (!regions.empty() && view->host < regions.back().end) {
      regions.back().end = std::max(regions.back().end, view->end());
      bytes = regions.back().offset + static_cast<std::size_t>(regions.back().end - regions.back().begin);
      continue;
    }
    const std::size_t aligned = (bytes + kGapBytes + kAlignment - 1) / kAlignment * kAlignment;
    regions.push_back({view->host, view->end(), aligned + misalignment(view->host)});
    bytes = regions.back().offset + static_cast<std::size_t>(regions.back().end - regions.back().begin);
  }
  memory_ = emulator::allocate_on_device(bytes, "a tensor of a call");
  const emulator::DeviceWork work;
  std::memset(memory_, 0xFF, bytes);
  std::size_t region = 0;
  for (View* view : order) {
    while (region + 1 < regions.size() && view->host >= regions[region + 1].begin) ++region;
    view->device = memory_ + regions[region].offset + (view->host - regions[region].begin);
    view->each_row([&](const std::byte* host, std::byte* device) {
      std::memcpy(device, host, static_cast<std::size_t>(view->row_bytes));
    });
    std::memcpy(view->pointer, &view->device, sizeof(view->device));
  }
}

void CallMemory::copy_back() const {
  emulator::run_pending_grids();
  const emulator::DeviceWork work;
  for (const View& view : views_) {
    const auto bytes = static_cast<std::size_t>(view.row_bytes);
    if (!view.is_written) continue;
    view.each_row([&](std::byte* host, const std::byte* device) { std::memcpy(host, device, bytes); });
  }
  // The check comes after the copies, because a tensor that the call reads may lie inside one that it writes.
  for (const View& view : views_) {
    if (view.is_written) continue;
    const auto bytes = static_cast<std::size_t>(view.row_bytes);
    view.each_row([&](const std::byte* host, const std::byte* device) {
      if (std::memcmp(host, device, bytes) != 0) {
        emulator::fail("a kernel has written a tensor that its call only reads");
      }
    });
  }
}

}  // namespace qlora_native::cuda_emulated
