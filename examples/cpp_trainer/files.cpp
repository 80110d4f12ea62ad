#include "files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace trainer {
namespace {

[[noreturn]] void fail_with(const std::filesystem::path& path, const std::string& what) {
  throw std::runtime_error(path.string() + ": " + what);
}

// The name of a file is on the disk only when its folder is.
void sync_folder_of(const std::filesystem::path& path) {
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  const int file = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file < 0) fail_with(folder, std::strerror(errno));
  const int error = fsync(file) == 0 ? 0 : errno;
  close(file);
  if (error != 0 && error != EINVAL) fail_with(folder, std::strerror(error));  // EINVAL: not supported there
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // does not wait for a pipe, refused below
  if (file < 0) fail_with(path, std::strerror(errno));
  struct stat status{};
  void* mapped = MAP_FAILED;
  if (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0) {
    size_ = static_cast<std::size_t>(status.st_size);
    mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  }
  ::close(file);
  if (mapped == MAP_FAILED) fail_with(path, "is empty, or no file that can be mapped");
  data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() { munmap(const_cast<std::byte*>(data_), size_); }

NewFile::NewFile(std::filesystem::path path) : path_(std::move(path)), partial_(path_) {
  partial_ += ".partial";
  // A leftover file is removed, not overwritten, because it may be a link to something else.
  if (unlink(partial_.c_str()) != 0 && errno != ENOENT) fail();
  file_ = open(partial_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file_ < 0) fail();
}

NewFile::~NewFile() {
  if (file_ >= 0) ::close(file_);
  if (!is_published_) unlink(partial_.c_str());
}

void NewFile::fail() const { fail_with(path_, std::strerror(errno)); }

void NewFile::write(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(file_, at, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail();
    at += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

void NewFile::sync() {
  if (file_ < 0) return;
  if (fsync(file_) != 0) fail();
  if (::close(std::exchange(file_, -1)) != 0) fail();
}

void NewFile::publish() {
  sync();
  if (rename(partial_.c_str(), path_.c_str()) != 0) fail();
  is_published_ = true;
  sync_folder_of(path_);
}

void remove_file(const std::filesystem::path& path) {
  if (unlink(path.c_str()) != 0) {
    if (errno == ENOENT) return;
    fail_with(path, std::strerror(errno));
  }
  sync_folder_of(path);
}

}  // namespace trainer
