// A reader of JSON: the headers of safetensors files and a model's config. Everything but surrogate pairs.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace trainer {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json, std::less<>>;

  // Throws std::runtime_error with the position of the mistake.
  static Json parse(std::string_view text);

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  // Each throws std::runtime_error if the value is of another type.
  bool boolean() const { return get<bool>("true or false"); }
  double number() const { return get<double>("a number"); }
  const std::string& string() const { return get<std::string>("a string"); }
  const Array& array() const { return get<Array>("an array"); }
  const Object& object() const { return get<Object>("an object"); }
  std::int64_t integer() const { return static_cast<std::int64_t>(number()); }

  // The value of a key: null if there is none.
  const Json& operator[](std::string_view key) const;

 private:
  friend class JsonParser;
  template <class T>
  const T& get(const char* expected) const;

  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value_ = nullptr;
};

// `text` in quotes, escaped.
std::string json_string(std::string_view text);

}  // namespace trainer
