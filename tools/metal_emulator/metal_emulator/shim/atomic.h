// Atomics of relaxed order, the only one Metal has. No thread is interrupted between two meetings,
// so a plain read and write is atomic here; the runtime checks the place.
#pragma once
#include "simd.h"

extern "C" void emu_atomic(ulong address, uint size, uint writes, uint site);

namespace metal {
template <typename T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

// Loads and stores without the callbacks: `emu_atomic` has checked them.
#define EMU_UNCHECKED __attribute__((nodebug, noinline, no_sanitize("thread")))
#define EMU_UPDATE(SPACE, NAME, ...)                                                            \
  template <typename T>                                                                         \
  EMU_UNCHECKED T NAME##_at(volatile SPACE T* p, T x) {                                         \
    T old = *p;                                                                                 \
    *p = __VA_ARGS__;                                                                           \
    return old;                                                                                 \
  }                                                                                             \
  template <typename T>                                                                         \
  SHIM T NAME(volatile SPACE atomic<T>* p, T x, memory_order, SITE) {                           \
    emu_atomic(ulong(p), sizeof(T), 1, site);                                                   \
    return NAME##_at((volatile SPACE T*)p, x);                                                  \
  }
#define EMU_ATOMICS(SPACE)                                                       \
  EMU_UPDATE(SPACE, atomic_exchange_explicit, x)                                 \
  EMU_UPDATE(SPACE, atomic_fetch_add_explicit, old + x)                          \
  EMU_UPDATE(SPACE, atomic_fetch_sub_explicit, old - x)                          \
  EMU_UPDATE(SPACE, atomic_fetch_min_explicit, x < old ? x : old)                \
  EMU_UPDATE(SPACE, atomic_fetch_max_explicit, old < x ? x : old)                \
  EMU_UPDATE(SPACE, atomic_fetch_and_explicit, old & x)                          \
  EMU_UPDATE(SPACE, atomic_fetch_or_explicit, old | x)                           \
  EMU_UPDATE(SPACE, atomic_fetch_xor_explicit, old ^ x)                          \
  template <typename T>                                                          \
  SHIM void atomic_store_explicit(volatile SPACE atomic<T>* p, T x, memory_order, SITE) { \
    atomic_exchange_explicit(p, x, memory_order_relaxed, site);                  \
  }                                                                              \
  template <typename T>                                                          \
  EMU_UNCHECKED T atomic_load_at(volatile SPACE T* p) { return *p; }             \
  template <typename T>                                                          \
  SHIM T atomic_load_explicit(const volatile SPACE atomic<T>* p, memory_order, SITE) { \
    emu_atomic(ulong(p), sizeof(T), 0, site);                                    \
    return atomic_load_at((volatile SPACE T*)p);                                 \
  }                                                                              \
  template <typename T>                                                          \
  EMU_UNCHECKED T atomic_replace_at(volatile SPACE T* p, T expected, T x) {      \
    T old = *p;                                                                  \
    if (old == expected) *p = x;                                                 \
    return old;                                                                  \
  }                                                                              \
  template <typename T>                                                          \
  SHIM bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* p,   \
      thread T* expected, T x, memory_order, memory_order, SITE) {               \
    emu_atomic(ulong(p), sizeof(T), 1, site);                                    \
    T old = atomic_replace_at((volatile SPACE T*)p, *expected, x);               \
    bool same = old == *expected;                                                \
    *expected = old;                                                             \
    return same;                                                                 \
  }
EMU_ATOMICS(device)
EMU_ATOMICS(threadgroup)
#undef EMU_ATOMICS
#undef EMU_UPDATE
#undef EMU_UNCHECKED
}  // namespace metal
