#include "safetensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "json.h"

namespace trainer {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr std::uint64_t kLongestHeader = 100'000'000;  // the format's own limit

[[noreturn]] void fail(const std::string& name, const std::string& what) {
  throw std::runtime_error(name + ": " + what);
}

// The bytes of an element, or 0 for an unknown dtype. Dtypes of less than a byte are not supported.
std::size_t size_of(std::string_view dtype) {
  struct Known {
    std::size_t bytes;
    std::vector<std::string_view> dtypes;
  };
  static const std::vector<Known> known = {{1, {"BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"}},
                                           {2, {"U16", "I16", "F16", "BF16"}},
                                           {4, {"U32", "I32", "F32"}},
                                           {8, {"U64", "I64", "F64", "C64"}}};
  for (const auto& [bytes, dtypes] : known)
    if (std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end()) return bytes;
  return 0;
}

// The bytes of a tensor, or nothing if their number does not fit in 64 bits.
std::optional<std::size_t> bytes_of(const Shape& shape, std::size_t element) {
  std::size_t bytes = element;
  for (const std::int64_t size : shape)
    if (__builtin_mul_overflow(bytes, static_cast<std::size_t>(size), &bytes)) return std::nullopt;
  return bytes;
}

float half_to_float(std::uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                          : exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                                           : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Sets out[i] = convert(element i), for elements of 16 bits at any address.
template <class Convert>
void convert_halves(const std::byte* data, std::vector<float>& out, Convert convert) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    std::uint16_t half = 0;
    std::memcpy(&half, data + 2 * i, 2);
    out[i] = convert(half);
  }
}

// In NaN and infinity all bits of the exponent are ones, so that adding its lowest bit carries into the sign bit. The
// loop has no early exit, so that the compiler can vectorize it.
bool all_finite(const std::vector<float>& values) {
  std::uint32_t carries = 0;
  for (const float value : values) carries |= (std::bit_cast<std::uint32_t>(value) & 0x7F800000) + 0x00800000;
  return carries >> 31 == 0;
}

}  // namespace

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

Checkpoint::Checkpoint(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path());
  if (paths.empty()) fail(folder.string(), "there is no *.safetensors file");
  std::sort(paths.begin(), paths.end());
  for (const auto& path : paths) {
    files_.push_back(std::make_unique<MappedFile>(path));
    add(files_.back()->text(), path.string());
  }
}

void Checkpoint::add(std::string_view file, const std::string& name) {
  std::uint64_t length = 0;
  if (file.size() < 8) fail(name, "expected a safetensors file, got " + std::to_string(file.size()) + " bytes");
  std::memcpy(&length, file.data(), 8);
  if (length > std::min<std::uint64_t>(kLongestHeader, file.size() - 8))
    fail(name, "is cut short or no safetensors file: its header would have " + std::to_string(length) + " bytes");
  const std::string_view data = file.substr(8 + length);
  const Json header = Json::parse(file.substr(8, length), name);
  for (const std::string& key : header.keys()) {
    const Json entry = header[key];
    if (key == "__metadata__") {
      for (const std::string& item : entry.keys()) entry[item].string();
      continue;
    }
    Tensor tensor;
    tensor.dtype = entry["dtype"].string();
    const std::size_t element = size_of(tensor.dtype);
    if (element == 0) entry["dtype"].fail("a dtype that is known here");
    for (const Json& size : entry["shape"].array()) tensor.shape.push_back(size.integer(0));
    const std::vector<Json> offsets = entry["data_offsets"].array();
    if (offsets.size() != 2) entry["data_offsets"].fail("two numbers");
    const auto begin = static_cast<std::size_t>(offsets[0].integer(0));
    const auto end = static_cast<std::size_t>(offsets[1].integer(0));
    if (begin > end || end > data.size())
      fail(entry.name(), "lies in bytes " + std::to_string(begin) + " ... " + std::to_string(end) + " of the file's " +
                             std::to_string(data.size()) + ": it is cut short, or its header is wrong");
    tensor.bytes = end - begin;
    if (bytes_of(tensor.shape, element) != tensor.bytes)
      fail(entry.name(), "has " + std::to_string(tensor.bytes) + " bytes, which are not " + tensor.dtype + " " +
                             in_a_line(text_of(tensor.shape)));
    tensor.data = reinterpret_cast<const std::byte*>(data.data()) + begin;
    if (!tensors_.emplace(key, std::move(tensor)).second) fail(entry.name(), "is in another file of the folder, too");
  }
}

const Tensor& Checkpoint::at(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::runtime_error("the checkpoint has no tensor " + name);
  read_.insert(name);
  return found->second;
}

bool Checkpoint::contains_any_below(const std::string& prefix) const {
  const auto found = tensors_.lower_bound(prefix);
  return found != tensors_.end() && found->first.starts_with(prefix);
}

void Checkpoint::check_all_were_read() const {
  for (const auto& [name, tensor] : tensors_)
    if (!read_.contains(name) && !name.ends_with("rotary_emb.inv_freq"))
      fail(name,
           "expected a tensor of this model, got another, " + tensor.dtype + " " + in_a_line(text_of(tensor.shape)));
}

std::vector<float> Checkpoint::floats(const std::string& name, const Shape& shape, const std::string& why) const {
  const Tensor& tensor = at(name);
  if (tensor.shape != shape)
    fail(name,
         "expected " + text_of(shape) + (why.empty() ? "" : " " + why) + ", got " + in_a_line(text_of(tensor.shape)));
  const std::size_t element = tensor.dtype == "F32" ? 4 : 2;
  if (element == 2 && tensor.dtype != "BF16" && tensor.dtype != "F16")
    fail(name, "expected F32, BF16 or F16, got " + tensor.dtype);
  std::vector<float> out(tensor.bytes / element);
  if (element == 4) {
    if (!out.empty()) std::memcpy(out.data(), tensor.data, tensor.bytes);
  } else if (tensor.dtype == "BF16") {
    convert_halves(tensor.data, out,
                   [](std::uint16_t half) { return std::bit_cast<float>(std::uint32_t{half} << 16); });
  } else {
    convert_halves(tensor.data, out, half_to_float);
  }
  if (!all_finite(out)) {
    const auto bad = std::find_if_not(out.begin(), out.end(), [](float value) { return std::isfinite(value); });
    fail(name, "expected finite values, got " + std::to_string(*bad) + " at " + std::to_string(bad - out.begin()));
  }
  return out;
}

std::span<const std::uint8_t> Checkpoint::bytes(const std::string& name) const {
  const Tensor& tensor = at(name);
  if (tensor.dtype != "U8") fail(name, "expected U8, got " + tensor.dtype);
  return {reinterpret_cast<const std::uint8_t*>(tensor.data), tensor.bytes};
}

void write_safetensors(NewFile& file, const std::map<std::string, Tensor>& tensors) {
  std::string header = "{\"__metadata__\":{\"format\":\"pt\"}";
  std::size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    header += "," + json_string(name) + ":{\"dtype\":" + json_string(tensor.dtype) +
              ",\"shape\":" + text_of(tensor.shape) + ",\"data_offsets\":[" + std::to_string(offset) + "," +
              std::to_string(offset + tensor.bytes) + "]}";
    offset += tensor.bytes;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = header.size();
  file.write(&length, sizeof(length));
  file.write(header);
  for (const auto& [name, tensor] : tensors) file.write(tensor.data, tensor.bytes);
}

}  // namespace trainer
