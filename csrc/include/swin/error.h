// Errors of the engine. Library code throws these and never ends the process; the binding maps each to a Python
// exception. A message says which operation, where, what was found, what is needed and what to do.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace swin {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
class ShapeError : public Error {  // a size or rank that does not fit
 public:
  using Error::Error;
};
class DTypeError : public Error {
 public:
  using Error::Error;
};
class ValueError : public Error {  // NaN images, an amax of zero, an unknown name
 public:
  using Error::Error;
};
class UnsupportedError : public Error {  // the backend, or this build, lacks it
 public:
  using Error::Error;
};

namespace detail {
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}
}  // namespace detail

}  // namespace swin

// SWIN_CHECK(ShapeError, "gemm_s8", k > 0, "K is ", k, "; it must be positive")
#define SWIN_CHECK(ErrorType, where, condition, ...)                                                             \
  do {                                                                                                           \
    if (!(condition)) {                                                                                          \
      throw ::swin::ErrorType(::swin::detail::concat(where, " (", __FILE__, ":", __LINE__, "): ", __VA_ARGS__)); \
    }                                                                                                            \
  } while (0)
