// The tensors of a call on the emulated device. The caller's tensors lie in the host's memory: with_device_tensors()
// copies them to the device's memory, runs the call on the copies, and copies the results back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "qlora_native/types.h"

namespace qlora_native::cuda_emulated {

class CallMemory {
 public:
  CallMemory() = default;
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;
  ~CallMemory();

  // add() is called for each tensor, in any order. A null pointer adds nothing. A pointer to const means that the call
  // only reads the tensor.
  template <class T>
  void add(T*& pointer, std::int64_t count) {
    add_rows(&pointer, pointer, 1, count * static_cast<std::int64_t>(sizeof(T)), 0, !std::is_const_v<T>);
  }
  template <class T>  // void or const void
  void add(T*& pointer, DType dtype, std::int64_t count) {
    add_rows(&pointer, pointer, 1, count * static_cast<std::int64_t>(size_of(dtype)), 0, !std::is_const_v<T>);
  }
  template <class... Pointers>
  void add(BasicMatrix<Pointers>&... matrices) {
    (add_matrix(matrices), ...);
  }

  // To be called after the last add(): allocates memory, copies the tensors, and points the arguments at the copies.
  void move_to_device();
  // To be called after the kernels: copies the results back. Ends the process if a kernel has written a tensor that
  // the call only reads.
  void copy_back() const;

 private:
  struct View {
    void* pointer;  // where the arguments keep the tensor's address
    std::byte* host;
    std::int64_t rows, row_bytes, stride_bytes;
    bool is_written;
    std::byte* device = nullptr;

    std::byte* end() const { return rows == 0 ? host : host + (rows - 1) * stride_bytes + row_bytes; }
    template <class F>
    void each_row(const F& f) const {
      for (std::int64_t row = 0; row < rows; ++row) f(host + row * stride_bytes, device + row * stride_bytes);
    }
  };
  template <class Pointer>
  void add_matrix(BasicMatrix<Pointer>& matrix) {
    const auto size = static_cast<std::int64_t>(size_of(matrix.dtype));
    add_rows(&matrix.data, matrix.data, matrix.rows, matrix.cols * size, matrix.stride * size,
             !std::is_const_v<std::remove_pointer_t<Pointer>>);
  }
  void add_rows(void* pointer, const void* host, std::int64_t rows, std::int64_t row_bytes, std::int64_t stride_bytes,
                bool is_written);

  std::vector<View> views_;
  std::byte* memory_ = nullptr;  // on the device
};

// Runs a call on copies of its tensors in the device's memory. add_tensors(CallMemory&, Args&) adds each of its
// tensors.
template <class Args, class Run>
void with_device_tensors(const Args& args, const Run& run) {
  CallMemory memory;
  Args copy = args;
  add_tensors(memory, copy);
  memory.move_to_device();
  run(copy);
  memory.copy_back();
}

}  // namespace qlora_native::cuda_emulated
