// Checkpoints in the safetensors format: 8 bytes of length, a JSON header, the tensors' bytes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "json.h"

namespace trainer {

struct Tensor {
  std::string dtype;  // "F32", "BF16", "F16", "U8", "I32", ...
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;
  std::size_t bytes = 0;

  std::int64_t elements() const;
};

// A file, mapped into memory as long as this lives.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// The tensors of all *.safetensors files of a folder, by name. They are not read until they are used.
class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& folder);

  bool contains(const std::string& name) const { return tensors_.contains(name); }
  // Throws std::runtime_error naming what is missing.
  const Tensor& at(const std::string& name) const;
  // The name of the one tensor that begins so.
  const std::string& starting_with(const std::string& prefix) const;
  // A copy as fp32.
  std::vector<float> floats(const std::string& name) const;

 private:
  void add(const MappedFile& file, const std::filesystem::path& path);

  std::vector<std::unique_ptr<MappedFile>> files_;
  std::map<std::string, Tensor> tensors_;
};

// Writes such a file: under another name first, so that it appears whole or not at all.
void write_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors);
void write_text(const std::filesystem::path& path, const std::string& text);

}  // namespace trainer
