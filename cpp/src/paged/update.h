// The update of optimizer_8bit_step where some state lies in a PagedArena: what is updated when, and what moves
// meanwhile.
#pragma once

#include <vector>

#include "qlora_native/paged.h"

namespace qlora_native {

// A tensor of a step, or a piece of one: whole blocks, and all up to its end.
struct UpdatePart {
  Optimizer8bitTensor tensor;  // where a kernel finds them
  std::int64_t index;          // which one of Optimizer8bitArgs::tensors
};

// Elements [first, first + elements) of a tensor; first is a multiple of the blocksize.
Optimizer8bitTensor stretch_of(const Optimizer8bitTensor& tensor, std::int64_t first, std::int64_t elements);

class PagedUpdate {
 public:
  // Asks for the first stretch, so that it comes while the gradients are looked at.
  PagedUpdate(const Optimizer8bitArgs& args, const Stream& stream);

  // launch(parts) puts the update of some parts into the stream; all calls together cover every tensor once. First come
  // those that are not paged, together.
  template <class F>
  void run(const F& launch) {
    for (std::size_t i = 0; i < visits_.size(); ++i) {
      before(i);
      launch(visits_[i].parts);
      after(i);
    }
    finish();
  }

 private:
  struct Visit {
    PagedArena::Impl* arena;  // null: not paged
    std::size_t stretch;
    std::vector<UpdatePart> parts;
  };
  void begin();
  void fetch(std::size_t visit);
  void before(std::size_t visit);
  void after(std::size_t visit);
  void finish();

  void* stream_;
  std::vector<Visit> visits_;
  std::vector<PagedArena::Impl*> arenas_;  // each once
  bool is_short_ = false;                  // of memory: what was updated goes back
};

}  // namespace qlora_native
