// How many processors a process may use.
#pragma once

#include <string>

namespace swin::runtime {

// Those that the calling thread may run on, or as many as the time amounts to that its control groups (a container's
// limit) grant it, where that is fewer: threads beyond it would have each other wait. At least 1.
int processors();

// What the control groups grant, rounded up; 0 where they set no limit. `root`: ahead of /proc and /sys, for tests.
int processors_of_groups(const std::string& root = "");

}  // namespace swin::runtime
