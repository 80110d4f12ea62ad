// Switches between stacks. On x86-64 this is a few lines of assembly and takes 8 ns. Elsewhere ucontext does it in
// 282 ns, because it saves the signal mask by a system call. AddressSanitizer is told of each switch.
#pragma once

#include <cstddef>
#include <cstdint>

// QLN_UCONTEXT selects ucontext on x86-64 too, so that it can be tested there.
#if defined(__x86_64__) && !defined(QLN_UCONTEXT)
#define QLN_SWITCH_IN_ASSEMBLY
#else
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef QLN_SWITCH_IN_ASSEMBLY
extern "C" void qln_switch_stack(void** save, void* load);  // fibers.cpp
#endif

namespace qlora_native::cuda_emulated::emulator {

// A suspended flow of control. Switching is between the scheduler and a fiber, never between two fibers.
class Context {
 public:
  Context() = default;
  Context(std::byte* stack, std::size_t bytes, void (*entry)()) : stack_(stack), bytes_(bytes) {
#ifdef QLN_SWITCH_IN_ASSEMBLY
    // The stack looks as if qln_switch_stack had been called at the beginning of `entry`:
    //
    //   top          null, in place of a return address: 8 bytes below a multiple of 16, where a call leaves it
    //   below it     the address of `entry`, to which qln_switch_stack returns
    //   below that   six saved registers
    void** top = reinterpret_cast<void**>(stack + bytes) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Continues `to`, and returns when something switches back here. `last` says that nothing ever will.
  void switch_to(Context& to, [[maybe_unused]] bool last = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, to.stack_, to.bytes_);
#endif
#ifdef QLN_SWITCH_IN_ASSEMBLY
    qln_switch_stack(&pointer_, to.pointer_);
#else
    swapcontext(&context_, &to.context_);
#endif
    arrived(*this, to);
  }

  // To be called where a flow of control continues, after the switch from `from` to `self`.
  static void arrived([[maybe_unused]] Context& self, [[maybe_unused]] Context& from) {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom = nullptr;
    std::size_t bytes = 0;
    __sanitizer_finish_switch_fiber(self.fake_stack_, &bottom, &bytes);
    if (from.stack_ == nullptr) from.stack_ = static_cast<const std::byte*>(bottom), from.bytes_ = bytes;
#endif
  }

 private:
  const std::byte* stack_ = nullptr;
  std::size_t bytes_ = 0;
#ifdef QLN_SWITCH_IN_ASSEMBLY
  void* pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack_ = nullptr;
#endif
};

}  // namespace qlora_native::cuda_emulated::emulator
