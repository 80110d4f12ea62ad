#include "runtime/side_stream.h"

#include <map>
#include <thread>
#include <tuple>

#include "backend.h"

namespace qlora_native {

SideStream::SideStream(std::unique_ptr<Driver> driver) : driver_(std::move(driver)) {
  stream_ = driver_->create_stream();
  used_ = driver_->create_event();
  prepared_ = driver_->create_event();
}

SideStream::~SideStream() {
  driver_->destroy_event(prepared_);
  driver_->destroy_event(used_);
  driver_->destroy_stream(stream_);
}

SideStream& SideStream::of(const Stream& caller) {
  using Key = std::tuple<Device, int, void*, std::thread::id>;
  // They are never destroyed, because CUDA may be gone when the process destroys its static objects.
  static auto& all = *new std::map<Key, SideStream>;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  // This handle is another stream in each thread (cudaStreamPerThread).
  const bool is_of_thread = caller.handle == reinterpret_cast<void*>(2);
  const Key key{caller.device, caller.index, caller.handle,
                is_of_thread ? std::this_thread::get_id() : std::thread::id()};
  const auto found = all.find(key);
  if (found != all.end()) return found->second;
  return all.try_emplace(key, backend_for(caller).make_driver(caller.index)).first->second;
}

void SideStream::overlap(std::int64_t count, void* caller,
                         const std::function<void(std::int64_t i, void* stream)>& prepare,
                         const std::function<void(std::int64_t i)>& use) {
  const std::lock_guard lock(mutex_);
  if (count > 0) prepare(0, caller);
  for (std::int64_t i = 0; i < count; ++i) {
    const bool is_last = i + 1 == count;
    if (!is_last) driver_->record(used_, caller);
    use(i);  // before prepare(), so that the device begins with it and prepares on the SMs that it leaves idle
    if (is_last) return;
    driver_->wait(stream_, used_);
    prepare(i + 1, stream_);
    driver_->record(prepared_, stream_);
    driver_->wait(caller, prepared_);
  }
}

}  // namespace qlora_native
