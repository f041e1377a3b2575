#include "gemm_config.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "swin/error.h"
#include "swin/json.h"

namespace swin {

namespace {

struct OutputKind {
  GemmOutput output;
  const char* name;
  int bytes;
  bool channels;
};
constexpr OutputKind kOutputs[] = {
    {GemmOutput::kS8, "s8", 1, false},
    {GemmOutput::kS8Relu, "s8_relu", 1, false},
    {GemmOutput::kS32, "s32", 4, false},
    {GemmOutput::kChannelsS8, "channels_s8", 1, true},
    {GemmOutput::kChannelsRelu, "channels_relu", 1, true},
    {GemmOutput::kChannelsGelu, "channels_gelu", 1, true},
    {GemmOutput::kChannelsF32, "channels_f32", 4, true},
    {GemmOutput::kChannelsAddF16, "channels_add_f16", 2, true},
    {GemmOutput::kChannelsAddBF16, "channels_add_bf16", 2, true},
};

const OutputKind& kind_of(GemmOutput output) {
  for (const OutputKind& kind : kOutputs) {
    if (kind.output == output) return kind;
  }
  std::abort();  // not reached
}

}  // namespace

const char* name_of(GemmOutput output) { return kind_of(output).name; }
bool has_channels(GemmOutput output) { return kind_of(output).channels; }
int output_bytes(GemmOutput output) { return kind_of(output).bytes; }

GemmOutput gemm_output_of(const std::string& name) {
  std::string known;
  for (const OutputKind& kind : kOutputs) {
    if (name == kind.name) return kind.output;
    known += detail::concat(known.empty() ? "" : ", ", kind.name);
  }
  throw ValueError(detail::concat("gemm: there is no output '", name, "'; one of these is needed: ", known));
}

namespace cuda {
namespace {

constexpr int kFormat = 1;

std::vector<std::pair<std::string, int>> read_counts(const Json& object) {
  std::vector<std::pair<std::string, int>> counts;
  for (const Json& count : object.members()) counts.emplace_back(count.name(), static_cast<int>(count.integer()));
  return counts;
}

GemmEntry read_entry(const Json& json) {
  GemmEntry entry;
  entry.device = json.at("device").string();
  entry.sm = static_cast<int>(json.at("sm").integer());
  entry.versions = json.at("versions").string();
  entry.shape = {json.at("m").integer(), json.at("n").integer(), json.at("k").integer(),
                 gemm_output_of(json.at("output").string())};
  for (const Json& best : json.at("best").items()) {
    entry.best.push_back({best.at("provider").string(),
                          {best.at("candidate").string(), best.at("state").string()},
                          best.at("us").number()});
  }
  entry.offered = read_counts(json.at("offered"));
  entry.proven = read_counts(json.at("proven"));
  for (const Json& refusal : json.at("refused").items()) {
    entry.refused.push_back(
        {refusal.at("provider").string(), refusal.at("candidate").string(), refusal.at("why").string()});
  }
  return entry;
}

std::string json_counts(const std::vector<std::pair<std::string, int>>& counts) {
  std::string text = "{";
  for (const auto& [name, count] : counts) {
    text += (text.size() > 1 ? ", " : "") + json_string(name) + ": " + std::to_string(count);
  }
  return text + "}";
}

// Makes the folders `path` lies in. errno where it cannot.
int make_folders(const std::string& path) {
  for (std::size_t slash = path.find('/', 1); slash != std::string::npos; slash = path.find('/', slash + 1)) {
    if (::mkdir(path.substr(0, slash).c_str(), 0777) != 0 && errno != EEXIST) return errno;
  }
  return 0;
}

bool write_all(int file, const std::string& text) {
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t wrote = ::write(file, text.data() + done, text.size() - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) return false;
    done += static_cast<std::size_t>(wrote);
  }
  return ::fsync(file) == 0;
}

}  // namespace

std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

std::string json_number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

std::string json_fields(const GemmEntry& entry) {
  std::string best, refused;
  for (const GemmTiming& t : entry.best) {
    best += (best.empty() ? "" : ", ") + detail::concat("{\"provider\": ", json_string(t.provider), ", \"candidate\": ",
                                                       json_string(t.candidate.name), ", \"state\": ",
                                                       json_string(t.candidate.state), ", \"us\": ", json_number(t.us), "}");
  }
  for (const GemmRefusal& r : entry.refused) {
    refused += (refused.empty() ? "" : ", ") +
               detail::concat("{\"provider\": ", json_string(r.provider), ", \"candidate\": ", json_string(r.candidate),
                              ", \"why\": ", json_string(r.why), "}");
  }
  return detail::concat("\"device\": ", json_string(entry.device), ", \"sm\": ", entry.sm, ", \"versions\": ",
                        json_string(entry.versions), ", \"m\": ", entry.shape.m, ", \"n\": ", entry.shape.n, ", \"k\": ",
                        entry.shape.k, ", \"output\": ", json_string(name_of(entry.shape.output)), ", \"best\": [", best,
                        "], \"offered\": ", json_counts(entry.offered), ", \"proven\": ", json_counts(entry.proven),
                        ", \"refused\": [", refused, "]");
}

std::string gemm_config_path() {
  const auto of = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value != nullptr ? value : "");
  };
  if (const std::string path = of("SWIN_GEMM_CONFIG"); !path.empty()) return path;
  if (const std::string cache = of("XDG_CACHE_HOME"); !cache.empty()) return cache + "/swin_int8/gemm.json";
  if (const std::string home = of("HOME"); !home.empty()) return home + "/.cache/swin_int8/gemm.json";
  return "";
}

std::vector<GemmEntry> read_gemm_config(const std::string& path) {
  std::ifstream file(path);
  if (path.empty() || !file) return {};
  std::ostringstream content;
  content << file.rdbuf();
  const std::string text = content.str();
  try {
    const Json document = Json::parse(text);
    const std::int64_t format = document.at("format").integer();
    if (format != kFormat) throw ValueError(detail::concat("format ", format, "; this build reads format ", kFormat));
    std::vector<GemmEntry> entries;
    for (const Json& entry : document.at("entries").items()) entries.push_back(read_entry(entry));
    return entries;
  } catch (const ValueError& error) {
    throw ValueError(detail::concat("gemm config: ", path, " is not one that this build reads (", error.what(),
                                    "). Remove it, and it is measured again; or name another with SWIN_GEMM_CONFIG"));
  }
}

std::string add_to_gemm_config(const std::string& path, const std::vector<GemmEntry>& entries) {
  if (path.empty()) return "no place for it: none of SWIN_GEMM_CONFIG, XDG_CACHE_HOME and HOME is set";
  if (const int error = make_folders(path); error != 0) {
    return detail::concat("the folder of ", path, " cannot be made: ", std::strerror(error));
  }
  std::vector<GemmEntry> all = read_gemm_config(path);
  for (const GemmEntry& entry : entries) {
    bool placed = false;
    for (GemmEntry& old : all) {
      if (!placed && old.same_key(entry)) {
        old = entry;
        placed = true;
      }
    }
    if (!placed) all.push_back(entry);
  }
  std::string text = detail::concat("{\"format\": ", kFormat, ", \"entries\": [");
  for (std::size_t i = 0; i < all.size(); ++i) text += (i ? ",\n{" : "\n{") + json_fields(all[i]) + "}";
  text += "\n]}\n";

  std::string temporary = path + ".XXXXXX";
  const int file = ::mkstemp(temporary.data());
  if (file < 0) return detail::concat(path, " cannot be written: ", std::strerror(errno));
  const mode_t mask = ::umask(0);
  ::umask(mask);
  const bool written = write_all(file, text) && ::fchmod(file, 0666 & ~mask) == 0;
  int error = written ? 0 : errno;
  if (::close(file) != 0 && error == 0) error = errno;
  if (error == 0 && ::rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error == 0) return "";
  ::unlink(temporary.c_str());
  return detail::concat(path, " cannot be written: ", std::strerror(error));
}

}  // namespace cuda
}  // namespace swin
