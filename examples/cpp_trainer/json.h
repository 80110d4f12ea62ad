// A reader of JSON: a model's config, the headers of safetensors files, bitsandbytes' quant_state. Such files come from
// elsewhere, so everything is checked. Text that is not JSON, a key that occurs twice, and a value of the wrong type
// are errors that name the file and the key.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace trainer {

struct JsonValue;  // in json.cpp

// A value in a document. The document lives as long as one of its values does. Every mistake is a std::runtime_error.
class Json {
 public:
  static constexpr std::int64_t kLargest = std::int64_t{1} << 53;  // a double holds every integer up to here

  // `source` is the name of the text in errors, which is the name of its file.
  static Json parse(std::string_view text, std::string source);

  bool is_null() const;
  bool boolean() const;
  double number() const;
  float float32() const;  // a number that is finite in fp32
  // A number in [least, most] that is written without a fraction and an exponent.
  std::int64_t integer(std::int64_t least, std::int64_t most = kLargest) const;
  const std::string& string() const;
  std::vector<Json> array() const;
  std::vector<std::string> keys() const;             // the keys of an object
  Json operator[](std::string_view key) const;       // a value of an object; null if it has no such key
  const std::string& name() const { return name_; }  // "config.json: rope_parameters.rope_theta"

  // "config.json: hidden_size: expected `expected`, got -64"
  [[noreturn]] void fail(const std::string& expected) const;

 private:
  Json(std::shared_ptr<const JsonValue> value, std::string name);
  template <class T>
  const T& get(const char* expected) const;

  std::shared_ptr<const JsonValue> value_;
  std::string name_;
};

// `text` in quotes, escaped.
std::string json_string(std::string_view text);

// `text` shortened for one line: unchanged, or its beginning in quotes if it is long or has control characters.
std::string in_a_line(std::string_view text);

}  // namespace trainer
