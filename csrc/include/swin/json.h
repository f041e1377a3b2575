// A strict reader of JSON (RFC 8259): the header of an engine file, the tuner's choices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace swin {

class Json {
 public:
  enum class Kind : std::uint8_t { kNull, kBool, kNumber, kString, kArray, kObject };

  // Bounds of what a text may ask for: each value takes a hundred bytes of memory, each level of nesting some stack.
  static constexpr int kMaxDepth = 64;
  static constexpr std::size_t kMaxValues = std::size_t{1} << 20;

  // ValueError naming the byte (from 0) for text that is not one value in UTF-8, an object that has a key twice, half
  // of a surrogate pair, a number beyond the range of double, or more than the bounds above.
  static Json parse(std::string_view text);

  Kind kind() const { return kind_; }
  const std::string& name() const { return name_; }  // its key in the object that it belongs to

  // What it holds; ValueError naming it, what it is and what is needed where it is of another kind.
  bool boolean() const;
  double number() const;
  std::int64_t integer() const;  // a number written without fraction and exponent
  const std::string& string() const;
  std::vector<std::int64_t> integers() const;
  std::vector<double> numbers() const;
  const std::vector<Json>& items() const;        // of an array
  const std::vector<Json>& members() const;      // of an object, in the text's order
  const Json* find(std::string_view key) const;  // of an object; nullptr where there is none
  const Json& at(std::string_view key) const;    // the same; ValueError where there is none

 private:
  class Parser;

  const Json& need(bool condition, const char* needed) const;

  Kind kind_ = Kind::kNull;
  bool is_integer_ = false;   // of a number: `integer_` has it exactly
  std::int64_t integer_ = 0;  // of a bool: 0 or 1
  double number_ = 0;
  std::string name_, string_;
  std::vector<Json> items_;  // of an array or an object
};

// 'text' for a message: shortened where it is long, without control characters.
std::string in_quotes(std::string_view text);

}  // namespace swin
