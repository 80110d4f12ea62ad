// Checkpoints in the safetensors format: 8 bytes with the length of the header, a JSON header, and the tensors' bytes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"

namespace trainer {

using Shape = std::vector<std::int64_t>;
std::string text_of(const Shape& shape);  // "[576, 64]"

struct Tensor {
  std::string dtype;  // "F32", "BF16", "F16", "U8", "I32", ...
  Shape shape;
  const std::byte* data = nullptr;
  std::size_t bytes = 0;
};

// The tensors of all *.safetensors files of a folder, by name. They are not read until they are used. Every mistake is
// a std::runtime_error that names the file or the tensor.
class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& folder);
  // Reads one such file from the caller's memory. `name` is its name in errors.
  Checkpoint(std::string_view file, const std::string& name) { add(file, name); }

  bool contains(const std::string& name) const { return tensors_.contains(name); }
  bool contains_any_below(const std::string& prefix) const;
  // Fails at a tensor that nobody has read: what it says of the model, such as a bias or a scale, would be lost. The
  // frequencies of rotary embeddings, which older files have, are computed.
  void check_all_were_read() const;
  // A copy in fp32 of a tensor, which must have this shape and finite values. `why` ends the error about a wrong shape.
  std::vector<float> floats(const std::string& name, const Shape& shape, const std::string& why = "") const;
  // The bytes of a tensor of U8.
  std::span<const std::uint8_t> bytes(const std::string& name) const;

 private:
  void add(std::string_view file, const std::string& name);
  const Tensor& at(const std::string& name) const;

  std::vector<std::unique_ptr<MappedFile>> files_;
  std::map<std::string, Tensor> tensors_;
  mutable std::set<std::string> read_;
};

void write_safetensors(NewFile& file, const std::map<std::string, Tensor>& tensors);

}  // namespace trainer
