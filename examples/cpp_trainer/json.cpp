#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <variant>

namespace trainer {

struct JsonValue {
  using Array = std::vector<JsonValue>;
  using Object = std::map<std::string, JsonValue, std::less<>>;
  // A number that is written as an integer is kept as one if it fits, because a double would round it.
  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> value = nullptr;
};

namespace {

class Parser {
 public:
  Parser(std::string_view text, const std::string& source) : text_(text), source_(source) {}

  JsonValue document() {
    JsonValue json = value(0);
    skip_space();
    if (at_ != text_.size()) fail("the end");
    return json;
  }

 private:
  static constexpr int kDeepest = 100;

  [[noreturn]] void fail(const std::string& expected) const { refuse("expected " + expected); }
  [[noreturn]] void refuse(const std::string& what) const {
    throw std::runtime_error(source_ + ": JSON: " + what + " at byte " + std::to_string(at_));
  }
  bool next_is_one_of(std::string_view characters) const {
    return at_ < text_.size() && characters.find(text_[at_]) != std::string_view::npos;
  }
  void skip_space() {
    while (next_is_one_of(" \t\r\n")) ++at_;
  }
  bool take(std::string_view token) {
    skip_space();
    if (text_.substr(at_, token.size()) != token) return false;
    at_ += token.size();
    return true;
  }

  JsonValue value(int depth) {
    if (depth > kDeepest) fail("fewer levels");
    if (take("{")) return {object(depth)};
    if (take("[")) return {array(depth)};
    if (take("\"")) return {string()};
    if (take("true")) return {true};
    if (take("false")) return {false};
    if (take("null")) return {nullptr};
    return number();
  }

  JsonValue::Object object(int depth) {
    JsonValue::Object object;
    if (take("}")) return object;
    do {
      if (!take("\"")) fail("a key");
      std::string key = string();
      if (object.contains(key)) refuse("a second key " + in_a_line(key));
      if (!take(":")) fail("':'");
      object.emplace(std::move(key), value(depth + 1));
    } while (take(","));
    if (!take("}")) fail("'}'");
    return object;
  }

  JsonValue::Array array(int depth) {
    JsonValue::Array array;
    if (take("]")) return array;
    do array.push_back(value(depth + 1));
    while (take(","));
    if (!take("]")) fail("']'");
    return array;
  }

  // JSON has no NaN, no infinity and no leading zeros.
  JsonValue number() {
    const std::size_t begin = at_;
    const auto digits = [&] {
      if (!next_is_one_of("0123456789")) fail("a value");
      while (next_is_one_of("0123456789")) ++at_;
    };
    bool is_integer = true;
    if (next_is_one_of("-")) ++at_;
    if (next_is_one_of("0"))
      ++at_;
    else
      digits();
    if (next_is_one_of(".")) {
      is_integer = false;
      ++at_;
      digits();
    }
    if (next_is_one_of("eE")) {
      is_integer = false;
      ++at_;
      if (next_is_one_of("+-")) ++at_;
      digits();
    }
    const char *const first = text_.data() + begin, *const end = text_.data() + at_;
    std::int64_t integer = 0;
    if (is_integer && std::from_chars(first, end, integer).ec == std::errc{}) return {integer};
    double number = 0.0;
    if (std::from_chars(first, end, number).ec != std::errc{}) {
      at_ = begin;
      fail("a number that a double can hold");
    }
    return {number};
  }

  // Reads a string after its opening quote.
  std::string string() {
    std::string out;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("an escape for a control character");
      if (text_[at_] != '\\') {
        out += text_[at_++];
        continue;
      }
      const char escaped = ++at_ < text_.size() ? text_[at_++] : '\0';
      constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
      if (const auto i = kNames.find(escaped); i != std::string_view::npos)
        out += kMeant[i];
      else if (escaped == 'u')
        append_utf8(code_point(), out);
      else
        fail("an escape");
    }
    if (at_ == text_.size()) fail("'\"'");
    ++at_;
    return out;
  }

  // Reads a code point after "\u". Code points above U+FFFF are written as two surrogates, the high one first.
  std::uint32_t code_point() {
    const std::uint32_t first = hex_digits();
    if (first < 0xD800 || first > 0xDFFF) return first;
    if (first > 0xDBFF || text_.substr(at_, 2) != "\\u") fail("a pair of surrogates");
    at_ += 2;
    const std::uint32_t second = hex_digits();
    if (second < 0xDC00 || second > 0xDFFF) fail("a pair of surrogates");
    return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
  }
  std::uint32_t hex_digits() {
    std::uint32_t code = 0;
    const std::string_view digits = text_.substr(at_, 4);
    if (digits.size() < 4 || std::from_chars(digits.data(), digits.data() + 4, code, 16).ptr != digits.data() + 4)
      fail("4 hex digits");
    at_ += 4;
    return code;
  }

  static void append_utf8(std::uint32_t code, std::string& out) {
    const auto byte = [&](std::uint32_t value) { out += static_cast<char>(value); };
    const auto six_bits_from = [&](int shift) { byte(0x80 | (code >> shift & 0x3F)); };
    if (code < 0x80) return byte(code);
    if (code < 0x800) {
      byte(0xC0 | code >> 6);
    } else if (code < 0x10000) {
      byte(0xE0 | code >> 12);
      six_bits_from(6);
    } else {
      byte(0xF0 | code >> 18);
      six_bits_from(12);
      six_bits_from(6);
    }
    six_bits_from(0);
  }

  std::string_view text_;
  const std::string& source_;
  std::size_t at_ = 0;
};

// Describes a value for an error.
struct Describe {
  std::string operator()(std::nullptr_t) const { return "null"; }
  std::string operator()(bool value) const { return value ? "true" : "false"; }
  std::string operator()(std::int64_t value) const { return std::to_string(value); }
  std::string operator()(double value) const {
    char text[32];
    std::snprintf(text, sizeof(text), "%.17g", value);
    return text;
  }
  std::string operator()(const std::string& value) const { return '"' + in_a_line(value) + '"'; }
  std::string operator()(const JsonValue::Array&) const { return "an array"; }
  std::string operator()(const JsonValue::Object&) const { return "an object"; }
};

}  // namespace

Json::Json(std::shared_ptr<const JsonValue> value, std::string name)
    : value_(std::move(value)), name_(std::move(name)) {}

Json Json::parse(std::string_view text, std::string source) {
  auto document = std::make_shared<const JsonValue>(Parser(text, source).document());
  return {std::move(document), std::move(source)};
}

void Json::fail(const std::string& expected) const {
  throw std::runtime_error(name_ + ": expected " + expected + ", got " + std::visit(Describe{}, value_->value));
}

template <class T>
const T& Json::get(const char* expected) const {
  const T* const value = std::get_if<T>(&value_->value);
  if (value == nullptr) fail(expected);
  return *value;
}

bool Json::is_null() const { return std::holds_alternative<std::nullptr_t>(value_->value); }
bool Json::boolean() const { return get<bool>("true or false"); }
const std::string& Json::string() const { return get<std::string>("a string"); }

double Json::number() const {
  const auto* const integer = std::get_if<std::int64_t>(&value_->value);
  return integer != nullptr ? static_cast<double>(*integer) : get<double>("a number");
}

float Json::float32() const {
  const double value = number();
  if (!(std::fabs(value) <= 3.4028234663852886e38)) fail("a number that is finite in fp32");
  return static_cast<float>(value);
}

std::int64_t Json::integer(std::int64_t least, std::int64_t most) const {
  const auto* const value = std::get_if<std::int64_t>(&value_->value);
  if (value == nullptr || *value < least || *value > most)
    fail("an integer from " + std::to_string(least) + " to " + std::to_string(most));
  return *value;
}

std::vector<Json> Json::array() const {
  std::vector<Json> items;
  for (const JsonValue& item : get<JsonValue::Array>("an array"))
    items.push_back({{value_, &item}, name_ + "[" + std::to_string(items.size()) + "]"});
  return items;
}

std::vector<std::string> Json::keys() const {
  std::vector<std::string> keys;
  for (const auto& [key, value] : get<JsonValue::Object>("an object")) keys.push_back(key);
  return keys;
}

Json Json::operator[](std::string_view key) const {
  static const auto null = std::make_shared<const JsonValue>();
  const auto& object = get<JsonValue::Object>("an object");
  const auto found = object.find(key);
  const std::string separator = name_.find(": ") == std::string::npos ? ": " : ".";
  return {found == object.end() ? null : std::shared_ptr<const JsonValue>{value_, &found->second},
          name_ + separator + in_a_line(key)};
}

std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[7];
      std::snprintf(escape, sizeof(escape), "\\u%04x", static_cast<unsigned>(c));
      out += escape;
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string in_a_line(std::string_view text) {
  constexpr std::size_t kLongest = 200;
  const auto is_control = [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == '\x7F'; };
  if (text.size() <= kLongest && std::none_of(text.begin(), text.end(), is_control)) return std::string(text);
  return json_string(text.substr(0, kLongest));
}

}  // namespace trainer
