// Reads the files of a model: JSON, and tensors in the safetensors format, which is 8 bytes with the length of a
// header, the header in JSON, and the tensors' bytes. The files may come from a stranger, so every size is checked
// before it is used. Every mistake is a std::runtime_error that names the file, and the key or the tensor.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

using Json = nlohmann::json;
using Shape = std::vector<std::int64_t>;

[[noreturn]] inline void fail(const std::string& name, const std::string& what) {
  throw std::runtime_error(name + ": " + what);
}

// A value of a file for an error: escaped, on one line, and not too long.
inline std::string text_of(const Json& value) { return value.dump(-1, ' ', true).substr(0, 300); }

// The bytes of a file. Pipes and folders are refused.
inline std::int64_t size_of_file(const std::filesystem::path& path) {
  if (!std::filesystem::is_regular_file(path)) fail(path.string(), "expected a file");
  return static_cast<std::int64_t>(std::filesystem::file_size(path));
}

// `count` elements from byte `offset` of a file on. They must lie within it.
template <class T>
std::vector<T> read_file(const std::filesystem::path& path, std::int64_t offset, std::int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  std::ifstream file(path, std::ios::binary);
  file.seekg(offset);
  file.read(reinterpret_cast<char*>(values.data()), count * static_cast<std::int64_t>(sizeof(T)));
  if (!file) fail(path.string(), "cannot be read");
  return values;
}

// A JSON object, whose errors say "NAME: KEY: expected an integer from 1 to 8, got 32".
struct JsonObject {
  const std::string name;
  const Json json;

  // A key that occurs twice is refused, because programs differ in which of its values counts.
  static JsonObject parse(const std::vector<char>& text, const std::string& name) {
    constexpr int kMaxDepth = 16;
    std::vector<std::set<std::string>> keys;  // of the objects that the parser is in
    const auto check = [&](int depth, Json::parse_event_t event, const Json& value) {
      if (depth > kMaxDepth) fail(name, "expected JSON of at most " + std::to_string(kMaxDepth) + " levels");
      if (event == Json::parse_event_t::object_start) keys.emplace_back();
      if (event == Json::parse_event_t::object_end) keys.pop_back();
      if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
        fail(name, "expected each key once, got a second " + text_of(value));
      return true;
    };
    try {
      const Json json = Json::parse(text, check);
      if (!json.is_object()) fail(name, "expected a JSON object, got " + text_of(json));
      return {name, json};
    } catch (const Json::exception& error) {
      fail(name, std::string(error.what()).substr(0, 300));
    }
  }

  void expect(bool ok, const std::string& key, const std::string& expected) const {
    if (!ok) fail(name, key + ": expected " + expected + ", got " + text_of(at(key)));
  }
  const Json& at(const std::string& key) const {  // null if there is no such key
    static const Json null;
    const auto found = json.find(key);
    return found == json.end() ? null : *found;
  }
  bool has(const std::string& key) const { return !at(key).is_null(); }
  static bool is_between(const Json& value, std::uint64_t min, std::uint64_t max) {
    return value.is_number_unsigned() && value.get<std::uint64_t>() >= min && value.get<std::uint64_t>() <= max;
  }
  std::int64_t integer(const std::string& key, std::int64_t min, std::int64_t max) const {
    expect(is_between(at(key), min, max), key, "an integer from " + text_of(min) + " to " + text_of(max));
    return at(key);
  }
  double number(const std::string& key, double min, double max) const {
    expect(at(key).is_number() && at(key) >= min && at(key) <= max, key,
           "a number from " + text_of(min) + " to " + text_of(max));
    return at(key);
  }
  Shape integers(const std::string& key) const {
    const auto is_size = [](const Json& value) { return is_between(value, 0, std::int64_t{1} << 53); };
    expect(at(key).is_array() && std::all_of(at(key).begin(), at(key).end(), is_size), key, "integers from 0 to 2^53");
    return at(key);
  }
  JsonObject object(const std::string& key) const {
    expect(at(key).is_object(), text_of(key), "an object");
    return {name + ": " + text_of(key), at(key)};
  }
};

// The tensors of all *.safetensors files of a folder, in F32, BF16 or F16.
class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& folder) {
    for (const auto& entry : std::filesystem::directory_iterator(folder))
      if (entry.path().extension() == ".safetensors") add(entry.path());
    if (tensors_.empty()) fail(folder.string(), "expected *.safetensors files with tensors, got none");
  }

  bool contains(const std::string& name) const { return tensors_.contains(name); }

  // Reads a tensor, once, into fp32. It must have this shape, and finite values.
  std::vector<float> take(const std::string& name, const Shape& shape) {
    const auto node = tensors_.extract(name);
    if (node.empty()) fail(name, "expected a tensor of this name, got none");
    const auto& [file, dtype, actual_shape, offset, elements] = node.mapped();
    if (actual_shape != shape)
      fail(name, "expected " + text_of(shape) + " as config.json says, got " + text_of(actual_shape));
    std::vector<float> values;
    if (dtype == "F32")
      values = read_file<float>(file, offset, elements);
    else
      for (const std::uint16_t bits : read_file<std::uint16_t>(file, offset, elements))
        values.push_back(dtype == "F16" ? float_of_half(bits) : std::bit_cast<float>(std::uint32_t{bits} << 16));
    for (std::size_t i = 0; i < values.size(); ++i)
      if (!std::isfinite(values[i]))
        fail(name, "expected finite values, got " + std::to_string(values[i]) + " at " + std::to_string(i));
    return values;
  }

  // Fails at a tensor that was not read: what it says about the model, such as a bias or a scale, would be lost.
  void check_all_were_taken() const {
    for (const auto& [name, tensor] : tensors_)
      if (!name.ends_with("rotary_emb.inv_freq"))  // which older files have, and which is computed here
        fail(tensor.file.string(), "expected tensors of this model, got " + text_of(name));
  }

 private:
  struct Tensor {
    std::filesystem::path file;
    std::string dtype;
    Shape shape;
    std::int64_t offset, elements;
  };

  void add(const std::filesystem::path& path) {
    constexpr std::int64_t kMaxHeader = 100'000'000;  // the format's own limit
    const std::int64_t size = size_of_file(path);
    const std::uint64_t length = size < 8 ? 0 : read_file<std::uint64_t>(path, 0, 1)[0];
    if (size < 8 || length > static_cast<std::uint64_t>(std::min(kMaxHeader, size - 8)))
      fail(path.string(), "expected a safetensors file, got " + std::to_string(size) + " bytes that begin with " +
                              std::to_string(length) + " as the length of a header");
    const std::int64_t start = 8 + static_cast<std::int64_t>(length);
    const JsonObject header = JsonObject::parse(read_file<char>(path, 8, start - 8), path.string());
    for (const auto& [name, json] : header.json.items()) {
      if (name == "__metadata__") continue;
      const JsonObject entry = header.object(name);
      const Json& dtype = entry.at("dtype");
      entry.expect(dtype == "F32" || dtype == "BF16" || dtype == "F16", "dtype", "F32, BF16 or F16");
      const Shape shape = entry.integers("shape"), range = entry.integers("data_offsets");
      entry.expect(range.size() == 2 && range[0] <= range[1] && range[1] <= size - start, "data_offsets",
                   "a range of the file's " + std::to_string(size - start) + " bytes of tensors");
      const std::int64_t element = dtype == "F32" ? 4 : 2;
      std::int64_t bytes = element;
      bool fits = true;
      for (const std::int64_t count : shape) fits = fits && !__builtin_mul_overflow(bytes, count, &bytes);
      entry.expect(fits && bytes == range[1] - range[0], "shape", "that of the data_offsets");
      if (!tensors_.emplace(name, Tensor{path, dtype, shape, start + range[0], bytes / element}).second)
        fail(entry.name, "is in another file of the folder, too");
    }
  }

  static float float_of_half(std::uint16_t bits) {
    if ((bits & 0x7C00) == 0x7C00) return NAN;                                        // or infinite
    const float magnitude = std::bit_cast<float>((bits & 0x7FFFu) << 13) * 0x1p112f;  // another bias of the exponent
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
  }

  std::map<std::string, Tensor> tensors_;
};
