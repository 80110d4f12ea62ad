// Files: mapped into memory to be read, and written so that they appear whole or not at all. Every mistake is a
// std::runtime_error that names the file.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace trainer {

// A file, mapped into memory as long as this lives. It must not become shorter meanwhile.
class MappedFile {
 public:
  // A link is followed, wherever it leads: the files are only read, and caches of models consist of links.
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

// A new file. It is called PATH.partial until it is published. If the disk is full or the program ends before that, the
// old file at PATH stays as it was.
class NewFile {
 public:
  explicit NewFile(std::filesystem::path path);  // replaces a PATH.partial that an earlier run has left
  ~NewFile();                                    // removes what has not been published
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  void write(const void* data, std::size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void sync();     // writes all of it to the disk, and fails if that is full
  void publish();  // renames it to PATH

 private:
  [[noreturn]] void fail() const;  // throws an error with the message of errno

  std::filesystem::path path_, partial_;
  int file_ = -1;
  bool is_published_ = false;
};

// Removes a file, if it exists, and waits until the disk has recorded it.
void remove_file(const std::filesystem::path& path);

}  // namespace trainer
