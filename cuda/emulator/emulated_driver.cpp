#include "emulator/emulated_driver.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "emulator/fibers.h"
#include "emulator/memory.h"
#include "qlora_native/error.h"

namespace qlora_native::cuda_emulated {
namespace {

constexpr std::size_t kPage = 4096;

std::size_t pages_of(std::size_t bytes) { return (bytes + kPage - 1) / kPage; }

}  // namespace

EmulatedDriver::~EmulatedDriver() {
  if (live_ != 0) emulator::fail("a stream, an event or memory of a driver was not released");
}

bool EmulatedDriver::is_concurrent() { return options_->concurrent; }
bool EmulatedDriver::is_capturing(void*) { return options_->capturing; }
std::size_t EmulatedDriver::free_bytes() { return options_->free_bytes; }

// ---- memory ----

void* EmulatedDriver::allocate(Memory kind, std::size_t bytes) {
  const std::string name = kind == Memory::managed ? "managed" : kind == Memory::pinned ? "pinned" : "ring";
  std::byte* const memory =
      kind == Memory::device ? emulator::allocate_on_device(bytes, name) : emulator::allocate_managed(bytes, name);
  if (kind == Memory::device) {
    const emulator::DeviceWork work;
    std::memset(memory, 0xFF, bytes);  // NaN, like a new Workspace
  }
  if (kind == Memory::managed) managed_[memory] = {std::vector<bool>(pages_of(bytes))};
  names_[memory] = name;
  ++live_;
  options_->trace("allocate " + names_[memory]);
  return memory;
}

void EmulatedDriver::release(Memory kind, void* memory) noexcept {
  options_->trace("release " + names_[memory]);
  managed_.erase(static_cast<std::byte*>(memory));
  names_.erase(memory);
  --live_;
  kind == Memory::device ? emulator::release_on_device(memory) : emulator::release_managed(memory);
}

void EmulatedDriver::advise(void* memory, std::size_t) { options_->trace("advise " + name_of(memory)); }

bool EmulatedDriver::is_on_device(const void* memory, std::size_t bytes) {
  const auto* const begin = static_cast<const std::byte*>(memory);
  const auto& [base, pages] = *std::prev(managed_.upper_bound(begin));
  const auto first = static_cast<std::size_t>(begin - base);
  for (std::size_t page = first / kPage; page < pages_of(first + bytes); ++page) {
    if (!pages[page]) return false;
  }
  return true;
}

std::string EmulatedDriver::name_of(const void* memory) const {
  const auto& [base, name] = *std::prev(names_.upper_bound(memory));
  return name + "+" + std::to_string(static_cast<const std::byte*>(memory) - static_cast<const std::byte*>(base));
}

// ---- streams ----

void* EmulatedDriver::create_stream() {
  ++live_;
  auto* const stream = new EmulatedStream;
  stream->name = "stream " + std::to_string(streams_++);
  return stream;
}

void EmulatedDriver::destroy_stream(void* stream) noexcept {
  auto* const emulated = static_cast<EmulatedStream*>(stream);
  run(*emulated, emulated->work.size());
  --live_;
  delete emulated;
}

std::string EmulatedDriver::name_of_stream(void* stream) {
  return stream == nullptr ? "caller" : static_cast<EmulatedStream*>(stream)->name;
}

void EmulatedDriver::run(EmulatedStream& stream, std::size_t work) {
  while (stream.done < work) {
    const std::function<void()> next = stream.work[stream.done++];
    next();
  }
}

// The caller's stream is null. Nothing is ever pending in it, because kernels run when they are launched.
void EmulatedDriver::enqueue(void* stream, std::function<void()> work) {
  if (stream == nullptr) {
    work();
    return;
  }
  auto& emulated = *static_cast<EmulatedStream*>(stream);
  emulated.work.push_back(std::move(work));
  if (options_->eager) run(emulated, emulated.work.size());
}

void EmulatedDriver::prefetch(void* memory, std::size_t bytes, Place place, void* stream) {
  options_->trace(name_of_stream(stream) + ": prefetch " + name_of(memory) + ", " + std::to_string(bytes) + " to " +
                  (place == Place::device ? "device" : "host"));
  enqueue(stream, [this, memory, bytes, place] {
    auto& [base, pages] = *std::prev(managed_.upper_bound(static_cast<std::byte*>(memory)));
    const auto first = static_cast<std::size_t>(static_cast<std::byte*>(memory) - base);
    std::fill(pages.begin() + static_cast<std::ptrdiff_t>(first / kPage),
              pages.begin() + static_cast<std::ptrdiff_t>(pages_of(first + bytes)), place == Place::device);
  });
}

void EmulatedDriver::copy(void* to, const void* from, std::size_t bytes, void* stream) {
  options_->trace(name_of_stream(stream) + ": copy " + name_of(from) + ", " + std::to_string(bytes) + " to " +
                  name_of(to));
  enqueue(stream, [to, from, bytes] {
    const emulator::DeviceWork work;
    std::memcpy(to, from, bytes);
  });
}

// ---- events ----

void* EmulatedDriver::create_event(bool timed) {
  if (options_->events_left == 0) throw Unavailable("the emulated device has no more events");
  --options_->events_left;
  ++live_;
  auto* const event = new Event;
  event->name = "event " + std::to_string(events_++);
  event->timed = timed;
  return event;
}

void EmulatedDriver::destroy_event(void* event) noexcept {
  --live_;
  delete static_cast<Event*>(event);
}

void EmulatedDriver::record(void* event, void* stream) {
  auto* const emulated = static_cast<Event*>(event);
  options_->trace(name_of_stream(stream) + ": record " + emulated->name);
  emulated->stream = static_cast<EmulatedStream*>(stream);
  enqueue(stream, [this, emulated] { emulated->time = ++time_; });
  emulated->work = emulated->stream != nullptr ? emulated->stream->work.size() : 0;
}

void EmulatedDriver::wait(void* stream, void* event) {
  const auto& emulated = *static_cast<Event*>(event);
  options_->trace(name_of_stream(stream) + ": wait for " + emulated.name);
  if (emulated.stream != nullptr)
    enqueue(stream, [target = emulated.stream, work = emulated.work] { run(*target, work); });
}

void EmulatedDriver::synchronize(void* event) noexcept {
  const auto& emulated = *static_cast<Event*>(event);
  options_->trace("synchronize " + emulated.name);
  if (emulated.stream != nullptr) run(*emulated.stream, emulated.work);
}

bool EmulatedDriver::is_done(void* event) {
  const auto& emulated = *static_cast<Event*>(event);
  return emulated.stream == nullptr || emulated.stream->done >= emulated.work;
}

bool EmulatedDriver::is_earlier(void* first, void* second) {
  const auto &one = *static_cast<Event*>(first), &other = *static_cast<Event*>(second);
  if (!one.timed || !other.timed) emulator::fail("the times of events are compared that have none");
  return one.time < other.time;
}

std::unique_ptr<Driver> make_driver(int) { return std::make_unique<EmulatedDriver>(); }

}  // namespace qlora_native::cuda_emulated
