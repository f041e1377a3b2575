// Tests of the engine file's reader and of its JSON. The files are made here, byte by byte, so that they can be wrong
// in every way.
// Plain checks, no framework; every failure is printed and the program's status says whether there was one.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "engine_file.h"
#include "processors.h"
#include "swin/error.h"
#include "swin/geometry.h"
#include "swin/json.h"

namespace {

using swin::DType;
using swin::Json;
using swin::TensorView;
using swin::runtime::EngineFile;
using swin::runtime::FileError;

void json_has_every_kind_of_value() {
  const Json j = Json::parse(
      " {\"null\" : null,\t\"yes\":true,\r\n\"no\":false,\"int\":-17,\"real\":-0.5e+1,\"text\":\"a b\",\"zero\":0,"
      "\"list\":[1,2,3],\"mixed\":[1, 2.5],\"none\":[],\"inner\":{\"a\":{\"b\":[{}]}},\"\":1} ");
  EXPECT(j.kind() == Json::Kind::kObject && j.members().size() == 12);
  const char* names[] = {"null", "yes", "no", "int", "real", "text", "zero", "list", "mixed", "none", "inner", ""};
  for (std::size_t i = 0; i < j.members().size(); ++i) EXPECT(j.members()[i].name() == names[i]);
  EXPECT(j.at("null").kind() == Json::Kind::kNull);
  EXPECT(j.at("yes").boolean() && !j.at("no").boolean());
  EXPECT(j.at("int").integer() == -17 && j.at("int").number() == -17.0 && j.at("zero").integer() == 0);
  EXPECT(j.at("real").number() == -5.0);
  EXPECT(j.at("text").string() == "a b");
  EXPECT((j.at("list").integers() == std::vector<std::int64_t>{1, 2, 3}));
  EXPECT((j.at("mixed").numbers() == std::vector<double>{1, 2.5}));
  EXPECT(j.at("none").items().empty() && j.at("none").integers().empty());
  EXPECT(j.at("inner").at("a").at("b").items()[0].kind() == Json::Kind::kObject);
  EXPECT(j.find("absent") == nullptr && j.find("")->integer() == 1);
  for (const char* one : {"null", "true", "false", "7", "\"x\"", "[]", "{}"}) Json::parse(one);
}

void json_numbers_are_exact() {
  const auto number = [](const char* text) { return Json::parse(text); };
  EXPECT(number("9223372036854775807").integer() == INT64_MAX);
  EXPECT(number("-9223372036854775808").integer() == INT64_MIN);
  EXPECT(number("9007199254740993").integer() == 9007199254740993);  // which double cannot hold
  EXPECT(number("0.1").number() == 0.1 && number("1E-2").number() == 0.01 && number("-0").integer() == 0);
  EXPECT(number("1.7976931348623157e308").number() == 1.7976931348623157e308);
  EXPECT(std::signbit(number("-0.0").number()));
  const char* needed = "is a number that is no integer of 64 bits; an integer is needed";
  for (const char* text : {"9223372036854775808", "1.0", "1e2"}) {
    EXPECT(number(text).number() >= 1);
    expect_error<swin::ValueError>(needed, [&] { number(text).integer(); }, __LINE__);
  }
}

void json_strings_are_unescaped() {
  const auto string = [](const std::string& text) { return Json::parse("\"" + text + "\"").string(); };
  EXPECT(string(R"(\"\\\/\b\f\n\r\t)") == "\"\\/\b\f\n\r\t");
  EXPECT(string("\\u0041\\u00e9\\u20AC\\u20ac") == "A\xc3\xa9\xe2\x82\xac\xe2\x82\xac");
  EXPECT(string("\\ud83d\\ude00") == "\xf0\x9f\x98\x80");
  EXPECT(string("\\ud800\\udc00") == "\xf0\x90\x80\x80" && string("\\uDBFF\\uDFFF") == "\xf4\x8f\xbf\xbf");
  EXPECT(string("\\u0000") == std::string(1, '\0') &&
         string("\\u007f\\u0080\\u07ff\\u0800") == "\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80");
  for (const char* utf8 : {"\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80", "\xef\xbf\xbf",
                           "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf", "\x7f"}) {
    EXPECT(string(utf8) == utf8);
  }
}

void json_refuses_bad_text_and_says_where() {
  const std::pair<std::string, const char*> bad[] = {
      {"", "byte 0: found the end; a value is needed"},
      {"  ", "byte 2: found the end; a value is needed"},
      {"nul", "byte 0: found 'n'; a value is needed"},
      {"True", "byte 0: found 'T'; a value is needed"},
      {"NaN", "byte 0: found 'N'; a value is needed"},
      {"-Infinity", "byte 1: found 'I'; a digit is needed"},
      {"+1", "byte 0: found '+'; a value is needed"},
      {"01", "byte 1: found '1'; the end is needed"},
      {"-", "byte 1: found the end; a digit is needed"},
      {"1.", "byte 2: found the end; a digit is needed"},
      {".5", "byte 0: found '.'; a value is needed"},
      {"1e+", "byte 3: found the end; a digit is needed"},
      {"1e999", "byte 0: the number '1e999' is beyond the range of float64"},
      {"1 2", "byte 2: found '2'; the end is needed"},
      {"{}x", "byte 2: found 'x'; the end is needed"},
      {"[1", "byte 2: found the end; ',' or ']' is needed"},
      {"[1,]", "byte 3: found ']'; a value is needed"},
      {"[,1]", "byte 1: found ','; a value is needed"},
      {"[1 2]", "byte 3: found '2'; ',' or ']' is needed"},
      {"[1}", "byte 2: found '}'; ',' or ']' is needed"},
      {"{1:2}", "byte 1: found '1'; a key in quotes is needed"},
      {"{\"a\" 1}", "byte 5: found '1'; ':' is needed"},
      {"{\"a\":1,}", "byte 7: found '}'; a key in quotes is needed"},
      {"{\"a\":1", "byte 6: found the end; ',' or '}' is needed"},
      {"{\"a\":1]", "byte 6: found ']'; ',' or '}' is needed"},
      {"{\"a\":1,\"b\":2,\"\\u0061\":3}", "byte 13: the key 'a' stands there a second time"},
      {"\"ab", "byte 3: found the end; '\"' is needed"},
      {"\"a\nb\"", "byte 2: found byte 0xa; an escape"},
      {std::string("\"\0\"", 3), "byte 1: found byte 0x0; an escape"},
      {"\"\\x\"", "byte 2: found 'x'; one of"},
      {"\"\\", "byte 2: found the end; one of"},
      {"\"\\u12G4\"", "byte 5: found 'G'; a hexadecimal digit is needed"},
      {"\"\\u12", "byte 5: found the end; a hexadecimal digit is needed"},
      {"\"\\ud800\"", "byte 1: half of a surrogate pair"},
      {"\"\\ud800x\"", "byte 1: half of a surrogate pair"},
      {"\"\\ud800\\n\"", "byte 1: half of a surrogate pair"},
      {"\"\\ud800\\ud800\"", "byte 1: half of a surrogate pair"},
      {"\"\\ud800\\ue000\"", "byte 1: half of a surrogate pair"},
      {"\"x\\udc00\\udc00\"", "byte 2: half of a surrogate pair"},
      {"\"\x80\"", "byte 1: found byte 0x80; UTF-8 is needed"},
      {"\"\xc1\xbf\"", "byte 1: found byte 0xc1; UTF-8 is needed"},
      {"\"\xc3\"", "byte 2: found '\"'; UTF-8 is needed"},
      {"\"\xe0\x9f\xbf\"", "byte 2: found byte 0x9f; UTF-8 is needed"},
      {"\"\xed\xa0\x80\"", "byte 2: found byte 0xa0; UTF-8 is needed"},
      {"\"\xe2\x82\"", "byte 3: found '\"'; UTF-8 is needed"},
      {"\"\xf0\x8f\xbf\xbf\"", "byte 2: found byte 0x8f; UTF-8 is needed"},
      {"\"\xf4\x90\x80\x80\"", "byte 2: found byte 0x90; UTF-8 is needed"},
      {"\"\xf0\x9f\x98", "byte 4: found the end; UTF-8 is needed"},
      {"\"\xf5\x80\x80\x80\"", "byte 1: found byte 0xf5; UTF-8 is needed"},
      {"\xff", "byte 0: found byte 0xff; a value is needed"},
  };
  for (const auto& [text, message] : bad) {
    const std::string& given = text;
    expect_error<swin::ValueError>(std::string("JSON, ") + message, [&] { Json::parse(given); }, __LINE__);
  }
}

void json_is_bounded() {
  const std::string open(Json::kMaxDepth, '['), close(Json::kMaxDepth, ']');
  Json::parse(open + close);
  expect_error<swin::ValueError>("byte 64: more than 64 arrays", [&] { Json::parse(open + "[]" + close); }, __LINE__);
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  expect_error<swin::ValueError>("byte 320: more than 64 arrays", [&] { Json::parse(objects); }, __LINE__);
  std::string many = "[0";
  for (std::size_t i = 0; i + 2 < Json::kMaxValues; ++i) many += ",0";
  EXPECT(Json::parse(many + "]").items().size() == Json::kMaxValues - 1);
  expect_error<swin::ValueError>("more than 1048576 values", [&] { Json::parse(many + ",0]"); }, __LINE__);
}

void json_accessors_name_what_is_needed() {
  const Json j = Json::parse(R"({"n":null,"b":true,"i":1,"s":"x","a":[1,"x"],"f":[1,0.5],"o":{}})");
  const std::pair<std::function<void()>, const char*> wrong[] = {
      {[&] { j.at("i").boolean(); }, "'i' is an integer; true or false is needed"},
      {[&] { j.at("s").number(); }, "'s' is a string; a number is needed"},
      {[&] { j.at("b").integer(); }, "'b' is a boolean; an integer is needed"},
      {[&] { j.at("n").string(); }, "'n' is null; a string is needed"},
      {[&] { j.at("s").integers(); }, "'s' is a string; an array of integers is needed"},
      {[&] { j.at("a").integers(); }, "'a' holds a string; an array of integers is needed"},
      {[&] { j.at("f").integers(); }, "'f' holds a number; an array of integers is needed"},
      {[&] { j.at("a").numbers(); }, "'a' holds a string; an array of numbers is needed"},
      {[&] { j.at("o").numbers(); }, "'o' is an object; an array of numbers is needed"},
      {[&] { j.at("o").items(); }, "'o' is an object; an array is needed"},
      {[&] { j.at("a").members(); }, "'a' is an array; an object is needed"},
      {[&] { j.at("a").find("x"); }, "'a' is an array; an object is needed"},
      {[&] { j.at("x"); }, "the JSON value lacks 'x'"},
      {[&] { j.at("o").at("x"); }, "'o' lacks 'x'"},
      {[&] { j.integer(); }, "the JSON value is an object; an integer is needed"},
  };
  for (const auto& [access, message] : wrong) expect_error<swin::ValueError>(message, access, __LINE__);
}

void long_texts_are_shortened_in_messages() {
  EXPECT(swin::in_quotes("a\nb\x7f\xc3\xa9") == "'a?b?\xc3\xa9'");
  EXPECT(swin::in_quotes(std::string(80, 'a')) == "'" + std::string(80, 'a') + "'");
  EXPECT(swin::in_quotes(std::string(81, 'a')) == "'" + std::string(80, 'a') + "...'");
  EXPECT(swin::in_quotes(std::string(79, 'a') + "\xe2\x82\xac") == "'" + std::string(79, 'a') + "...'");
}

// A tensor of a file to be made. Where `begin` is not set, it follows the one before.
struct Tensor {
  std::string key, dtype, shape;
  std::string bytes;
  long begin = -1, end = -1;
};

std::string quote(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) out += (c == '"' || c == '\\') ? std::string("\\") + c : std::string(1, c);
  return out + "\"";
}

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

std::string with_length(const std::string& header, const std::string& data) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i) & 0xff);
  return file + header + data;
}

// What a test changes of a good file.
struct Maker {
  std::map<std::string, std::string> config = {{"name", "\"tiny \\u00e9\""},
                                               {"img_size", "[28, 56]"},
                                               {"patch_size", "2"},
                                               {"in_chans", "3"},
                                               {"num_classes", "10"},
                                               {"embed_dim", "32"},
                                               {"depths", "[2, 1]"},
                                               {"num_heads", "[1, 2]"},
                                               {"window_size", "[7, 14]"},
                                               {"mlp_ratio", "2.5"},
                                               {"qkv_bias", "false"},
                                               {"qk_scale", "0.25"},
                                               {"patch_norm", "false"},
                                               {"version", "1"},
                                               {"pretrained_window_size", "[]"}};
  std::map<std::string, std::string> metadata = {
      {"format", "swin-int8"},
      {"version", "1"},
      {"graph", "ft_int8"},
      {"int8_mode", "2"},
      {"hint", "again"},
      {"meta", R"({"input": {"mean": [0.5, 0, -1e-3], "std": [0.25, 1, 2], "crop_pct": 0.9}, "seed": 3})"}};
  // In a file's usual order: the larger elements first, so that they are aligned.
  std::vector<Tensor> tensors = {
      {"0001.amax", "F32", "[2]", bytes_of<float>({1.5f, -0.0f})},
      {"0003.deep", "F32", "[1,1,3,1,1]", bytes_of<float>({3.4e38f, 1e-45f, -100.0f})},
      {"0004.none", "F32", "[0]", ""},
      {"0000.layers.0.bias", "F16", "[2,2]", bytes_of<std::uint16_t>({0x3c00, 0x7bff, 0xfbff, 0x0001})},
      {"0005.scalar", "F16", "[]", bytes_of<std::uint16_t>({0x4000})},
      {"0002.weight", "I8", "[3]", bytes_of<std::int8_t>({-128, 0, 127})},
      {"0006.empty", "I8", "[4,0]", ""}};
  std::string left_out;  // a key of the metadata
  std::string extra;     // further members of the header
  std::string pad;       // spaces behind it; by default to a multiple of 8

  std::string header() const {
    std::string json;
    for (const auto& [field, value] : config) json += (json.empty() ? "{" : ", ") + quote(field) + ": " + value;
    std::map<std::string, std::string> all = metadata;
    all.emplace("config", json + "}");
    all.erase(left_out);
    std::string header;
    for (const auto& [key, value] : all) {
      header += (header.empty() ? "{\"__metadata__\":{" : ",") + quote(key) + ":" + quote(value);
    }
    header += "}";
    std::size_t at = 0;
    for (const Tensor& t : tensors) {
      const std::size_t begin = t.begin < 0 ? at : t.begin, end = t.end < 0 ? begin + t.bytes.size() : t.end;
      header += "," + quote(t.key) + ":{\"dtype\":" + quote(t.dtype) + ",\"shape\":" + t.shape + ",\"data_offsets\":[" +
                std::to_string(begin) + "," + std::to_string(end) + "]}";
      at += t.bytes.size();
    }
    header += extra + "}" + pad;
    while (pad.empty() && header.size() % 8 != 0) header += ' ';
    return header;
  }
  std::string data() const {
    std::string all;
    for (const Tensor& t : tensors) all += t.bytes;
    return all;
  }
  std::string file() const { return with_length(header(), data()); }
};

EngineFile parse(const std::string& file) {
  return swin::runtime::parse_engine_file("a.file", file.data(), file.size());
}

std::string content(const TensorView& t) {
  return t.numel() == 0 ? "" : std::string(t.as<const char>(), t.numel() * swin::size_of(t.dtype));
}

// `ef` is what a Maker as it stands describes.
void expect_good(const EngineFile& ef) {
  EXPECT(ef.name == "tiny \xc3\xa9" && ef.graph == "ft_int8");
  const swin::ModelConfig& c = ef.config;
  EXPECT(c.version == 1 && c.int8_mode == 2 && c.img_h == 28 && c.img_w == 56 && c.patch_size == 2);
  EXPECT(c.in_chans == 3 && c.embed_dim == 32 && c.num_classes == 10 && c.mlp_ratio == 2.5);
  EXPECT((c.depths == std::vector<std::int64_t>{2, 1}) && (c.num_heads == std::vector<std::int64_t>{1, 2}));
  EXPECT((c.window_size == std::vector<std::int64_t>{7, 14}) && !c.qkv_bias && !c.patch_norm && c.qk_scale == 0.25);
  EXPECT((ef.mean == std::vector<double>{0.5, 0, -1e-3}) && (ef.std == std::vector<double>{0.25, 1, 2}));
  std::vector<Tensor> wanted = Maker().tensors;
  std::sort(wanted.begin(), wanted.end(), [](const Tensor& a, const Tensor& b) { return a.key < b.key; });
  EXPECT(ef.tensors.size() == wanted.size() && ef.names.size() == wanted.size());
  const std::map<std::string, DType> dtypes = {{"I8", DType::kS8}, {"F16", DType::kF16}, {"F32", DType::kF32}};
  for (std::size_t i = 0; i < std::min(ef.tensors.size(), wanted.size()); ++i) {
    const TensorView& t = ef.tensors[i];
    EXPECT(ef.names[i] == wanted[i].key.substr(5));
    EXPECT(t.dtype == dtypes.at(wanted[i].dtype));
    std::string shape = "[";
    for (int d = 0; d < t.rank; ++d) shape += (d ? "," : "") + std::to_string(t.dim(d));
    EXPECT(shape + "]" == wanted[i].shape);
    EXPECT((t.data == nullptr) == wanted[i].bytes.empty());
    EXPECT(reinterpret_cast<std::uintptr_t>(t.data) % swin::size_of(t.dtype) == 0);
    EXPECT(content(t) == wanted[i].bytes);
  }
}

void a_good_file_is_read() {
  std::string file = Maker().file();
  EngineFile ef = parse(file);
  std::fill(file.begin(), file.end(), '\xff');  // nothing of it is used any more
  expect_good(ef);
  const EngineFile moved = std::move(ef);
  expect_good(moved);
  EngineFile assigned;
  {
    EngineFile other = moved;
    assigned = std::move(other);
  }
  expect_good(assigned);
}

// Headers of every length modulo 8, and bytes in front of the large elements: files that other writers may make.
void tensors_that_are_not_aligned_are_copied() {
  for (int spaces = 1; spaces <= 8; ++spaces) {
    Maker m;
    m.pad = std::string(spaces, ' ');
    expect_good(parse(m.file()));
    std::rotate(m.tensors.begin(), m.tensors.begin() + 5, m.tensors.end());  // 3 bytes of int8 first
    expect_good(parse(m.file()));
  }
  Maker m;
  m.tensors = {{"0000.byte", "I8", "[1]", "a"},
               {"0001.half", "F16", "[1]", bytes_of<std::uint16_t>({0x3c00})},
               {"0002.float", "F32", "[2]", bytes_of<float>({1.5f, -2.5f})}};
  const EngineFile odd = parse(m.file());
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT(reinterpret_cast<std::uintptr_t>(odd.tensors[i].data) % swin::size_of(odd.tensors[i].dtype) == 0);
    EXPECT(content(odd.tensors[i]) == m.tensors[i].bytes);
  }
  // Aligned ones lie where they were, in one piece with the file.
  const EngineFile ef = parse(Maker().file());
  EXPECT(ef.tensors[1].as<char>() + 8 == ef.tensors[3].as<char>());
  EXPECT(ef.tensors[1].as<char>() + 8 + 12 == ef.tensors[0].as<char>());
}

void metadata_may_stand_anywhere_in_the_header() {
  Maker m;
  m.tensors.clear();
  const char* tensor = R"({"0000.x":{"dtype":"I8","shape":[1],"data_offsets":[0,1],"note":0},)";
  const EngineFile ef = parse(with_length(tensor + m.header().substr(1), "x"));
  EXPECT(ef.graph == "ft_int8" && ef.names == std::vector<std::string>{"x"} && content(ef.tensors[0]) == "x");
}

void what_a_file_may_leave_out_has_defaults() {
  Maker m;
  for (const char* field : {"mlp_ratio", "qkv_bias", "qk_scale", "patch_norm", "version", "pretrained_window_size"}) {
    m.config.erase(field);
  }
  m.metadata["meta"] = "{}";
  m.metadata.erase("hint");
  m.metadata["int8_mode"] = "1";
  m.metadata["graph"] = "fused_int8";
  m.tensors.clear();
  EngineFile ef = parse(m.file());
  EXPECT(ef.config.mlp_ratio == 4.0 && ef.config.qkv_bias && ef.config.patch_norm && !ef.config.qk_scale);
  EXPECT(ef.config.version == 1 && ef.config.int8_mode == 1 && ef.graph == "fused_int8" && !ef.config.pad_first);
  EXPECT(ef.mean.empty() && ef.std.empty() && ef.tensors.empty() && ef.names.empty());
  m.config["qk_scale"] = "null";
  m.config["version"] = "2";
  m.config["pretrained_window_size"] = "[12, 0]";
  m.config["num_classes"] = "0";
  m.config["mlp_ratio"] = "3";
  m.config["pad_first"] = "true";
  m.metadata["graph"] = "geluless_int8";
  ef = parse(m.file());
  EXPECT(ef.config.version == 2 && !ef.config.qk_scale && ef.config.num_classes == 0 && ef.config.mlp_ratio == 3);
  EXPECT(ef.config.pad_first);
  EXPECT(ef.graph == "geluless_int8");
}

void expect_refused(const Maker& m, const std::string& message, int line) {
  const std::string file = m.file();
  expect_error<FileError>("a.file: " + message, [&] { parse(file); }, line);
}

void a_header_that_is_none_is_refused() {
  const auto refused = [](const std::string& file, const char* message, int line) {
    expect_error<FileError>(std::string("a.file: ") + message, [&] { parse(file); }, line);
  };
  const char* kinds = "; it is cut off or of another kind, make it again with `python pyharness/convert.py to-engine`";
  refused("", "has 0 bytes, too few for an engine file; it is cut off or of another kind, make it again", __LINE__);
  expect_error<FileError>("x: has 0 bytes", [] { swin::runtime::parse_engine_file("x", nullptr, 0); }, __LINE__);
  refused("1234567", "has 7 bytes, too few", __LINE__);
  refused("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 30000000\n", "begins as a Git LFS pointer", __LINE__);
  refused(std::string(8, '\0'), "the header is not readable: JSON, byte 0: found the end; a value is needed", __LINE__);
  refused(std::string(8, '\xff'),
          (std::string("not an engine file: its first 8 bytes announce a header of 18446744073709551615 bytes (at most "
                       "100000000 can be), and the file has 8 in all") +
           kinds)
              .c_str(),
          __LINE__);
  refused(std::string("\x03\0\0\0\0\0\0\0{}", 10), "not an engine file: its first 8 bytes announce a header of 3",
          __LINE__);
  std::string large(8 + 100'000'001, ' ');
  std::memcpy(large.data(), "\x01\xe1\xf5\x05\0\0\0\0", 8);
  refused(large, "not an engine file: its first 8 bytes announce a header of 100000001", __LINE__);
  refused(with_length("{\"a\":}", ""), "the header is not readable: JSON, byte 5: found '}'; a value is needed",
          __LINE__);
  refused(with_length("[]", ""), "the header is not readable: the JSON value is an array; an object is needed",
          __LINE__);
  refused(with_length("{\"__metadata__\":1}", ""), "the header is not readable: '__metadata__' is an integer",
          __LINE__);
  refused(with_length("{\"__metadata__\":{\"format\":1}}", ""), "the header is not readable: 'format' is an integer",
          __LINE__);
  refused(with_length("{}", ""),
          "a safetensors file, but no engine file (its format is missing, 'swin-int8' is needed)", __LINE__);
}

void metadata_that_does_not_fit_are_refused() {
  const auto refused = [](const char* key, const char* value, const std::string& message, int line) {
    Maker m;
    if (value == nullptr) {
      m.left_out = key;
    } else {
      m.metadata[key] = value;
    }
    expect_refused(m, message, line);
  };
  refused("format", "pt",
          "a safetensors file, but no engine file (its format is 'pt', 'swin-int8' is needed); make one", __LINE__);
  refused("version", "2", "its engine file version is '2', this program reads version 1; update the program", __LINE__);
  refused("version", nullptr, "its engine file version is missing", __LINE__);
  for (const char* key : {"config", "graph", "int8_mode", "meta"}) {
    refused(key, nullptr, std::string("the header lacks '") + key + "'; make it again", __LINE__);
  }
  refused("graph", "other", "graph 'other' is unknown to this program, which has ft_int8, geluless_int8, fused_int8",
          __LINE__);
  for (const char* mode : {"0", "3", "", "1 ", "one"}) {
    refused("int8_mode", mode,
            std::string("int8_mode '") + mode + "' is unknown to ft_int8 of Swin-V1, which has 1 and 2", __LINE__);
  }
  refused("graph", "fused_int8", "int8_mode '2' is unknown to fused_int8 of Swin-V1, which has 1 only", __LINE__);
  Maker m;
  m.config["version"] = "2";
  m.config.erase("qk_scale");
  expect_refused(m, "int8_mode '2' is unknown to ft_int8 of Swin-V2, which has 1 only", __LINE__);
  refused("config", "{", "the model description is not readable: JSON, byte 1: found the end", __LINE__);
  refused("config", "[]", "the model description is not readable: the JSON value is an array", __LINE__);
  refused("meta", "{", "'meta' in the header is not readable: JSON, byte 1", __LINE__);
  refused("meta", "[]", "'meta' in the header is not readable: the JSON value is an array; an object", __LINE__);
}

void a_configuration_is_checked_number_by_number() {
  const auto refused = [](const char* field, const char* value, const std::string& message, int line) {
    Maker m;
    m.config[field] = value;
    if (*value == '\0') m.config.erase(field);
    expect_refused(m, "the model description is not readable: " + message, line);
  };
  for (const char* field : {"name", "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depths",
                            "num_heads", "window_size"}) {
    refused(field, "", std::string("the JSON value lacks '") + field + "'; make it again", __LINE__);
    refused(field, "null", std::string("'") + field + "' is null", __LINE__);
    refused(field, "true", std::string("'") + field + "' is a boolean", __LINE__);
  }
  refused("drop_path", "0.1", "'drop_path' is unknown to this program", __LINE__);
  refused("name", "3", "'name' is an integer; a string is needed", __LINE__);
  for (const char* field : {"patch_size", "in_chans", "embed_dim"}) {
    for (const char* value : {"0", "-1", "1048577", "9223372036854775807"}) {
      refused(field, value, std::string("'") + field + "' is " + value + "; 1 to ", __LINE__);
    }
    refused(field, "2.5", std::string("'") + field + "' is a number that is no integer", __LINE__);
  }
  refused("num_classes", "-1", "'num_classes' is -1; 0 to 1048576 is needed", __LINE__);
  refused("num_classes", "1048577", "'num_classes' is 1048577", __LINE__);
  refused("img_size", "[28]", "'img_size' has 1 entries; height and width are needed", __LINE__);
  refused("img_size", "[28,28,3]", "'img_size' has 3 entries", __LINE__);
  refused("img_size", "28", "'img_size' is an integer; an array of integers is needed", __LINE__);
  refused("img_size", "[28, 65537]", "'img_size' holds 65537; 1 to 65536 is needed", __LINE__);
  refused("depths", "[]", "'depths' is empty; at least one stage is needed", __LINE__);
  refused("depths", "\"2, 1\"", "'depths' is a string; an array of integers is needed", __LINE__);
  refused("depths", "[2, 0]", "'depths' holds 0; 1 to 1048576 is needed", __LINE__);
  refused("depths", "[2, 1, 1]", "'num_heads' has 2 entries, 'depths' has 3; one per stage is needed", __LINE__);
  refused("num_heads", "[1, 1048577]", "'num_heads' holds 1048577", __LINE__);
  refused("window_size", "[7, 65537]", "'window_size' holds 65537", __LINE__);
  refused("window_size", "[7,7,7]", "'window_size' has 3 entries, 'depths' has 2; one per stage", __LINE__);
  refused("window_size", "[7]", "'window_size' has 1 entries", __LINE__);
  refused("window_size", "[7, 7.0]", "'window_size' holds a number; an array of integers is needed", __LINE__);
  std::string long_list = "[1";
  for (int i = 1; i < 33; ++i) long_list += ",1";
  refused("depths", (long_list + "]").c_str(), "'depths' has 33 entries; at most 32 can be", __LINE__);
  for (const char* value : {"0", "-1", "1025", "1e300"}) {
    refused("mlp_ratio", value,
            "'mlp_ratio' is " + std::string(value == std::string("1e300") ? "1e+300" : value) +
                "; a positive number of at most 1024 is needed",
            __LINE__);
  }
  refused("mlp_ratio", "null", "'mlp_ratio' is null; a number is needed", __LINE__);
  refused("qk_scale", "0", "'qk_scale' is 0; a positive number", __LINE__);
  refused("qk_scale", "1e39", "'qk_scale' is 1e+39; a positive number", __LINE__);
  refused("qk_scale", "false", "'qk_scale' is a boolean; a number is needed", __LINE__);
  refused("qkv_bias", "1", "'qkv_bias' is an integer; true or false is needed", __LINE__);
  refused("pad_first", "1", "'pad_first' is an integer; true or false is needed", __LINE__);
  refused("patch_norm", "null", "'patch_norm' is null; true or false is needed", __LINE__);
  refused("version", "3", "'version' is 3; 1 to 2 is needed", __LINE__);
  refused("version", "0", "'version' is 0", __LINE__);
  refused("pretrained_window_size", "[-1]", "'pretrained_window_size' holds -1; 0 to 65536 is needed", __LINE__);
  refused("pretrained_window_size", "7", "'pretrained_window_size' is an integer", __LINE__);
}

void a_normalization_is_one_number_per_channel() {
  const auto refused = [](const char* input, const std::string& message, int line) {
    Maker m;
    m.metadata["meta"] = std::string("{\"input\": ") + input + "}";
    expect_refused(m, "'meta' in the header is not readable: " + message, line);
  };
  refused("null", "'input' is null; an object is needed", __LINE__);
  refused("{}", "'input' lacks 'mean'", __LINE__);
  refused(R"({"mean": [0, 0, 0]})", "'input' lacks 'std'", __LINE__);
  refused(R"({"std": [1, 1, 1]})", "'input' lacks 'mean'", __LINE__);
  refused(R"({"mean": 0, "std": [1, 1, 1]})", "'mean' is an integer; an array of numbers is needed", __LINE__);
  refused(R"({"mean": [0, 0], "std": [1, 1, 1]})", "'mean' has 2 numbers; one for each of the 3 input channels",
          __LINE__);
  refused(R"({"mean": [0, 0, 0], "std": [1, 1, 1, 1]})", "'std' has 4 numbers; one for each of the 3 input", __LINE__);
  refused(R"({"mean": [0, 0, null], "std": [1, 1, 1]})", "'mean' holds null; an array of numbers is needed", __LINE__);
  refused(R"({"mean": [0, 0, -1e39], "std": [1, 1, 1]})", "'mean' holds -1e+39; numbers that are finite", __LINE__);
  refused(R"({"mean": [0, 0, 0], "std": [1, 1e39, 1]})", "'std' holds 1e+39; numbers that are finite", __LINE__);
  for (const char* value : {"0", "-1", "1e-60"}) {
    const std::string input = std::string(R"({"mean": [0, 0, 0], "std": [1, )") + value + ", 1]}";
    refused(input.c_str(), std::string("'std' holds ") + value + "; numbers above zero in float32", __LINE__);
  }
  refused(R"({"mean": [NaN, 0, 0], "std": [1, 1, 1]})", "JSON, byte 20: found 'N'; a value is needed", __LINE__);
}

void a_tensor_that_does_not_fit_is_refused_by_its_name() {
  const auto refused = [](const std::function<void(Tensor&)>& change, const std::string& message, int line) {
    Maker m;
    change(m.tensors[5]);  // 0002.weight, three int8
    expect_refused(m, "the weight list is not readable: " + message, line);
  };
  for (const char* dtype : {"BF16", "F64", "I32", "U8", "BOOL", "", "i8"}) {
    refused([&](Tensor& t) { t.dtype = dtype; },
            std::string("tensor '0002.weight' has the dtype '") + dtype + "'; I8, F16 or F32 is needed; make it again",
            __LINE__);
  }
  for (const char* key : {"weight", "002.weight", "00002.weight", "-002.weight", "0002weight", "0002.", "", "000x.w"}) {
    refused([&](Tensor& t) { t.key = key; },
            std::string("tensor '") + key + "' has no position in front of its name; a name such as", __LINE__);
  }
  refused([](Tensor& t) { t.shape = "[3,1,1,1,1,1]"; }, "tensor '0002.weight' has 6 dimensions; at most 5 can be",
          __LINE__);
  refused([](Tensor& t) { t.shape = "[-3]"; }, "tensor '0002.weight' has the dimension -3", __LINE__);
  refused([](Tensor& t) { t.shape = "[-1,-3]"; }, "tensor '0002.weight' has the dimension -1", __LINE__);
  refused([](Tensor& t) { t.shape = "3"; }, "'shape' is an integer; an array of integers is needed", __LINE__);
  refused([](Tensor& t) { t.shape = "[3.0]"; }, "'shape' holds a number", __LINE__);
  refused([](Tensor& t) { t.shape = "[4]"; }, "tensor '0002.weight' has 3 bytes; its shape and dtype need 4", __LINE__);
  refused([](Tensor& t) { t.shape = "[2]"; }, "tensor '0002.weight' has 3 bytes; its shape and dtype need 2", __LINE__);
  refused([](Tensor& t) { t.shape = "[0]"; }, "tensor '0002.weight' has 3 bytes; its shape and dtype need 0", __LINE__);
  refused([](Tensor& t) { t.dtype = "F16"; }, "tensor '0002.weight' has 3 bytes; its shape and dtype need 6", __LINE__);
  // Products that come round to 3, or to 0, in 64 bits.
  refused([](Tensor& t) { t.shape = "[6148914691236517206,3,3]"; }, "tensor '0002.weight' has the dimension 61489",
          __LINE__);
  refused([](Tensor& t) { t.shape = "[4294967296,4294967296]"; }, "tensor '0002.weight' has the dimension 42949",
          __LINE__);
  refused([](Tensor& t) { t.shape = "[4294967296,0,4294967296]"; }, "tensor '0002.weight' has the dimension 4294",
          __LINE__);
  refused([](Tensor& t) { t.shape = "[281474976710656]"; }, "tensor '0002.weight' has 3 bytes; its shape", __LINE__);
  refused([](Tensor& t) { t.shape = "[281474976710657]"; }, "tensor '0002.weight' has the dimension 2814", __LINE__);
  refused([](Tensor& t) { t.begin = -1, t.end = 0; }, "tensor '0002.weight' has data_offsets that are no begin",
          __LINE__);
  refused([](Tensor& t) { t.begin = 0; }, "tensor '0001.amax' begins at byte 0 of the data, the one before ends at 3",
          __LINE__);
  refused([](Tensor& t) { t.begin = 29, t.end = 32; }, "tensor '0002.weight' begins at byte 29 of the data", __LINE__);
  refused([](Tensor& t) { t.begin = 31; }, "tensor '0002.weight' ends at byte 34 of the data, the file has 33 bytes of",
          __LINE__);
  refused([](Tensor& t) { t.end = 4000; }, "tensor '0002.weight' ends at byte 4000 of the data, the file has 33",
          __LINE__);
  refused([](Tensor& t) { t.begin = 40, t.end = 43; }, "tensor '0002.weight' ends at byte 43", __LINE__);
}

void entries_that_lack_something_are_refused() {
  const auto refused = [](const char* extra, const std::string& message, int line) {
    Maker m;
    m.extra = std::string(",\"0007.x\":") + extra;
    expect_refused(m, message, line);
  };
  refused("1", "the weight list is not readable: '0007.x' is an integer; an object is needed", __LINE__);
  refused(R"({"shape":[0],"data_offsets":[33,33]})", "the weight list is not readable: '0007.x' lacks 'dtype'",
          __LINE__);
  refused(R"({"dtype":"I8","data_offsets":[33,33]})", "the weight list is not readable: '0007.x' lacks 'shape'",
          __LINE__);
  refused(R"({"dtype":"I8","shape":[0]})", "the weight list is not readable: '0007.x' lacks 'data_offsets'", __LINE__);
  for (const char* offsets : {"[]", "[33]", "[33,33,33]", "[33,30]", "[-1,-1]", "[-1,0]"}) {
    refused((std::string(R"({"dtype":"I8","shape":[0],"data_offsets":)") + offsets + "}").c_str(),
            "the weight list is not readable: tensor '0007.x' has data_offsets that are no begin and end", __LINE__);
  }
  refused(R"({"dtype":"I8","shape":[0],"data_offsets":["0",0]})",
          "the weight list is not readable: 'data_offsets' holds a string", __LINE__);
  refused(R"({},"0007.x":{})", "the header is not readable: JSON, byte ", __LINE__);
}

void every_position_has_one_tensor() {
  Maker m;
  m.tensors[5].key = "0001.weight";
  const std::string message = "the weight list is not readable: two tensors have the position 1: '0001.";
  expect_refused(m, message, __LINE__);
  m.tensors[5].key = "0009.weight";
  expect_refused(m, "the weight list is not readable: the tensor of position 2 is missing; the next is '0003.deep'",
                 __LINE__);
  m = Maker();
  m.tensors[3].key = "0007.bias";
  expect_refused(m, "the weight list is not readable: the tensor of position 0 is missing; the next is '0001.amax'",
                 __LINE__);
  m.tensors.clear();
  m.tensors.push_back({"9999.x", "I8", "[0]", ""});
  expect_refused(m, "the weight list is not readable: the tensor of position 0 is missing", __LINE__);
}

void all_data_belong_to_a_tensor() {
  const Maker m;
  expect_error<FileError>(
      "a.file: the weight list is not readable: the tensors have 33 bytes, the data behind the header 34",
      [&] { parse(m.file() + "x"); }, __LINE__);
  Maker gap;
  gap.tensors[5].begin = 31;
  gap.tensors[5].end = 34;
  gap.tensors[6].begin = gap.tensors[6].end = 34;
  expect_error<FileError>(
      "tensor '0002.weight' begins at byte 31 of the data, the one before ends at 30", [&] { parse(gap.file() + "x"); },
      __LINE__);
  Maker none;
  none.tensors.clear();
  expect_error<FileError>(
      "the tensors have 0 bytes, the data behind the header 1", [&] { parse(none.file() + "x"); }, __LINE__);
}

void numbers_that_are_not_finite_are_refused() {
  const auto refused = [](std::size_t tensor, const std::string& bytes, const char* key) {
    for (int spaces : {0, 1, 2}) {  // aligned, and copied
      Maker m;
      m.pad = std::string(spaces, ' ');
      m.tensors[tensor].bytes.replace(m.tensors[tensor].bytes.size() - bytes.size(), bytes.size(), bytes);
      expect_refused(m, std::string("tensor '") + key + "' holds NaN or infinity; convert the checkpoint again",
                     __LINE__);
    }
  };
  for (const float value : {INFINITY, -INFINITY, NAN, -NAN}) refused(1, bytes_of<float>({value}), "0003.deep");
  for (const std::uint16_t value : {0x7c00, 0xfc00, 0x7c01, 0xfe00}) {
    refused(3, bytes_of<std::uint16_t>({value}), "0000.layers.0.bias");
  }
}

void a_file_cut_off_anywhere_is_refused() {
  const std::string file = Maker().file();
  int refused = 0;
  for (std::size_t bytes = 0; bytes < file.size(); ++bytes) {
    const std::vector<char> part(file.begin(), file.begin() + bytes);  // of its own, so that reading behind it shows
    try {
      swin::runtime::parse_engine_file("part", part.data(), part.size());
    } catch (const FileError& e) {
      refused += std::string(e.what()).find("cut off") != std::string::npos;
    }
  }
  EXPECT(refused == static_cast<int>(file.size()));
  EXPECT(file.size() > 1000);
}

// Whatever a damaged file says: it is refused, or what it gives can be used.
void damaged_bytes_do_no_harm() {
  const std::string good = Maker().file();
  const std::string alphabet = "0123456789-+.eE\"\\{}[]:, u";
  std::uint32_t random = 1;
  const auto next = [&](std::uint32_t below) {
    random = random * 1664525u + 1013904223u;
    return static_cast<std::uint32_t>((std::uint64_t{random} * below) >> 32);
  };
  int read = 0, refused = 0;
  long sum = 0;
  for (int turn = 0; turn < 6000; ++turn) {
    std::string file = good;
    // One byte of any value; half of the turns one or two characters that may leave the JSON whole.
    for (std::uint32_t change = 0; change <= (turn % 2 ? next(2) : 0); ++change) {
      file[next(file.size())] = turn % 2 ? alphabet[next(alphabet.size())] : static_cast<char>(next(256));
    }
    try {
      const EngineFile ef = parse(file);
      ++read;
      for (const TensorView& t : ef.tensors) {
        for (const char c : content(t)) sum += c;
      }
      for (const swin::StageGeometry& g : swin::stage_geometries(ef.config)) sum += g.hidden;
    } catch (const swin::Error&) {
      ++refused;
    }
  }
  EXPECT(read > 300 && refused > 300 && sum != 0);
}

void files_are_read_from_disk() {
  namespace fs = std::filesystem;
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  const fs::path folder = fs::temp_directory_path() / ("test_engine_file_" + std::to_string(now));
  fs::create_directories(folder);
  const std::string path = (folder / "\xc3\xa9.engine.safetensors").string();
  const auto write = [&](const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; };
  const auto refused = [&](const std::string& name, const std::string& message, int line) {
    expect_error<FileError>(name + ": " + message, [&] { swin::runtime::read_engine_file(name); }, line);
  };
  refused(path, "no such file; give the path of an engine file, which `python pyharness/convert.py to-engine` makes",
          __LINE__);
  refused("", "no such file", __LINE__);
  refused(folder.string(), "is a directory; give the path of an engine file", __LINE__);
  if (fs::exists("/dev/null")) refused("/dev/null", "is no regular file", __LINE__);
  write("");
  refused(path, "has 0 bytes, too few for an engine file", __LINE__);
  write("PK\x03\x04 a zip archive");
  refused(path, "not an engine file: its first 8 bytes announce a header of", __LINE__);
  const std::string good = Maker().file();
  write(good.substr(0, good.size() - 1));
  refused(path, "the weight list is not readable: tensor '0002.weight' ends at byte 33 of the data, the file has 32",
          __LINE__);
  refused((folder / "none" / "file").string(), "no such file", __LINE__);
  refused(path + "/file", "", __LINE__);  // a file where a folder is needed
  // A large file of another kind is not read, nor is there memory for it.
  write("\xff\xff\xff\xff\xff\xff\xff\x7f");
  std::error_code unsupported;
  fs::resize_file(path, std::uintmax_t{1} << 40, unsupported);  // without blocks, where the file system has that
  if (!unsupported) refused(path, "not an engine file: its first 8 bytes announce", __LINE__);
  write(good);
  EngineFile ef = swin::runtime::read_engine_file(path);
  fs::remove_all(folder);
  expect_good(ef);
  EXPECT(reinterpret_cast<std::uintptr_t>(ef.tensors[1].data) % 8 == 0);
}

// What a container's limits leave of a machine's processors.
void limits_of_control_groups() {
  char place[] = "/tmp/swin_groups_XXXXXX";
  const std::filesystem::path root = mkdtemp(place);
  const auto write = [&](const std::string& name, const std::string& text) {
    const std::filesystem::path path = root / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
  };
  const auto found = [&] { return swin::runtime::processors_of_groups(root.string()); };
  EXPECT(found() == 0);
  write("proc/self/cgroup", "0::/a/b\n");
  EXPECT(found() == 0);
  write("sys/fs/cgroup/cpu.max", "max 100000\n");
  EXPECT(found() == 0);
  write("sys/fs/cgroup/a/cpu.max", "350000 100000\n");
  EXPECT(found() == 4);
  write("sys/fs/cgroup/a/b/cpu.max", "800000 100000\n");
  EXPECT(found() == 4);
  write("sys/fs/cgroup/a/b/cpu.max", "20000 100000\n");
  EXPECT(found() == 1);
  // Version 1; within a container the path may be the host's.
  write("proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/docker/c0ffee\n");
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  EXPECT(found() == 0);
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "200000\n");
  EXPECT(found() == 2);
  write("proc/self/cgroup", "nothing of the kind\n\n");
  EXPECT(found() == 0);
  std::filesystem::remove_all(root);
  EXPECT(swin::runtime::processors() >= 1);
}

}  // namespace

int main() {
  limits_of_control_groups();
  json_has_every_kind_of_value();
  json_numbers_are_exact();
  json_strings_are_unescaped();
  json_refuses_bad_text_and_says_where();
  json_is_bounded();
  json_accessors_name_what_is_needed();
  long_texts_are_shortened_in_messages();
  a_good_file_is_read();
  tensors_that_are_not_aligned_are_copied();
  metadata_may_stand_anywhere_in_the_header();
  what_a_file_may_leave_out_has_defaults();
  a_header_that_is_none_is_refused();
  metadata_that_does_not_fit_are_refused();
  a_configuration_is_checked_number_by_number();
  a_normalization_is_one_number_per_channel();
  a_tensor_that_does_not_fit_is_refused_by_its_name();
  entries_that_lack_something_are_refused();
  every_position_has_one_tensor();
  all_data_belong_to_a_tensor();
  numbers_that_are_not_finite_are_refused();
  a_file_cut_off_anywhere_is_refused();
  damaged_bytes_do_no_harm();
  files_are_read_from_disk();
  std::printf(g_failures ? "%d failed\n" : "all passed\n", g_failures);
  return g_failures ? 1 : 0;
}
