// Plain checks, no framework: every failure is printed, and a program's status says whether there was one (g_failures).
#pragma once

#include <cstdio>
#include <exception>
#include <string>

inline int g_failures = 0;

#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++g_failures;                                                       \
    }                                                                     \
  } while (0)

// f() throws an Error whose words contain `text`.
template <class Error, class F>
void expect_error(const std::string& text, F&& f, int line) {
  try {
    f();
  } catch (const Error& e) {
    if (std::string(e.what()).find(text) == std::string::npos) {
      std::printf("line %d: wanted '%s' in: %s\n", line, text.c_str(), e.what());
      ++g_failures;
    }
    return;
  } catch (const std::exception& e) {
    std::printf("line %d: another kind of error: %s\n", line, e.what());
    ++g_failures;
    return;
  }
  std::printf("line %d: no error; wanted '%s'\n", line, text.c_str());
  ++g_failures;
}
