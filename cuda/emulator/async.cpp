#include "emulator/async.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace qlora_native::cuda_emulated::emulator {
namespace {

constexpr std::uint32_t kPoison = 0xFFFFFFFF;  // a NaN
constexpr std::int64_t kVector = 16;
constexpr std::int64_t kMaxBytes = (1 << 20) - 1, kMaxArrivals = (1 << 20) - 1;  // in one phase

// The swizzle moves a 16-byte vector: the bits of its address from bit 4 on are XORed with those from bit 7 on.
std::uint32_t swizzled(std::uint32_t address, Swizzle swizzle) {
  const std::uint32_t mask = swizzle == Swizzle::none ? 0 : static_cast<std::uint32_t>(span_of(swizzle) / kVector - 1);
  return address ^ (address >> 7 & mask) << 4;
}

}  // namespace

// ---- shared memory ----

SharedMemory::SharedMemory(std::byte* data, std::size_t bytes, std::uint32_t first_address)
    : data_(data), bytes_(bytes), first_address_(first_address), writers_((bytes + kWord - 1) / kWord) {}

bool SharedMemory::holds(const void* p, std::size_t bytes) const {
  const auto* const at = static_cast<const std::byte*>(p);
  return at >= data_ && at + bytes <= data_ + bytes_;
}

std::uint32_t SharedMemory::address_of(const void* p) const {
  return first_address_ + static_cast<std::uint32_t>(static_cast<const std::byte*>(p) - data_);
}

std::byte* SharedMemory::at(std::uint32_t address) const {
  if (address < first_address_ || address >= first_address_ + bytes_) {
    fail("wgmma reads address " + std::to_string(address) + ", which is not in the block's shared memory");
  }
  return data_ + (address - first_address_);
}

std::pair<std::size_t, std::size_t> SharedMemory::words_of(const void* p, std::size_t bytes) const {
  const auto first = static_cast<std::size_t>(static_cast<const std::byte*>(p) - data_);
  return {first / kWord, (first + bytes + kWord - 1) / kWord};
}

void SharedMemory::note_store(const void* p, std::size_t bytes, int thread) {
  if (!holds(p, bytes)) return;
  for (auto [at, end] = words_of(p, bytes); at < end; ++at) writers_[at] = static_cast<std::uint16_t>(thread + 1);
}

void SharedMemory::publish_stores(int thread) {
  for (std::uint16_t& writer : writers_) {
    if (writer == thread + 1) writer = 0;
  }
}

void SharedMemory::check_published(const void* p, std::size_t bytes, const char* reader) const {
  for (auto [at, end] = words_of(p, bytes); at < end; ++at) {
    if (writers_[at] == 0) continue;
    fail(std::string(reader) + " reads what thread " + std::to_string(writers_[at] - 1) +
         " has stored to shared memory and not published by fence_proxy_async()");
  }
}

void SharedMemory::forget_stores(const void* p, std::size_t bytes) {
  for (auto [at, end] = words_of(p, bytes); at < end; ++at) writers_[at] = 0;
}

// ---- barriers ----

void Mbarriers::init(std::uint64_t* barrier, int arrivals, int thread, int barriers_passed) {
  if (arrivals < 1 || arrivals > kMaxArrivals) fail("an mbarrier of " + std::to_string(arrivals) + " arrivals");
  if (reinterpret_cast<std::uintptr_t>(barrier) % sizeof(*barrier) != 0) fail("a misaligned mbarrier");
  barriers_[barrier] = {
      .arrivals = arrivals, .pending = arrivals, .initialized_by = thread, .initialized_in = barriers_passed};
}

void Mbarriers::check_initialized(std::uint64_t* barrier, int thread, int barriers_passed) {
  const Mbarrier& at = find(barrier);
  if (at.initialized_by == thread || at.initialized_in != barriers_passed) return;
  fail("uses an mbarrier, and the block's threads have not met since another one has initialized it");
}

void Mbarriers::publish(int thread, std::int32_t interval) {
  for (auto& [address, barrier] : barriers_) {
    if (barrier.is_published || barrier.initialized_by != thread) continue;
    barrier.is_published = true;
    barrier.published_in = interval;
  }
}

Mbarriers::Mbarrier& Mbarriers::find(std::uint64_t* barrier) {
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end()) fail("an mbarrier that was not initialized");
  return found->second;
}

void Mbarriers::end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
}

void Mbarriers::arrive(std::uint64_t* barrier, std::uint32_t expected_bytes, int thread) {
  Mbarrier& at = find(barrier);
  if (at.pending == 0)
    fail("an mbarrier has more arrivals in a phase than the " + std::to_string(at.arrivals) + " that it expects");
  const auto [last, is_first] = at.arrived.try_emplace(thread, at.phase);
  if (!is_first && last->second == at.phase) fail("the thread arrives twice in a phase of the mbarrier");
  last->second = at.phase;
  --at.pending;
  at.bytes += expected_bytes;
  if (at.bytes > kMaxBytes) fail("an mbarrier expects more bytes than it can count");
  end_phase_if_complete(at);
}

std::int64_t Mbarriers::begin_wait(std::uint64_t* barrier, std::uint32_t parity, int thread) {
  Mbarrier& at = find(barrier);
  const std::int64_t phase = (at.phase & 1) == parity ? at.phase : at.phase - 1;
  const auto [last, is_first] = at.waited.try_emplace(thread, phase);
  if (!is_first) {
    if (phase <= last->second) fail("a stale parity: the thread has waited for this phase of the mbarrier before");
    if (phase > last->second + 1) fail("the thread has missed a phase of the mbarrier");
    last->second = phase;
  }
  return phase;
}

bool Mbarriers::is_complete(std::uint64_t* barrier, std::int64_t phase) { return find(barrier).phase > phase; }

void Mbarriers::check_published(std::uint64_t* barrier) {
  if (!find(barrier).is_published) fail("an mbarrier whose initialization was not published");
}

void Mbarriers::check_published_before(std::int32_t interval, std::uint64_t* barrier) {
  check_published(barrier);
  if (find(barrier).published_in == interval) {
    fail("uses an mbarrier of another block, and no barrier of the cluster has completed since it was published");
  }
}

void Mbarriers::complete_bytes(std::uint64_t* barrier, std::uint32_t bytes) {
  Mbarrier& at = find(barrier);
  at.bytes -= bytes;
  end_phase_if_complete(at);
}

void Mbarriers::check_scope_of_waits(const Mbarrier& barrier) {
  if (barrier.has_remote_stores && barrier.has_waits_in_block) {
    fail("waits in the scope of its block for what another block of the cluster stores");
  }
}

void Mbarriers::note_remote_stores(std::uint64_t* barrier) {
  Mbarrier& at = find(barrier);
  at.has_remote_stores = true;
  check_scope_of_waits(at);
}

void Mbarriers::note_wait_in_block(std::uint64_t* barrier) {
  Mbarrier& at = find(barrier);
  at.has_waits_in_block = true;
  check_scope_of_waits(at);
}

bool Mbarriers::remote_arrivals_were_waited_for() const {
  for (const auto& [address, barrier] : barriers_) {
    if (!barrier.has_remote_arrivals) continue;
    std::int64_t waited = 0;  // phases
    for (const auto& [thread, phase] : barrier.waited) waited = std::max(waited, phase + 1);
    if (waited < barrier.phase || barrier.pending < barrier.arrivals) return false;
  }
  return true;
}

// ---- copies ----

std::byte* TileCopies::place(const Copy& copy, std::int64_t bytes) const {
  return memory_.at(swizzled(memory_.address_of(copy.to) + static_cast<std::uint32_t>(bytes), copy.source.swizzle));
}

void TileCopies::begin(std::byte* to, const TileSource& source, std::int64_t row, std::int64_t col,
                       std::uint64_t* barrier) {
  const std::int64_t bytes = source.box_rows * source.box_row_bytes();
  if (!memory_.holds(to, static_cast<std::size_t>(bytes))) fail("TMA writes beyond shared memory");
  if (memory_.address_of(to) % 128 != 0) fail("TMA writes to an address that is no multiple of 128");
  barriers_.check_published(barrier);
  for (const Copy& copy : copies_) {
    const std::int64_t copy_bytes = copy.source.box_rows * copy.source.box_row_bytes();
    if (to < copy.to + copy_bytes && copy.to < to + bytes) fail("TMA writes where another tile is still in flight");
  }
  copies_.push_back({to, source, row, col, barrier});
  for (std::int64_t at = 0; at < bytes; at += kVector) std::memset(place(copies_.back(), at), 0xFF, kVector);
}

void TileCopies::finish(std::size_t i) {
  const Copy copy = copies_[i];
  copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(i));
  const TileSource& source = copy.source;
  const auto* const data = static_cast<const std::byte*>(source.data);
  for (std::int64_t row = 0; row < source.box_rows; ++row) {
    for (std::int64_t at = 0; at < source.box_row_bytes(); at += kVector) {
      std::byte* const to = place(copy, row * source.box_row_bytes() + at);
      for (std::int64_t byte = 0; byte < kVector; ++byte) {
        const std::int64_t r = copy.row + row, c = copy.col + (at + byte) / source.element_bytes;
        const bool is_there = r >= 0 && r < source.rows && c >= 0 && c < source.cols;
        const std::int64_t from = r * source.stride_bytes + copy.col * source.element_bytes + at + byte;
        to[byte] = is_there ? data[from] : std::byte{0};
      }
      memory_.forget_stores(to, kVector);
    }
  }
  barriers_.complete_bytes(copy.barrier, static_cast<std::uint32_t>(source.box_rows * source.box_row_bytes()));
}

// ---- vectors of other blocks ----

void AsyncStores::begin(std::byte* to, const std::byte* value, std::uint64_t* barrier) {
  if (!memory_.holds(to, kBytes)) fail("stores beyond the shared memory of a block");
  if (memory_.address_of(to) % kBytes != 0) fail("a misaligned store into a block");
  Store store{to, {}, barrier};
  std::memcpy(store.value.data(), value, kBytes);
  stores_.push_back(store);
  std::memset(to, 0xFF, kBytes);
}

void AsyncStores::finish(std::size_t i) {
  const Store store = stores_[i];
  stores_[i] = stores_.back();
  stores_.pop_back();
  std::memcpy(store.to, store.value.data(), kBytes);
  memory_.forget_stores(store.to, kBytes);
  barriers_.complete_bytes(store.barrier, kBytes);
}

// ---- products ----

WgmmaProduct::WgmmaProduct(SharedMemory& memory, ToF32 to_f32, int cols, std::uint64_t b_descriptor)
    : memory_(memory), to_f32_(to_f32), cols_(cols), descriptor_(b_descriptor) {}

// PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16": each warp holds 16 rows, and lane 4g + t of it holds
// elements of rows g and g + 8.
void WgmmaProduct::set_a(int thread, const std::uint32_t (&a)[4]) {
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  for (int i = 0; i < 8; ++i) {
    const int row = 16 * warp + g + i / 2 % 2 * 8, inner = 2 * t + i % 2 + i / 4 * 8;
    a_[row][inner] = to_f32_(static_cast<std::uint16_t>(a[i / 2] >> (16 * (i % 2))));
  }
}

// PTX ISA, "Matrix descriptor" and "Canonical layouts". The fields of the descriptor:
//
//   bits 0-13    the address, in units of 16 bytes
//   bits 32-45   the distance between groups of eight rows, in units of 16 bytes
//   bits 49-51   the base offset
//   bits 62-63   the swizzle
//
// A row in memory is a column of b: it runs along the inner dimension and has 128 bytes. The swizzle applies to the
// whole address, not to the offset in the tile.
void WgmmaProduct::compute() {
  if (!result_.empty()) return;
  const auto field = [&](int first, int bits) {
    return static_cast<std::uint32_t>(descriptor_ >> first & ((std::uint64_t{1} << bits) - 1));
  };
  if (field(62, 2) != 1) fail("wgmma: the emulator knows matrix descriptors with the swizzle of 128 bytes alone");
  if (field(49, 3) != 0) fail("wgmma: the emulator knows no base offset of a matrix descriptor");
  const std::uint32_t begin = field(0, 14) * 16, group_bytes = field(32, 14) * 16;
  std::vector<float> b(static_cast<std::size_t>(cols_) * kInner);
  for (int col = 0; col < cols_; ++col) {
    for (int vector = 0; vector < kInner; vector += 8) {
      const std::uint32_t row = begin + static_cast<std::uint32_t>(col / 8) * group_bytes + col % 8 * 128u;
      const std::byte* const from =
          memory_.at(swizzled(row + static_cast<std::uint32_t>(vector) * 2, Swizzle::bytes_128));
      memory_.check_published(from, kVector, "wgmma");
      for (int i = 0; i < 8; ++i) {
        std::uint16_t bits;
        std::memcpy(&bits, from + 2 * i, sizeof(bits));
        b[static_cast<std::size_t>((vector + i) * cols_ + col)] = to_f32_(bits);
      }
    }
  }
  result_.assign(static_cast<std::size_t>(kRows) * static_cast<std::size_t>(cols_), 0.0f);
  for (int row = 0; row < kRows; ++row) {
    float* const result_row = &result_[static_cast<std::size_t>(row * cols_)];
    for (int k = 0; k < kInner; ++k) {
      const float* const b_row = &b[static_cast<std::size_t>(k * cols_)];
      for (int col = 0; col < cols_; ++col) result_row[col] += a_[row][k] * b_row[col];
    }
  }
}

void WgmmaProduct::add_to(int thread, float* d) const {
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  for (int i = 0; i < cols_ / 2; ++i) {
    const int row = 16 * warp + g + i / 2 % 2 * 8, col = i / 4 * 8 + 2 * t + i % 2;
    d[i] += result_[static_cast<std::size_t>(row * cols_ + col)];
  }
}

WgmmaQueue::~WgmmaQueue() = default;

void WgmmaQueue::add(std::shared_ptr<WgmmaProduct> product, int thread, const std::uint32_t* a, float* d, int count) {
  if (!is_fenced_) fail("wgmma without wgmma_fence() since its registers could be changed");
  Accumulators& accumulators = accumulators_[d];
  if (accumulators.products++ == 0) {
    accumulators.values.assign(d, d + count);
    std::memset(d, 0xFF, static_cast<std::size_t>(count) * sizeof(float));
  }
  open_.push_back({std::move(product), thread, a, {a[0], a[1], a[2], a[3]}, d});
}

void WgmmaQueue::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
  is_fenced_ = false;
}

void WgmmaQueue::wait(std::size_t groups_left) {
  while (groups_.size() > groups_left) {
    for (const Part& part : groups_.front()) {
      part.product->compute();
      if (std::memcmp(part.a, part.issued, sizeof(part.issued)) != 0) {
        fail("a register of wgmma's a was changed before the wait for it");
      }
      Accumulators& accumulators = accumulators_.at(part.d);
      for (std::size_t i = 0; i < accumulators.values.size(); ++i) {
        if (std::bit_cast<std::uint32_t>(part.d[i]) != kPoison)
          fail("wgmma's accumulators were changed before the wait for it");
      }
      part.product->add_to(part.thread, accumulators.values.data());
      if (--accumulators.products > 0) continue;
      std::memcpy(part.d, accumulators.values.data(), accumulators.values.size() * sizeof(float));
      accumulators_.erase(part.d);
    }
    groups_.erase(groups_.begin());
  }
  is_fenced_ = false;
}

}  // namespace qlora_native::cuda_emulated::emulator
