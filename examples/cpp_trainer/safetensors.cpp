#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <numeric>
#include <stdexcept>

namespace trainer {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& what) {
  throw std::runtime_error(path.string() + ": " + what);
}

// "F32" -> 4, "F8_E4M3" -> 1, "BOOL" -> 1
std::size_t size_of(const std::string& dtype) {
  const auto digit = dtype.find_first_of("0123456789");
  return digit == std::string::npos ? 1 : std::stoul(dtype.substr(digit)) / 8;
}

float half_to_float(std::uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                          : exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                                           : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

void write_whole(const std::filesystem::path& path, const std::function<void(std::ostream&)>& write) {
  std::filesystem::path partial = path;
  partial += ".partial";
  {
    std::ofstream out(partial, std::ios::binary);
    write(out);
    if (!out.flush()) fail(partial, "cannot be written");
  }
  std::filesystem::rename(partial, path);
}

}  // namespace

std::int64_t Tensor::elements() const {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

MappedFile::MappedFile(const std::filesystem::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail(path, std::strerror(errno));
  struct stat status{};
  void* mapped = MAP_FAILED;
  if (fstat(file, &status) == 0 && status.st_size > 0) {
    size_ = static_cast<std::size_t>(status.st_size);
    mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  }
  close(file);
  if (mapped == MAP_FAILED) fail(path, "is empty or cannot be mapped");
  data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() { munmap(const_cast<std::byte*>(data_), size_); }

Checkpoint::Checkpoint(const std::filesystem::path& folder) {
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors") {
      files_.push_back(std::make_unique<MappedFile>(entry.path()));
      add(*files_.back(), entry.path());
    }
  if (files_.empty()) fail(folder, "there is no *.safetensors file");
}

void Checkpoint::add(const MappedFile& file, const std::filesystem::path& path) {
  std::uint64_t length = 0;
  if (file.size() >= 8) std::memcpy(&length, file.data(), 8);
  if (file.size() < 8 || length > file.size() - 8) fail(path, "is no safetensors file");
  const std::size_t data = 8 + static_cast<std::size_t>(length), bytes = file.size() - data;
  const Json header = Json::parse(file.text().substr(8, length));
  for (const auto& [name, entry] : header.object()) {
    if (name == "__metadata__") continue;
    Tensor tensor;
    tensor.dtype = entry["dtype"].string();
    for (const Json& size : entry["shape"].array()) tensor.shape.push_back(size.integer());
    const auto begin = static_cast<std::size_t>(entry["data_offsets"].array().at(0).integer());
    const auto end = static_cast<std::size_t>(entry["data_offsets"].array().at(1).integer());
    if (begin > end || end > bytes ||
        static_cast<std::size_t>(tensor.elements()) * size_of(tensor.dtype) != end - begin)
      fail(path, name + " does not lie in the file as its header says");
    tensor.data = file.data() + data + begin;
    tensor.bytes = end - begin;
    tensors_.insert_or_assign(name, std::move(tensor));
  }
}

const Tensor& Checkpoint::at(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::runtime_error("the checkpoint has no tensor " + name);
  return found->second;
}

const std::string& Checkpoint::starting_with(const std::string& prefix) const {
  const auto found = tensors_.lower_bound(prefix);
  if (found == tensors_.end() || !found->first.starts_with(prefix))
    throw std::runtime_error("the checkpoint has no tensor " + prefix + "*");
  return found->first;
}

std::vector<float> Checkpoint::floats(const std::string& name) const {
  const Tensor& tensor = at(name);
  std::vector<float> out(static_cast<std::size_t>(tensor.elements()));
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (tensor.dtype == "F32") {
      std::memcpy(&out[i], tensor.data + 4 * i, 4);
      continue;
    }
    std::uint16_t half;
    std::memcpy(&half, tensor.data + 2 * i, 2);
    if (tensor.dtype == "BF16")
      out[i] = std::bit_cast<float>(std::uint32_t{half} << 16);
    else if (tensor.dtype == "F16")
      out[i] = half_to_float(half);
    else
      throw std::runtime_error(name + ": expected F32, BF16 or F16, got " + tensor.dtype);
  }
  return out;
}

void write_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors) {
  std::string header = "{\"__metadata__\":{\"format\":\"pt\"}";
  std::size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    header += "," + json_string(name) + ":{\"dtype\":" + json_string(tensor.dtype) + ",\"shape\":[";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) header += (i ? "," : "") + std::to_string(tensor.shape[i]);
    header += "],\"data_offsets\":[" + std::to_string(offset) + "," + std::to_string(offset + tensor.bytes) + "]}";
    offset += tensor.bytes;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  write_whole(path, [&](std::ostream& out) {
    const std::uint64_t length = header.size();
    out.write(reinterpret_cast<const char*>(&length), 8);
    out << header;
    for (const auto& [name, tensor] : tensors)
      out.write(reinterpret_cast<const char*>(tensor.data), static_cast<std::streamsize>(tensor.bytes));
  });
}

void write_text(const std::filesystem::path& path, const std::string& text) {
  write_whole(path, [&](std::ostream& out) { out << text; });
}

}  // namespace trainer
