#include "engine_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <new>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>

#include "swin/geometry.h"
#include "swin/json.h"

namespace swin::runtime {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are used as they lie in the file");

constexpr std::size_t kLengthBytes = 8;            // the file begins with the header's length
constexpr std::uint64_t kMaxHeader = 100'000'000;  // safetensors' own bound
constexpr std::size_t kAlignment = 64;
constexpr std::int64_t kMaxElements = std::int64_t{1} << 48;
constexpr const char* kMagic = "swin-int8";
constexpr const char* kVersion = "1";
constexpr const char* kAgain = "make it again with `python pyharness/convert.py to-engine`";

// Far beyond every Swin, and small enough that no product of a few of them overflows.
constexpr std::int64_t kMaxCount = std::int64_t{1} << 20, kMaxSide = kMaxImageSide;
constexpr std::size_t kMaxStages = 32;
constexpr double kMaxMlpRatio = 1024, kMaxQkScale = 1 << 20;

template <class... Parts>
[[noreturn]] void fail(const std::string& origin, const Parts&... parts) {
  throw FileError(detail::concat(origin, ": ", parts...));
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw ValueError(detail::concat(parts...));
}

// f(), whose ValueError becomes a FileError saying that `part` of the file is not readable.
template <class F>
auto reading(const std::string& origin, const char* part, F&& f) {
  try {
    return f();
  } catch (const ValueError& e) {
    fail(origin, part, " is not readable: ", e.what(), "; ", kAgain);
  }
}

struct Release {
  void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
};
using Bytes = std::unique_ptr<std::byte[], Release>;

Bytes allocate(std::size_t bytes) {
  void* memory = ::operator new(std::max<std::size_t>(bytes, 1), std::align_val_t{kAlignment});
  return Bytes(static_cast<std::byte*>(memory));
}

struct Memory {
  Bytes file;
  Bytes copies;  // of tensors that are not aligned in the file
};

// Bytes of the JSON behind the length that a file of `size` bytes begins with; `begin` has the first kLengthBytes.
std::size_t header_bytes(const std::string& origin, const std::byte* begin, std::uint64_t size) {
  if (size < kLengthBytes) {
    fail(origin, "has ", size, " bytes, too few for an engine file; it is cut off or of another kind, ", kAgain);
  }
  if (std::memcmp(begin, "version ", kLengthBytes) == 0) {  // 7 * 10^18 as a length
    fail(origin, "begins as a Git LFS pointer does, which is not the file itself; fetch that with `git lfs pull`");
  }
  std::uint64_t length = 0;
  std::memcpy(&length, begin, kLengthBytes);
  if (length > size - kLengthBytes || length > kMaxHeader) {
    fail(origin, "not an engine file: its first 8 bytes announce a header of ", length, " bytes (at most ", kMaxHeader,
         " can be), and the file has ", size, " in all; it is cut off or of another kind, ", kAgain);
  }
  return static_cast<std::size_t>(length);
}

std::int64_t bounded(const Json& json, std::int64_t value, std::int64_t least, std::int64_t most) {
  require(value >= least && value <= most, in_quotes(json.name()),
          json.kind() == Json::Kind::kArray ? " holds " : " is ", value, "; ", least, " to ", most, " is needed");
  return value;
}

std::int64_t bounded(const Json& json, std::int64_t least, std::int64_t most) {
  return bounded(json, json.integer(), least, most);
}

std::vector<std::int64_t> bounded_list(const Json& json, std::int64_t least, std::int64_t most) {
  std::vector<std::int64_t> values = json.integers();
  require(values.size() <= kMaxStages, in_quotes(json.name()), " has ", values.size(), " entries; at most ", kMaxStages,
          " can be");
  for (const std::int64_t value : values) bounded(json, value, least, most);
  return values;
}

double positive(const Json& json, double most) {
  const double value = json.number();
  require(value > 0 && value <= most, in_quotes(json.name()), " is ", value, "; a positive number of at most ", most,
          " is needed");
  return value;
}

// Fields and defaults are those of SwinConfig in pyharness/config.py.
ModelConfig read_config(const Json& json, std::string& name) {
  constexpr const char* kFields[] = {"name",      "img_size", "patch_size", "in_chans",    "num_classes",
                                     "embed_dim", "depths",   "num_heads",  "window_size", "mlp_ratio",
                                     "qkv_bias",  "qk_scale", "patch_norm", "version",     "pretrained_window_size",
                                     "pad_first"};
  for (const Json& member : json.members()) {
    const auto known = [&](const char* field) { return member.name() == field; };
    require(std::any_of(std::begin(kFields), std::end(kFields), known), in_quotes(member.name()),
            " is unknown to this program, which may be too old for the file");
  }
  ModelConfig c;
  name = json.at("name").string();
  const Json& size = json.at("img_size");
  const std::vector<std::int64_t> sides = bounded_list(size, 1, kMaxSide);
  require(sides.size() == 2, "'img_size' has ", sides.size(), " entries; height and width are needed");
  c.img_h = sides[0];
  c.img_w = sides[1];
  c.patch_size = bounded(json.at("patch_size"), 1, kMaxSide);
  c.in_chans = bounded(json.at("in_chans"), 1, kMaxCount);
  c.num_classes = bounded(json.at("num_classes"), 0, kMaxCount);
  c.embed_dim = bounded(json.at("embed_dim"), 1, kMaxCount);
  c.depths = bounded_list(json.at("depths"), 1, kMaxCount);
  require(!c.depths.empty(), "'depths' is empty; at least one stage is needed");
  for (const auto& [field, values, most] :
       {std::tuple("num_heads", &c.num_heads, kMaxCount), std::tuple("window_size", &c.window_size, kMaxSide)}) {
    *values = bounded_list(json.at(field), 1, most);
    require(values->size() == c.depths.size(), in_quotes(field), " has ", values->size(), " entries, 'depths' has ",
            c.depths.size(), "; one per stage is needed");
  }
  if (const Json* ratio = json.find("mlp_ratio")) c.mlp_ratio = positive(*ratio, kMaxMlpRatio);
  if (const Json* bias = json.find("qkv_bias")) c.qkv_bias = bias->boolean();
  if (const Json* norm = json.find("patch_norm")) c.patch_norm = norm->boolean();
  if (const Json* pad = json.find("pad_first")) c.pad_first = pad->boolean();
  if (const Json* scale = json.find("qk_scale"); scale != nullptr && scale->kind() != Json::Kind::kNull) {
    c.qk_scale = positive(*scale, kMaxQkScale);
  }
  if (const Json* version = json.find("version")) c.version = static_cast<int>(bounded(*version, 1, 2));
  // Its position bias is in the file as this model's window needs it.
  if (const Json* trained = json.find("pretrained_window_size")) bounded_list(*trained, 0, kMaxSide);
  return c;
}

std::vector<double> read_channels(const Json& json, std::int64_t channels) {
  std::vector<double> values = json.numbers();
  require(static_cast<std::int64_t>(values.size()) == channels, in_quotes(json.name()), " has ", values.size(),
          " numbers; one for each of the ", channels, " input channels is needed");
  for (const double value : values) {
    require(std::abs(value) <= std::numeric_limits<float>::max(), in_quotes(json.name()), " holds ", value,
            "; numbers that are finite in float32 are needed");
  }
  return values;
}

// No file is refused for it: models run on images that were prepared elsewhere.
void read_preparation(const Json& input, Preparation& how) {
  const auto said = [&](const char* key) {
    const Json* value = input.find(key);
    return value == nullptr || value->kind() == Json::Kind::kNull ? nullptr : value;
  };
  try {
    if (const Json* name = said("interpolation")) how.interpolation = name->string();
    if (const Json* mode = said("crop_mode")) how.crop_mode = mode->string();
    if (const Json* share = said("crop_pct")) {
      require(share->number() > 0, "'crop_pct' is ", share->number(), "; a number above zero is needed");
      how.crop_pct = share->number();
    }
  } catch (const ValueError& e) {
    how.wrong = e.what();
  }
}

void read_normalization(const Json& meta, EngineFile& ef) {
  const Json* input = meta.find("input");
  if (input == nullptr) return;
  ef.mean = read_channels(input->at("mean"), ef.config.in_chans);
  ef.std = read_channels(input->at("std"), ef.config.in_chans);
  for (const double value : ef.std) {
    require(static_cast<float>(value) > 0, "'std' holds ", value, "; numbers above zero in float32 are needed");
  }
  read_preparation(*input, ef.preparation);
}

void read_class_names(const Json& meta, EngineFile& ef) {
  const Json* classes = meta.find("classes");
  if (classes == nullptr) return;
  for (const Json& name : classes->items()) ef.classes.push_back(name.string());
  require(static_cast<std::int64_t>(ef.classes.size()) == ef.config.num_classes, "'classes' has ", ef.classes.size(),
          " names; one for each of the ", ef.config.num_classes, " classes is needed");
  for (const std::string& name : ef.classes) {
    require(name.find('\0') == std::string::npos, "a name in 'classes' holds a zero byte; texts without it are needed");
  }
}

// The metadata: everything but the tensors.
EngineFile read_metadata(const std::string& origin, const Json& header) {
  const Json* metadata = header.find("__metadata__");
  const auto text = [&](const char* key) {
    const Json* value = metadata == nullptr ? nullptr : metadata->find(key);
    return value == nullptr ? nullptr : &value->string();
  };
  const auto shown = [](const std::string* value) {
    return value == nullptr ? std::string("missing") : in_quotes(*value);
  };
  if (const std::string* format = text("format"); format == nullptr || *format != kMagic) {
    fail(origin, "a safetensors file, but no engine file (its format is ", shown(format), ", '", kMagic,
         "' is needed); make one from a calibrated checkpoint with `python pyharness/convert.py to-engine`");
  }
  if (const std::string* version = text("version"); version == nullptr || *version != kVersion) {
    fail(origin, "its engine file version is ", shown(version), ", this program reads version ", kVersion,
         "; update the program, or ", kAgain);
  }
  for (const char* key : {"config", "graph", "int8_mode", "meta"}) {
    if (text(key) == nullptr) fail(origin, "the header lacks '", key, "'; ", kAgain);
  }
  EngineFile ef;
  ef.graph = *text("graph");
  const std::vector<std::string> graphs = graph_names();
  if (std::find(graphs.begin(), graphs.end(), ef.graph) == graphs.end()) {
    std::string known;
    for (const std::string& graph : graphs) known += (known.empty() ? "" : ", ") + graph;
    fail(origin, "graph ", in_quotes(ef.graph), " is unknown to this program, which has ", known,
         "; update the program, or ", kAgain);
  }
  reading(origin, "the model description", [&] { ef.config = read_config(Json::parse(*text("config")), ef.name); });
  const bool one_mode = ef.graph == "fused_int8" || ef.config.version == 2;
  if (const std::string& mode = *text("int8_mode"); mode != "1" && (mode != "2" || one_mode)) {
    fail(origin, "int8_mode ", in_quotes(mode), " is unknown to ", ef.graph, " of Swin-V", ef.config.version,
         ", which has ", one_mode ? "1 only" : "1 and 2", "; ", kAgain);
  } else {
    ef.config.int8_mode = mode == "1" ? 1 : 2;
  }
  reading(origin, "'meta' in the header", [&] {
    const Json meta = Json::parse(*text("meta"));
    read_normalization(meta, ef);
    read_class_names(meta, ef);
  });
  return ef;
}

// A tensor as the header describes it.
struct Entry {
  std::string key;
  std::size_t position = 0;
  TensorView view;
  std::uint64_t begin = 0, end = 0;  // in the data behind the header
};

Entry read_entry(const Json& json, std::uint64_t data_bytes) {
  constexpr std::pair<const char*, DType> kDTypes[] = {{"I8", DType::kS8}, {"F16", DType::kF16}, {"F32", DType::kF32}};
  Entry e;
  e.key = json.name();
  const std::string tensor = "tensor " + in_quotes(e.key);
  // "0003.layers.0.blocks.0.attn.proj.bias"
  bool numbered = e.key.size() > 5 && e.key[4] == '.';
  for (std::size_t i = 0; numbered && i < 4; ++i) {
    numbered = e.key[i] >= '0' && e.key[i] <= '9';
    e.position = e.position * 10 + static_cast<std::size_t>(e.key[i] - '0');
  }
  require(numbered, tensor, " has no position in front of its name; a name such as '0003.norm.weight' is needed");
  const std::string& dtype = json.at("dtype").string();
  const auto found = std::find_if(std::begin(kDTypes), std::end(kDTypes), [&](auto& d) { return dtype == d.first; });
  require(found != std::end(kDTypes), tensor, " has the dtype ", in_quotes(dtype), "; I8, F16 or F32 is needed");
  e.view.dtype = found->second;
  const std::vector<std::int64_t> shape = json.at("shape").integers();
  require(shape.size() <= TensorView::kMaxRank, tensor, " has ", shape.size(), " dimensions; at most ",
          TensorView::kMaxRank, " can be");
  std::int64_t product = 1;  // of all dimensions but those of 0, so that no order of them overflows
  for (const std::int64_t dim : shape) {
    require(dim >= 0 && dim <= kMaxElements / product, tensor, " has the dimension ", dim, "; at least 0, and at most ",
            kMaxElements, " elements in all, can be");
    product *= std::max<std::int64_t>(dim, 1);
    e.view.shape[e.view.rank++] = dim;
  }
  const std::vector<std::int64_t> offsets = json.at("data_offsets").integers();
  require(offsets.size() == 2 && offsets[0] >= 0 && offsets[0] <= offsets[1], tensor,
          " has data_offsets that are no begin and end");
  e.begin = static_cast<std::uint64_t>(offsets[0]);
  e.end = static_cast<std::uint64_t>(offsets[1]);
  require(e.end <= data_bytes, tensor, " ends at byte ", e.end, " of the data, the file has ", data_bytes,
          " bytes of them: it is cut off");
  const std::int64_t wanted = e.view.numel() * size_of(e.view.dtype);
  require(e.end - e.begin == static_cast<std::uint64_t>(wanted), tensor, " has ", e.end - e.begin,
          " bytes; its shape and dtype need ", wanted);
  return e;
}

// Every tensor, in the order of the list. Together they are the whole of the data, each byte once.
std::vector<Entry> read_entries(const Json& header, std::uint64_t data_bytes) {
  std::vector<Entry> entries;
  for (const Json& member : header.members()) {
    if (member.name() != "__metadata__") entries.push_back(read_entry(member, data_bytes));
  }
  const auto by_offset = [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  };
  std::sort(entries.begin(), entries.end(), by_offset);
  std::uint64_t end = 0;
  for (const Entry& e : entries) {
    require(e.begin == end, "tensor ", in_quotes(e.key), " begins at byte ", e.begin,
            " of the data, the one before ends at ", end, "; one must follow the other");
    end = e.end;
  }
  require(end == data_bytes, "the tensors have ", end, " bytes, the data behind the header ", data_bytes);
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.position < b.position; });
  for (std::size_t i = 0; i < entries.size(); ++i) {
    require(i == 0 || entries[i].position != entries[i - 1].position, "two tensors have the position ",
            entries[i].position, ": ", in_quotes(entries[i].key), " and ", in_quotes(entries[i == 0 ? 0 : i - 1].key));
    require(entries[i].position == i, "the tensor of position ", i, " is missing; the next is ",
            in_quotes(entries[i].key));
  }
  return entries;
}

template <class Word>
bool all_finite(const TensorView& t, Word exponent) {  // a word is finite where not all bits of its exponent are set
  bool finite = true;
  for (std::int64_t i = 0; i < t.numel(); ++i) finite &= (t.as<const Word>()[i] & exponent) != exponent;
  return finite;
}

bool all_finite(const TensorView& t) {
  if (t.dtype == DType::kF32) return all_finite<std::uint32_t>(t, 0x7f800000);
  return t.dtype != DType::kF16 || all_finite<std::uint16_t>(t, 0x7c00);
}

bool is_aligned(const void* data, DType dtype) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(size_of(dtype)) == 0;
}

std::size_t in_lines(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

EngineFile parse(const std::string& origin, Bytes content, std::size_t size) {
  const std::size_t length = header_bytes(origin, content.get(), size);
  const std::string_view text(reinterpret_cast<const char*>(content.get()) + kLengthBytes, length);
  std::byte* data = content.get() + kLengthBytes + length;
  const Json header = reading(origin, "the header", [&] { return Json::parse(text); });
  EngineFile ef = reading(origin, "the header", [&] { return read_metadata(origin, header); });
  const std::vector<Entry> entries =
      reading(origin, "the weight list", [&] { return read_entries(header, size - kLengthBytes - length); });
  std::size_t copied = 0;
  for (const Entry& e : entries) copied += is_aligned(data + e.begin, e.view.dtype) ? 0 : in_lines(e.end - e.begin);
  auto memory = std::make_shared<Memory>();
  if (copied > 0) memory->copies = allocate(copied);
  std::byte* copy = memory->copies.get();
  for (const Entry& e : entries) {
    TensorView view = e.view;
    const std::size_t bytes = e.end - e.begin;
    if (bytes > 0) view.data = data + e.begin;
    if (bytes > 0 && !is_aligned(view.data, view.dtype)) {
      view.data = std::memcpy(copy, view.data, bytes);
      copy += in_lines(bytes);
    }
    if (!all_finite(view)) {
      fail(origin, "tensor ", in_quotes(e.key), " holds NaN or infinity; convert the checkpoint again");
    }
    ef.tensors.push_back(view);
    ef.names.push_back(e.key.substr(e.key.find('.') + 1));
  }
  memory->file = std::move(content);
  ef.memory = std::move(memory);
  return ef;
}

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

// Reads `bytes`, all of them; FileError where the file ends before, or the system refuses.
void read_bytes(const std::string& path, std::FILE* file, std::byte* out, std::size_t bytes) {
  errno = 0;
  const std::size_t got = std::fread(out, 1, bytes, file);
  if (got == bytes) return;
  if (std::ferror(file)) fail(path, "cannot be read: ", std::generic_category().message(errno));
  fail(path, "changed while it was read: ", bytes - got, " bytes are missing; wait until it is written");
}

}  // namespace

EngineFile parse_engine_file(const std::string& origin, const void* data, std::size_t bytes) {
  Bytes content = allocate(bytes);
  if (bytes > 0) std::memcpy(content.get(), data, bytes);
  return parse(origin, std::move(content), bytes);
}

EngineFile read_engine_file(const std::string& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) {
    const bool absent = status.type() == std::filesystem::file_type::not_found;
    fail(path, absent ? "no such file" : error.message(),
         "; give the path of an engine file, which `python pyharness/convert.py to-engine` makes");
  }
  if (!std::filesystem::is_regular_file(status)) {
    fail(path, std::filesystem::is_directory(status) ? "is a directory" : "is no regular file",
         "; give the path of an engine file");
  }
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  const File file(error ? nullptr : std::fopen(path.c_str(), "rb"), std::fclose);
  if (file == nullptr) {
    fail(path, "cannot be opened: ", error ? error.message() : std::generic_category().message(errno),
         "; check its permissions");
  }
  if (size > std::numeric_limits<std::size_t>::max()) {
    fail(path, "has ", size, " bytes, more than this machine addresses");
  }
  std::setvbuf(file.get(), nullptr, _IONBF, 0);  // what is read goes where it stays
  // A large file of another kind is refused before it is read.
  std::array<std::byte, kLengthBytes> begin{};
  read_bytes(path, file.get(), begin.data(), std::min<std::size_t>(size, kLengthBytes));
  header_bytes(path, begin.data(), size);
  Bytes content = allocate(size);
  std::memcpy(content.get(), begin.data(), kLengthBytes);
  read_bytes(path, file.get(), content.get() + kLengthBytes, size - kLengthBytes);
  if (std::fgetc(file.get()) != EOF) fail(path, "grew while it was read; wait until it is written");
  return parse(path, std::move(content), size);
}

}  // namespace swin::runtime
