// Operations between the lanes of a simdgroup, and barriers: meetings in the runtime.
#pragma once
#include "traits.h"
#include "vectors.h"

#define EMU_TOGETHER __attribute__((convergent))
extern "C" {
EMU_TOGETHER ulong emu_simd_reduce(ulong value, uint type, uint operation, uint site);
EMU_TOGETHER ulong emu_simd_shuffle(ulong value, uint source, uint site);
EMU_TOGETHER ulong emu_simd_ballot(uint vote, uint site);
EMU_TOGETHER void emu_simdgroup_barrier(uint flags, uint site);
EMU_TOGETHER void emu_threadgroup_barrier(uint flags, uint site);
uint emu_attribute(uint attribute, uint component);
}

namespace metal {
enum mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
SHIM constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
enum memory_order { memory_order_relaxed };

SHIM void threadgroup_barrier(mem_flags flags, SITE) { emu_threadgroup_barrier(flags, site); }
SHIM void simdgroup_barrier(mem_flags flags, SITE) { emu_simdgroup_barrier(flags, site); }

// How the runtime knows a value: Type of simd.cpp; narrow integers travel as wide ones.
template <typename T> struct lane_value;
#define EMU_LANE(T, WIDE, TAG) \
  template <> struct lane_value<T> { typedef WIDE wide; enum { tag = TAG }; };
EMU_LANE(float, float, 0)
EMU_LANE(half, half, 1)
EMU_LANE(bfloat, bfloat, 2)
EMU_LANE(bool, int, 3)
EMU_LANE(char, int, 3)
EMU_LANE(short, int, 3)
EMU_LANE(int, int, 3)
EMU_LANE(uchar, uint, 4)
EMU_LANE(ushort, uint, 4)
EMU_LANE(uint, uint, 4)
EMU_LANE(long, long, 5)
EMU_LANE(ulong, ulong, 6)
#undef EMU_LANE

SHIM ulong to_bits(float x) { return __builtin_bit_cast(uint, x); }
SHIM ulong to_bits(half x) { return __builtin_bit_cast(ushort, x); }
SHIM ulong to_bits(bfloat x) { return __builtin_bit_cast(ushort, x); }
SHIM ulong to_bits(int x) { return uint(x); }
SHIM ulong to_bits(uint x) { return x; }
SHIM ulong to_bits(long x) { return ulong(x); }
SHIM ulong to_bits(ulong x) { return x; }
template <typename T> SHIM T from_bits(ulong x) { return T(x); }
template <> SHIM float from_bits<float>(ulong x) { return __builtin_bit_cast(float, uint(x)); }
template <> SHIM half from_bits<half>(ulong x) { return __builtin_bit_cast(half, ushort(x)); }
template <> SHIM bfloat from_bits<bfloat>(ulong x) { return __builtin_bit_cast(bfloat, ushort(x)); }

template <typename T>
SHIM T reduce(T x, uint operation, uint site) {
  typedef typename lane_value<T>::wide Wide;
  return T(from_bits<Wide>(emu_simd_reduce(to_bits(Wide(x)), lane_value<T>::tag, operation, site)));
}
template <typename T>
SHIM T shuffle(T x, uint source, uint site) {
  typedef typename lane_value<T>::wide Wide;
  return T(from_bits<Wide>(emu_simd_shuffle(to_bits(Wide(x)), source, site)));
}

// Operations by their numbers in simd.cpp.
#define EMU_REDUCTION(NAME, OPERATION)                                            \
  template <typename T> SHIM T NAME(T x, SITE) { return reduce(x, OPERATION, site); } \
  template <typename T, int N> SHIM vec<T, N> NAME(vec<T, N> x, SITE) {           \
    for (int i = 0; i < N; i++) x[i] = reduce(T(x[i]), OPERATION, site);          \
    return x;                                                                     \
  }
EMU_REDUCTION(simd_sum, 0)
EMU_REDUCTION(simd_product, 1)
EMU_REDUCTION(simd_min, 2)
EMU_REDUCTION(simd_max, 3)
EMU_REDUCTION(simd_and, 4)
EMU_REDUCTION(simd_or, 5)
EMU_REDUCTION(simd_xor, 6)
EMU_REDUCTION(simd_prefix_inclusive_sum, 7)
EMU_REDUCTION(simd_prefix_exclusive_sum, 8)
EMU_REDUCTION(simd_prefix_inclusive_product, 9)
EMU_REDUCTION(simd_prefix_exclusive_product, 10)
#undef EMU_REDUCTION

SHIM uint emu_lane() { return emu_attribute(11, 0); }
SHIM uint emu_lanes() {
  uint threads = emu_attribute(19, 0) * emu_attribute(19, 1) * emu_attribute(19, 2);
  uint rest = threads - emu_attribute(7, 0) * 32;
  return rest < 32 ? rest : 32;
}
// Lanes beyond the end keep their own value.
SHIM uint emu_up(uint delta) { return emu_lane() < delta ? emu_lane() : emu_lane() - delta; }
SHIM uint emu_down(uint delta) {
  return emu_lane() + delta < emu_lanes() ? emu_lane() + delta : emu_lane();
}

#define EMU_SHUFFLE(NAME, SOURCE)                                                        \
  template <typename T> SHIM T NAME(T x, ushort by, SITE) { return shuffle(x, SOURCE, site); } \
  template <typename T, int N> SHIM vec<T, N> NAME(vec<T, N> x, ushort by, SITE) {       \
    for (int i = 0; i < N; i++) x[i] = shuffle(T(x[i]), SOURCE, site);                   \
    return x;                                                                            \
  }
EMU_SHUFFLE(simd_shuffle, by)
EMU_SHUFFLE(simd_broadcast, by)
EMU_SHUFFLE(simd_shuffle_xor, emu_lane() ^ by)
EMU_SHUFFLE(simd_shuffle_up, emu_up(by))
EMU_SHUFFLE(simd_shuffle_down, emu_down(by))
EMU_SHUFFLE(simd_shuffle_rotate_up, (emu_lane() + emu_lanes() - by) % emu_lanes())
EMU_SHUFFLE(simd_shuffle_rotate_down, (emu_lane() + by) % emu_lanes())
EMU_SHUFFLE(quad_shuffle, (emu_lane() & ~3u) | by)
EMU_SHUFFLE(quad_broadcast, (emu_lane() & ~3u) | by)
EMU_SHUFFLE(quad_shuffle_xor, emu_lane() ^ by)
#undef EMU_SHUFFLE
// Of four lanes, each with the sum of two neighbours before the sum of both sums.
#define EMU_QUAD(NAME, ...)                                       \
  template <typename T> SHIM T NAME(T x, SITE) {                  \
    T y = quad_shuffle_xor(x, 1, site);                           \
    x = T(__VA_ARGS__);                                           \
    y = quad_shuffle_xor(x, 2, site);                             \
    return T(__VA_ARGS__);                                        \
  }
EMU_QUAD(quad_sum, x + y)
EMU_QUAD(quad_product, x * y)
EMU_QUAD(quad_min, y < x ? y : x)
EMU_QUAD(quad_max, x < y ? y : x)
#undef EMU_QUAD
// Lanes beyond the end take `filling` of the lanes at the other end.
#define EMU_FILL(NAME, SHUFFLE, ROTATE, BEYOND)                                          \
  template <typename T> SHIM T NAME(T x, T filling, ushort by, SITE) {                   \
    T own = SHUFFLE(x, by, site), other = ROTATE(filling, by, site);                     \
    return BEYOND ? other : own;                                                         \
  }
EMU_FILL(simd_shuffle_and_fill_up, simd_shuffle_up, simd_shuffle_rotate_up, emu_lane() < by)
EMU_FILL(simd_shuffle_and_fill_down, simd_shuffle_down, simd_shuffle_rotate_down,
         emu_lane() + by >= emu_lanes())
#undef EMU_FILL
template <typename T> SHIM T simd_broadcast_first(T x, SITE) { return shuffle(x, 0, site); }
SHIM bool simd_is_first() { return emu_lane() == 0; }

struct simd_vote {
  typedef ulong vote_t;
  ulong votes;
  ulong everyone;
  explicit operator ulong() const { return votes; }
  bool all() const { return votes == everyone; }
  bool any() const { return votes != 0; }
};
SHIM simd_vote simd_ballot(bool x, SITE) {
  return simd_vote{emu_simd_ballot(x, site), (1ul << emu_lanes()) - 1};
}
SHIM bool simd_all(bool x, SITE) { return simd_ballot(x, site).all(); }
SHIM bool simd_any(bool x, SITE) { return simd_ballot(x, site).any(); }
}  // namespace metal
