// Arrays of a fixed size, values that all threads share, and the log, which writes nothing here.
#pragma once
#include "types.h"

namespace metal {
template <typename T, size_t N>
struct array {
  T elements[N];

  SHIM thread T& operator[](size_t i) thread { return elements[i]; }
  SHIM const thread T& operator[](size_t i) const thread { return elements[i]; }
  SHIM const device T& operator[](size_t i) const device { return elements[i]; }
  SHIM const constant T& operator[](size_t i) const constant { return elements[i]; }
  SHIM constexpr size_t size() const { return N; }
};

template <typename T> using uniform = T;
template <typename T> SHIM constexpr T make_uniform(T x) { return x; }

struct os_log {
  constexpr os_log(constant const char*, constant const char*) constant {}
#define EMU_LOG(NAME)                                                            \
  template <typename... Values> SHIM void NAME(constant const char*, Values...) const thread {} \
  template <typename... Values> SHIM void NAME(constant const char*, Values...) const constant {}
  EMU_LOG(log)
  EMU_LOG(log_debug)
  EMU_LOG(log_info)
  EMU_LOG(log_error)
  EMU_LOG(log_fault)
#undef EMU_LOG
};
}  // namespace metal
