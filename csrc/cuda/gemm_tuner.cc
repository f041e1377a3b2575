#include "gemm_tuner.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <sstream>

#include "swin/error.h"

namespace swin {
namespace cuda {
namespace {

constexpr const char* kAuto = "auto";
constexpr const char* kWhere = "gemm_s8";
constexpr const char* kSkipped = "left out by SWIN_GEMM_SKIP";
constexpr int kRounds = 9;          // timed rounds of each finalist, in turn
constexpr int kFinalists = 5;       // of all providers together; the fastest of each provider is always among them
constexpr double kRoundUs = 300;    // one round lasts about this long ...
constexpr int kMostLaunches = 50;   // ... but never more launches than this
constexpr int kScreenLaunches = 5;

std::string wanted_provider(GemmOutput output) {
  const char* value = std::getenv("SWIN_GEMM");
  const std::string wanted = value == nullptr || *value == '\0' ? kAuto : value;
  // cuBLASLt has nothing with a scale for each channel, our tiles nothing without: naming one says nothing of the other.
  return wanted == (has_channels(output) ? kCublasLt : kTiles) ? kAuto : wanted;
}

// Whether `provider` may run where `wanted` is asked for; the plain kernel always may, if it comes to that.
bool takes_part(const std::string& provider, const std::string& wanted) {
  return wanted == kAuto || wanted == provider || provider == kPlain;
}

std::string full_name(const std::string& provider, const std::string& candidate) { return provider + ":" + candidate; }

bool is_skipped(const std::string& name) {
  const char* value = std::getenv("SWIN_GEMM_SKIP");
  std::istringstream prefixes(value == nullptr ? "" : value);
  for (std::string prefix; std::getline(prefixes, prefix, ',');) {
    if (!prefix.empty() && name.compare(0, prefix.size(), prefix) == 0) return true;
  }
  return false;
}

std::string describe(const GemmShape& shape) {
  return detail::concat("M=", shape.m, " N=", shape.n, " K=", shape.k, " to ", name_of(shape.output));
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

}  // namespace

GemmTuner::GemmTuner(std::vector<const GemmProvider*> providers, GemmLab& lab)
    : providers_(std::move(providers)), lab_(lab) {}

const GemmProvider* GemmTuner::provider(const std::string& name) const {
  for (const GemmProvider* p : providers_) {
    if (name == p->name()) return p;
  }
  return nullptr;
}

std::string GemmTuner::versions(const std::string& wanted) const {
  std::string text;
  for (const GemmProvider* p : providers_) {
    if (!takes_part(p->name(), wanted)) continue;
    text += (text.empty() ? "" : ", ") + std::string(p->name()) + " " + p->version();
  }
  return text;
}

const GemmKernel* GemmTuner::find(int device, const std::string& wanted, const GemmShape& shape) const {
  std::shared_lock lock(chosen_mutex_);
  for (const auto& c : chosen_) {
    if (c->device == device && c->shape == shape && c->provider_wanted == wanted) return c->kernel.get();
  }
  return nullptr;
}

void GemmTuner::load_config() {
  const std::string path = gemm_config_path();
  if (loaded_ && path == loaded_from_) return;
  std::vector<GemmEntry> read = read_gemm_config(path);
  // What was measured by this process stays, in front.
  for (GemmEntry& entry : read) {
    const bool there = std::any_of(entries_.begin(), entries_.end(), [&](const GemmEntry& e) { return e.same_key(entry); });
    if (!there) entries_.push_back(std::move(entry));
  }
  loaded_from_ = path;
  loaded_ = true;
}

// What was measured of all providers says all of one, too.
GemmEntry* GemmTuner::known(const GemmDevice& device, const std::string& wanted, const GemmShape& shape) {
  GemmEntry key;
  key.device = device.name;
  key.sm = device.sm;
  key.shape = shape;
  for (const std::string& of : {std::string(kAuto), wanted}) {
    key.versions = versions(of);
    for (GemmEntry& entry : entries_) {
      if (entry.same_key(key)) return &entry;
    }
  }
  return nullptr;
}

const GemmEntry& GemmTuner::remember(GemmEntry entry) {
  for (GemmEntry& old : entries_) {
    if (old.same_key(entry)) {
      old = std::move(entry);
      return old;
    }
  }
  entries_.push_back(std::move(entry));
  return entries_.back();
}

GemmEntry GemmTuner::measure(const GemmDevice& device, const std::string& wanted, const GemmShape& shape) {
  struct Runner {
    const GemmProvider* provider;
    GemmCandidate candidate;
    std::unique_ptr<GemmKernel> kernel;
    double screened = 0;
    std::vector<double> rounds;
    GemmTrial trial() const { return {full_name(provider->name(), candidate.name), kernel.get()}; }
  };
  GemmEntry entry;
  entry.device = device.name;
  entry.sm = device.sm;
  entry.versions = versions(wanted);
  entry.shape = shape;

  std::vector<Runner> runners;
  for (const GemmProvider* p : providers_) {
    if (!takes_part(p->name(), wanted)) continue;
    std::string why;
    std::vector<GemmCandidate> offered;
    try {
      offered = p->candidates(shape, device.sm, &why);
    } catch (const Error& error) {  // a library that does not start here; the others may
      why = error.what();
    }
    entry.offered.emplace_back(p->name(), static_cast<int>(offered.size()));
    if (offered.empty()) entry.refused.push_back({p->name(), "", why});
    for (GemmCandidate& candidate : offered) {
      if (is_skipped(full_name(p->name(), candidate.name))) {
        entry.refused.push_back({p->name(), candidate.name, kSkipped});
        continue;
      }
      try {
        std::unique_ptr<GemmKernel> kernel = p->prepare(shape, candidate);
        runners.push_back({p, std::move(candidate), std::move(kernel), 0, {}});
      } catch (const Error& error) {
        entry.refused.push_back({p->name(), candidate.name, error.what()});
      }
    }
  }

  const std::unique_ptr<GemmBench> bench = lab_.bench(shape);
  std::vector<GemmTrial> trials;
  for (const Runner& r : runners) trials.push_back(r.trial());
  const std::vector<std::string> verdicts = bench->prove(trials);
  std::vector<Runner> proven;
  for (std::size_t i = 0; i < runners.size(); ++i) {
    if (verdicts[i].empty()) {
      proven.push_back(std::move(runners[i]));
    } else {
      entry.refused.push_back({runners[i].provider->name(), runners[i].candidate.name, verdicts[i]});
    }
  }
  for (const GemmProvider* p : providers_) {
    if (!takes_part(p->name(), wanted)) continue;
    const auto of_provider = [&](const Runner& r) { return r.provider == p; };
    entry.proven.emplace_back(p->name(), static_cast<int>(std::count_if(proven.begin(), proven.end(), of_provider)));
  }
  // The plain kernel last, and only where nobody else came so far.
  const auto is_plain = [](const Runner& r) { return std::string(r.provider->name()) == kPlain; };
  std::stable_partition(proven.begin(), proven.end(), [&](const Runner& r) { return !is_plain(r); });
  std::vector<Runner> timed;
  for (Runner& r : proven) {
    if (is_plain(r) && !timed.empty()) break;
    try {
      r.screened = std::min(bench->time_us(r.trial(), kScreenLaunches), bench->time_us(r.trial(), kScreenLaunches));
      timed.push_back(std::move(r));
    } catch (const UnsupportedError& error) {
      entry.refused.push_back({r.provider->name(), r.candidate.name, error.what()});
    }
  }
  std::sort(timed.begin(), timed.end(), [](const Runner& a, const Runner& b) { return a.screened < b.screened; });
  std::vector<Runner*> finalists;
  std::vector<const GemmProvider*> seen;
  for (Runner& r : timed) {
    const bool first_of_provider = std::find(seen.begin(), seen.end(), r.provider) == seen.end();
    if (first_of_provider) seen.push_back(r.provider);
    if (first_of_provider || finalists.size() < kFinalists) finalists.push_back(&r);
  }
  for (int round = 0; round < kRounds; ++round) {  // in turn, so that a drift of the clocks hits all alike
    for (Runner* r : finalists) {
      const double launches = kRoundUs / std::max(r->screened, 1.0);
      r->rounds.push_back(bench->time_us(r->trial(), std::clamp(static_cast<int>(launches), 1, kMostLaunches)));
    }
  }
  for (const GemmProvider* p : providers_) {
    GemmTiming best;
    best.us = std::numeric_limits<double>::infinity();
    for (Runner* r : finalists) {
      if (r->provider == p && median(r->rounds) < best.us) best = {p->name(), r->candidate, median(r->rounds)};
    }
    if (!best.provider.empty()) entry.best.push_back(best);
  }
  std::sort(entry.best.begin(), entry.best.end(), [](const GemmTiming& a, const GemmTiming& b) { return a.us < b.us; });
  return entry;
}

const GemmKernel& GemmTuner::choose(const GemmDevice& device, const std::string& wanted, const GemmEntry& entry) {
  std::string reasons;
  for (const GemmTiming& timing : entry.best) {
    if (wanted != kAuto && wanted != timing.provider) continue;
    if (is_skipped(full_name(timing.provider, timing.candidate.name))) {
      reasons += detail::concat("; ", timing.provider, " ", timing.candidate.name, ": ", kSkipped);
      continue;
    }
    const GemmProvider* p = provider(timing.provider);
    try {
      SWIN_CHECK(Error, kWhere, p != nullptr, "this build has no provider '", timing.provider, "'");
      auto chosen = std::make_unique<Chosen>(
          Chosen{device.index, wanted, entry.shape, device, timing, p->prepare(entry.shape, timing.candidate)});
      std::unique_lock lock(chosen_mutex_);
      chosen_.push_back(std::move(chosen));
      return *chosen_.back()->kernel;
    } catch (const Error& error) {
      reasons += detail::concat("; ", timing.provider, " ", timing.candidate.name, ": ", error.what());
    }
  }
  for (const GemmRefusal& r : entry.refused) {
    if (reasons.size() > 1000) break;
    if (wanted == kAuto || wanted == r.provider) {
      reasons += detail::concat("; ", r.provider, r.candidate.empty() ? "" : " ", r.candidate, ": ", r.why);
    }
  }
  SWIN_CHECK(UnsupportedError, kWhere, false, "nothing runs ", describe(entry.shape), " on ", device.name, " (sm_",
             device.sm, ") with SWIN_GEMM=", wanted, reasons,
             ". Set SWIN_GEMM=auto, or build for this GPU: bash scripts/build_ft.sh --cuda-arch ", device.sm);
  std::abort();  // not reached
}

const GemmKernel& GemmTuner::kernel(const GemmShape& shape, void* stream) {
  const GemmDevice device = lab_.current_device();
  const std::string wanted = wanted_provider(shape.output);
  if (const GemmKernel* kernel = find(device.index, wanted, shape)) return *kernel;

  if (wanted != kAuto && provider(wanted) == nullptr) {
    std::string known_names = kAuto;
    for (const GemmProvider* p : providers_) known_names += std::string(", ") + p->name();
    const bool real = wanted == kCublasLt || wanted == kCutlass;
    throw UnsupportedError(detail::concat(kWhere, ": SWIN_GEMM=", wanted,
                                          real ? " was not built in" : " names no provider", "; this build knows: ",
                                          known_names));
  }
  std::lock_guard lock(tuning_);
  if (const GemmKernel* kernel = find(device.index, wanted, shape)) return *kernel;  // another thread was faster
  if (wanted == kPlain) {  // takes any shape, and has nothing to be chosen
    GemmEntry entry;
    entry.shape = shape;
    entry.best.push_back({kPlain, provider(kPlain)->candidates(shape, device.sm, nullptr).front(), 0});
    return choose(device, wanted, entry);
  }
  load_config();
  const GemmEntry* entry = known(device, wanted, shape);
  if (entry != nullptr) {
    const bool measured_before = std::any_of(entry->best.begin(), entry->best.end(), [&](const GemmTiming& t) {
      return wanted == kAuto || wanted == t.provider;
    });
    try {
      return choose(device, wanted, *entry);
    } catch (const UnsupportedError&) {
      if (!measured_before) throw;  // it was looked at, and nothing was right
    }
    // Written by another build of the same versions, which had more kernels: look again.
  }
  SWIN_CHECK(Error, kWhere, !lab_.capturing(stream), describe(shape), " was not tuned yet on ", device.name,
             ", and inside a CUDA graph capture nothing can be measured. Run one forward pass of this batch size before the "
             "capture, or tune ahead: python pyharness/tune_gemm.py");
  const GemmEntry& measured = remember(measure(device, wanted, shape));
  saved_ = add_to_gemm_config(gemm_config_path(), {measured});
  return choose(device, wanted, measured);
}

std::string GemmTuner::tune(const std::vector<GemmShape>& shapes, bool again) {
  const GemmDevice device = lab_.current_device();
  std::lock_guard lock(tuning_);
  load_config();
  std::string list;
  std::vector<GemmEntry> fresh;
  for (const GemmShape& shape : shapes) {
    SWIN_CHECK(ShapeError, "tune_gemm", shape.m > 0 && shape.n > 0 && shape.k > 0, describe(shape),
               "; every size must be positive");
    const std::string wanted = wanted_provider(shape.output);
    const GemmEntry* entry = known(device, wanted, shape);
    const bool tuned = again || entry == nullptr;
    if (tuned) {
      entry = &remember(measure(device, wanted, shape));
      fresh.push_back(*entry);
      std::unique_lock chosen_lock(chosen_mutex_);
      // Kernels in use stay alive: only what is chosen for the next call changes.
      for (auto& c : chosen_) {
        if (c->device == device.index && c->shape == shape) c->device = -1;
      }
    }
    list += (list.empty() ? "" : ", ") + detail::concat("{\"tuned\": ", tuned ? "true" : "false", ", ", json_fields(*entry));
    const auto best = std::find_if(entry->best.begin(), entry->best.end(), [&](const GemmTiming& t) {
      return (wanted == kAuto || wanted == t.provider) && !is_skipped(full_name(t.provider, t.candidate.name));
    });
    if (best != entry->best.end()) {
      list +=
          detail::concat(", \"chosen\": ", json_string(best->provider),
                         ", \"candidate\": ", json_string(best->candidate.name), ", \"us\": ", json_number(best->us));
    } else {
      list += ", \"chosen\": null, \"candidate\": null, \"us\": null";
    }
    list += "}";
  }
  const std::string path = gemm_config_path();
  if (!fresh.empty()) saved_ = add_to_gemm_config(path, fresh);
  return detail::concat("{\"config\": ", json_string(path), ", \"saved\": ", json_string(saved_),
                        ", \"device\": ", json_string(device.name), ", \"sm\": ", device.sm,
                        ", \"versions\": ", json_string(versions(kAuto)), ", \"shapes\": [", list, "]}");
}

std::string GemmTuner::choices() const {
  std::shared_lock lock(chosen_mutex_);
  std::string list;
  for (const auto& c : chosen_) {
    if (c->device < 0) continue;
    list += (list.empty() ? "" : ", ") +
            detail::concat("{\"device\": ", json_string(c->where.name), ", \"sm\": ", c->where.sm, ", \"m\": ", c->shape.m,
                           ", \"n\": ", c->shape.n, ", \"k\": ", c->shape.k, ", \"output\": ",
                           json_string(name_of(c->shape.output)), ", \"provider\": ", json_string(c->timing.provider),
                           ", \"candidate\": ", json_string(c->timing.candidate.name), ", \"us\": ",
                           c->timing.us > 0 ? json_number(c->timing.us) : "null", "}");
  }
  return "[" + list + "]";
}

}  // namespace cuda
}  // namespace swin
