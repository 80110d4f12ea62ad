#include "json.h"

#include <charconv>
#include <cstdio>
#include <stdexcept>

namespace trainer {

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json json = value(0);
    skip_space();
    if (at_ != text_.size()) fail("the end");
    return json;
  }

 private:
  static constexpr int kDeepest = 100;

  [[noreturn]] void fail(const char* expected) const {
    throw std::runtime_error("JSON: expected " + std::string(expected) + " at byte " + std::to_string(at_));
  }
  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  bool take(std::string_view token) {
    skip_space();
    if (text_.substr(at_, token.size()) != token) return false;
    at_ += token.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kDeepest) fail("fewer levels");
    Json json;
    skip_space();
    if (take("{")) {
      Json::Object object;
      if (!take("}")) {
        do {
          if (!take("\"")) fail("a key");
          std::string key = string();
          if (!take(":")) fail("':'");
          object.insert_or_assign(std::move(key), value(depth + 1));
        } while (take(","));
        if (!take("}")) fail("'}'");
      }
      json.value_ = std::move(object);
    } else if (take("[")) {
      Json::Array array;
      if (!take("]")) {
        do array.push_back(value(depth + 1));
        while (take(","));
        if (!take("]")) fail("']'");
      }
      json.value_ = std::move(array);
    } else if (take("\"")) {
      json.value_ = string();
    } else if (take("true")) {
      json.value_ = true;
    } else if (take("false")) {
      json.value_ = false;
    } else if (!take("null")) {
      double number = 0.0;
      const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), number);
      if (error != std::errc{}) fail("a value");
      at_ = static_cast<std::size_t>(end - text_.data());
      json.value_ = number;
    }
    return json;
  }

  // What follows the opening quote.
  std::string string() {
    std::string out;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] != '\\') {
        out += text_[at_++];
        continue;
      }
      const char escaped = ++at_ < text_.size() ? text_[at_++] : '\0';
      constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
      if (const auto i = kNames.find(escaped); i != std::string_view::npos) {
        out += kMeant[i];
      } else if (escaped == 'u') {
        unsigned code = 0;
        const char* begin = text_.data() + at_;
        if (at_ + 4 > text_.size() || std::from_chars(begin, begin + 4, code, 16).ptr != begin + 4)
          fail("4 hex digits");
        at_ += 4;
        append_utf8(code, out);
      } else {
        fail("an escape");
      }
    }
    if (at_ == text_.size()) fail("'\"'");
    ++at_;
    return out;
  }

  static void append_utf8(unsigned code, std::string& out) {
    const auto byte = [&](unsigned value) { out += static_cast<char>(value); };
    if (code < 0x80) return byte(code);
    if (code < 0x800) {
      byte(0xC0 | code >> 6);
    } else {
      byte(0xE0 | code >> 12);
      byte(0x80 | (code >> 6 & 0x3F));
    }
    byte(0x80 | (code & 0x3F));
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).document(); }

const Json& Json::operator[](std::string_view key) const {
  static const Json null;
  const auto found = object().find(key);
  return found == object().end() ? null : found->second;
}

template <class T>
const T& Json::get(const char* expected) const {
  if (!std::holds_alternative<T>(value_)) throw std::runtime_error("JSON: expected " + std::string(expected));
  return std::get<T>(value_);
}
template const bool& Json::get<bool>(const char*) const;
template const double& Json::get<double>(const char*) const;
template const std::string& Json::get<std::string>(const char*) const;
template const Json::Array& Json::get<Json::Array>(const char*) const;
template const Json::Object& Json::get<Json::Object>(const char*) const;

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

}  // namespace trainer
