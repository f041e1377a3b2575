#include "processors.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

namespace swin::runtime {
namespace {

// quota / period of one group, in processors; 0 where there is no limit, or no such file.
double limit_of(const std::string& folder, bool second_version) {
  double quota = 0, period = 0;
  if (second_version) {  // "200000 100000", or "max 100000"
    std::ifstream(folder + "/cpu.max") >> quota >> period;
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;  // -1 is no limit
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

bool names_cpu(const std::string& controllers) {
  std::istringstream list(controllers);
  for (std::string name; std::getline(list, name, ',');) {
    if (name == "cpu") return true;
  }
  return false;
}

}  // namespace

int processors_of_groups(const std::string& root) {
  double least = 0;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // number:controllers:/path; version 2's has no controllers
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !names_cpu(controllers)) continue;
    std::string mount = root + "/sys/fs/cgroup";
    if (!controllers.empty()) mount.append("/").append(controllers);
    // The groups above limit as well. Within a container the path may be the host's, and its own group is the mount.
    std::string path = line.substr(second + 1);
    for (;;) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      const double limit = limit_of(mount + path, controllers.empty());
      if (limit > 0 && (least == 0 || limit < least)) least = limit;
      if (path.empty()) break;
      path.erase(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  return least == 0 ? 0 : static_cast<int>(std::min(1e6, std::ceil(least)));
}

int processors() {
  int found = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) found = std::max(1, CPU_COUNT(&set));
  if (const int granted = processors_of_groups(); granted > 0) found = std::min(found, granted);
#endif
  return found;
}

}  // namespace swin::runtime
