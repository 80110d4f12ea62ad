// PagedUpdate orders the update of optimizer_8bit_step if some state lies in a PagedArena: it says what is updated
// when, and what moves in the meantime.
#pragma once

#include <vector>

#include "qlora_native/paged.h"

namespace qlora_native {

// A tensor of a step, or a piece of one. A piece consists of whole blocks; only the last may end with a partial block.
struct UpdatePart {
  Optimizer8bitTensor tensor;  // its pointers are those that a kernel uses
  std::int64_t index;          // its index in Optimizer8bitArgs::tensors
};

// Elements [first, first + elements) of a tensor. `first` is a multiple of the blocksize.
Optimizer8bitTensor segment_of(const Optimizer8bitTensor& tensor, std::int64_t first, std::int64_t elements);

class PagedUpdate {
 public:
  // Begins to fetch the first segment, so that it arrives while the gradients are checked.
  PagedUpdate(const Optimizer8bitArgs& args, const Stream& stream);

  // launch(parts) puts the update of some parts into the stream. All calls together cover every tensor once; the first
  // call takes all tensors that are not paged.
  template <class F>
  void run(const F& launch) {
    for (std::size_t i = 0; i < visits_.size(); ++i) {
      prepare(i);
      launch(visits_[i].parts);
      complete(i);
    }
    finish();
  }

 private:
  struct Visit {
    PagedArena::Impl* arena;  // null if the parts are not paged
    std::size_t segment;
    std::vector<UpdatePart> parts;
  };
  void begin();
  void fetch(std::size_t visit);
  void prepare(std::size_t visit);
  void complete(std::size_t visit);
  void finish();

  void* stream_;
  std::vector<Visit> visits_;
  std::vector<PagedArena::Impl*> arenas_;  // each arena once
  bool is_short_ = false;                  // if memory is short, a segment goes back once it is updated
};

}  // namespace qlora_native
