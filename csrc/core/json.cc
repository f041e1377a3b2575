#include "swin/json.h"

#include <charconv>
#include <locale>
#include <sstream>
#include <unordered_set>
#include <utility>

#include "swin/error.h"

namespace swin {
namespace {

constexpr std::size_t kMaxQuoted = 80;  // bytes of a text that a message shows

const char* name_of_kind(Json::Kind kind) {
  constexpr const char* kNames[] = {"null", "a boolean", "a number", "a string", "an array", "an object"};
  return kNames[static_cast<int>(kind)];
}

bool is_digit(int c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& out, std::uint32_t code) {
  const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3f)); };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | (code >> 6));
    tail(0);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | (code >> 12));
    tail(6);
    tail(0);
  } else {
    out += static_cast<char>(0xf0 | (code >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

}  // namespace

class Json::Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json text() {
    Json json = value(0);
    skip_space();
    if (peek() != kEnd) fail("the end");
    return json;
  }

 private:
  static constexpr int kEnd = -1;

  int peek() const { return at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : kEnd; }

  void skip_space() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
  }

  [[noreturn]] void refuse(std::size_t at, const std::string& what) const {
    throw ValueError(detail::concat("JSON, byte ", at, ": ", what));
  }

  [[noreturn]] void fail(const std::string& needed) const {
    std::ostringstream found;
    if (peek() == kEnd) {
      found << "the end";
    } else if (peek() > ' ' && peek() < 0x7f) {
      found << "'" << text_[at_] << "'";
    } else {
      found << "byte 0x" << std::hex << peek();
    }
    refuse(at_, "found " + found.str() + "; " + needed + " is needed");
  }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  Json value(int depth) {
    skip_space();
    if (++values_ > kMaxValues) refuse(at_, detail::concat("more than ", kMaxValues, " values"));
    Json json;
    const int c = peek();
    if (c == '{' || c == '[') {
      if (depth == kMaxDepth) refuse(at_, detail::concat("more than ", kMaxDepth, " arrays and objects in each other"));
      c == '{' ? object(json, depth) : array(json, depth);
    } else if (c == '"') {
      json.kind_ = Kind::kString;
      json.string_ = string();
    } else if (c == '-' || is_digit(c)) {
      number(json);
    } else if (word("true") || word("false")) {
      json.kind_ = Kind::kBool;
      json.integer_ = c == 't';
    } else if (!word("null")) {
      fail("a value");
    }
    return json;
  }

  bool word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  void array(Json& json, int depth) {
    json.kind_ = Kind::kArray;
    ++at_;
    skip_space();
    if (take(']')) return;
    do {
      json.items_.push_back(value(depth + 1));
      skip_space();
    } while (take(','));
    if (!take(']')) fail("',' or ']'");
  }

  void object(Json& json, int depth) {
    json.kind_ = Kind::kObject;
    ++at_;
    skip_space();
    if (take('}')) return;
    std::unordered_set<std::string> keys;
    do {
      skip_space();
      const std::size_t begin = at_;
      if (peek() != '"') fail("a key in quotes");
      std::string key = string();
      if (!keys.insert(key).second) refuse(begin, "the key " + in_quotes(key) + " stands there a second time");
      skip_space();
      if (!take(':')) fail("':'");
      json.items_.push_back(value(depth + 1));
      json.items_.back().name_ = std::move(key);
      skip_space();
    } while (take(','));
    if (!take('}')) fail("',' or '}'");
  }

  void number(Json& json) {
    const std::size_t begin = at_;
    const auto digits = [&] {
      if (!is_digit(peek())) fail("a digit");
      while (is_digit(peek())) ++at_;
    };
    json.kind_ = Kind::kNumber;
    take('-');
    if (!take('0')) digits();  // nothing may follow a leading zero
    bool whole = true;
    if (take('.')) {
      whole = false;
      digits();
    }
    if (take('e') || take('E')) {
      whole = false;
      if (!take('+')) take('-');
      digits();
    }
    const std::string token(text_.substr(begin, at_ - begin));
    if (whole) {
      json.is_integer_ = std::from_chars(token.data(), token.data() + token.size(), json.integer_).ec == std::errc();
    }
    std::istringstream stream(token);
    stream.imbue(std::locale::classic());  // whatever the program's locale takes for a decimal point
    if (!(stream >> json.number_)) refuse(begin, "the number " + in_quotes(token) + " is beyond the range of float64");
  }

  std::string string() {
    std::string out;
    ++at_;
    while (!take('"')) {
      const int c = peek();
      if (c == kEnd) fail("'\"'");
      if (c < 0x20) fail("an escape such as \\u0000 for a control character");
      if (c == '\\') {
        escape(out);
      } else if (c < 0x80) {
        out += text_[at_++];
      } else {
        sequence(out, c);
      }
    }
    return out;
  }

  void escape(std::string& out) {
    const std::size_t begin = at_++;
    constexpr std::string_view kLetters = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    if (take('u')) {
      std::uint32_t code = hex4();
      if (code >= 0xd800 && code < 0xe000) {  // two of them stand for one character beyond the first 65536
        const bool paired = code < 0xdc00 && take('\\') && take('u');
        const std::uint32_t low = paired ? hex4() : 0;
        if (low < 0xdc00 || low > 0xdfff) {
          refuse(begin, "half of a surrogate pair; \\ud800\\udc00 to \\udbff\\udfff are pairs");
        }
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      }
      append_utf8(out, code);
    } else if (const std::size_t i = peek() == kEnd ? kLetters.npos : kLetters.find(text_[at_]); i != kLetters.npos) {
      out += kMeanings[i];
      ++at_;
    } else {
      fail("one of \"\\/bfnrtu behind a backslash");
    }
  }

  std::uint32_t hex4() {
    std::uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const int c = peek(), lower = c | 0x20;
      if (c == kEnd || (!is_digit(c) && (lower < 'a' || lower > 'f'))) fail("a hexadecimal digit");
      code = code * 16 + static_cast<std::uint32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
    }
    return code;
  }

  // One character of several bytes. The bounds of its second byte leave out surrogates, what lies beyond U+10FFFF, and
  // characters that have a shorter form.
  void sequence(std::string& out, int lead) {
    const int tail = lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    int low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    int high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (lead < 0xc2 || lead > 0xf4) fail("UTF-8");
    out += text_[at_++];
    for (int i = 0; i < tail; ++i, low = 0x80, high = 0xbf) {
      if (peek() < low || peek() > high) fail("UTF-8");
      out += text_[at_++];
    }
  }

  std::string_view text_;
  std::size_t at_ = 0, values_ = 0;
};

Json Json::parse(std::string_view text) { return Parser(text).text(); }

const Json& Json::need(bool condition, const char* needed) const {
  if (condition) return *this;
  const char* found = kind_ != Kind::kNumber ? name_of_kind(kind_)
                      : is_integer_          ? "an integer"
                                             : "a number that is no integer of 64 bits";
  throw ValueError(
      detail::concat(name_.empty() ? "the JSON value" : in_quotes(name_), " is ", found, "; ", needed, " is needed"));
}

bool Json::boolean() const { return need(kind_ == Kind::kBool, "true or false").integer_ != 0; }
double Json::number() const { return need(kind_ == Kind::kNumber, "a number").number_; }
std::int64_t Json::integer() const { return need(is_integer_, "an integer").integer_; }
const std::string& Json::string() const { return need(kind_ == Kind::kString, "a string").string_; }
const std::vector<Json>& Json::items() const { return need(kind_ == Kind::kArray, "an array").items_; }
const std::vector<Json>& Json::members() const { return need(kind_ == Kind::kObject, "an object").items_; }

std::vector<std::int64_t> Json::integers() const {
  std::vector<std::int64_t> all;
  for (const Json& item : need(kind_ == Kind::kArray, "an array of integers").items_) {
    if (!item.is_integer_) {
      throw ValueError(
          detail::concat(in_quotes(name_), " holds ", name_of_kind(item.kind_), "; an array of integers is needed"));
    }
    all.push_back(item.integer_);
  }
  return all;
}

std::vector<double> Json::numbers() const {
  std::vector<double> all;
  for (const Json& item : need(kind_ == Kind::kArray, "an array of numbers").items_) {
    if (item.kind_ != Kind::kNumber) {
      throw ValueError(
          detail::concat(in_quotes(name_), " holds ", name_of_kind(item.kind_), "; an array of numbers is needed"));
    }
    all.push_back(item.number_);
  }
  return all;
}

const Json* Json::find(std::string_view key) const {
  for (const Json& member : members()) {
    if (member.name_ == key) return &member;
  }
  return nullptr;
}

const Json& Json::at(std::string_view key) const {
  if (const Json* member = find(key)) return *member;
  throw ValueError(detail::concat(name_.empty() ? "the JSON value" : in_quotes(name_), " lacks ", in_quotes(key)));
}

std::string in_quotes(std::string_view text) {
  std::size_t shown = text.size();
  if (shown > kMaxQuoted) {
    shown = kMaxQuoted;
    while (shown > 0 && (text[shown] & 0xc0) == 0x80) --shown;  // not within a character
  }
  std::string out = "'";
  for (const char c : text.substr(0, shown)) out += static_cast<unsigned char>(c) < ' ' || c == 0x7f ? '?' : c;
  return out + (shown < text.size() ? "...'" : "'");
}

}  // namespace swin
