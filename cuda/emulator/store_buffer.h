// A buffer of stores to global memory that others may not see yet. The schedule "concurrent" has one buffer for each
// thread and one for each block (fibers.h says when a store is published).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace qlora_native::cuda_emulated::emulator {

// The buffer holds memory in pieces of 16 bytes, the size of the widest vector. Vectors are aligned, so each lies in
// one piece. Two stores to one piece are published together; pieces are published in any order.
class StoreBuffer {
 public:
  bool empty() const { return pieces_.empty(); }
  std::size_t size() const { return pieces_.size(); }

  void put(void* to, const void* from, std::size_t bytes) {
    Piece& piece = piece_of(to);
    const std::size_t first = static_cast<std::byte*>(to) - piece.address;
    std::memcpy(piece.bytes + first, from, bytes);
    piece.written |= ((1u << bytes) - 1) << first;
  }

  // `to` holds a copy of the memory at `from`. Replaces the bytes of it that this buffer holds.
  void overlay(void* to, const void* from, std::size_t bytes) const {
    if (pieces_.empty()) return;
    const auto* const begin = static_cast<const std::byte*>(from);
    for (std::size_t i = 0; i < bytes; i += i == 0 ? kPieceBytes - offset_of(begin) : kPieceBytes) {
      const auto found = places_.find(begin + i - offset_of(begin + i));
      if (found == places_.end()) continue;
      const Piece& piece = pieces_[found->second];
      for (std::size_t j = i; j < bytes && begin + j < piece.address + kPieceBytes; ++j) {
        const std::size_t at = begin + j - piece.address;
        if (piece.written >> at & 1) static_cast<std::byte*>(to)[j] = piece.bytes[at];
      }
    }
  }

  // Writes the i-th piece to memory, where all may see it.
  void publish(std::size_t i) {
    const Piece& piece = pieces_[i];
    for (std::size_t at = 0; at < kPieceBytes; ++at) {
      if (piece.written >> at & 1) piece.address[at] = piece.bytes[at];
    }
    places_.erase(piece.address);
    if (i + 1 < pieces_.size()) {
      pieces_[i] = pieces_.back();
      places_[pieces_[i].address] = i;
    }
    pieces_.pop_back();
  }
  void publish_all() {
    while (!pieces_.empty()) publish(pieces_.size() - 1);
  }
  // Moves all pieces to another buffer; they overwrite what it holds of the same bytes.
  void move_to(StoreBuffer& to) {
    for (const Piece& piece : pieces_) {
      Piece& other = to.piece_of(piece.address);
      for (std::size_t at = 0; at < kPieceBytes; ++at) {
        if (piece.written >> at & 1) other.bytes[at] = piece.bytes[at];
      }
      other.written |= piece.written;
    }
    pieces_.clear();
    places_.clear();
  }

 private:
  static constexpr std::size_t kPieceBytes = 16;
  struct Piece {
    std::byte* address;
    std::uint32_t written;  // a bit for each byte
    std::byte bytes[kPieceBytes];
  };
  static std::size_t offset_of(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % kPieceBytes; }

  Piece& piece_of(void* p) {
    std::byte* const address = static_cast<std::byte*>(p) - offset_of(p);
    const auto [place, is_new] = places_.try_emplace(address, pieces_.size());
    if (is_new) pieces_.push_back({address, 0, {}});
    return pieces_[place->second];
  }

  std::vector<Piece> pieces_;
  std::unordered_map<const std::byte*, std::size_t> places_;  // from a piece's address to its index in pieces_
};

}  // namespace qlora_native::cuda_emulated::emulator
