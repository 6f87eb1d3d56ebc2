// The few type traits that kernels ask for, and numeric limits.
#pragma once
#include "types.h"

namespace metal {
template <typename T, T V>
struct integral_constant {
  static constexpr constant T value = V;
};
template <bool V>
using bool_constant = integral_constant<bool, V>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <typename A, typename B> struct is_same : false_type {};
template <typename A> struct is_same<A, A> : true_type {};
template <typename A, typename B>
constexpr constant bool is_same_v = __is_same(A, B);
template <typename T>
constexpr constant bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
constexpr constant bool is_integral_v = __is_integral(T);

template <bool C, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool C, typename T = void> using enable_if_t = typename enable_if<C, T>::type;
template <bool C, typename A, typename B> struct conditional { typedef A type; };
template <typename A, typename B> struct conditional<false, A, B> { typedef B type; };
template <bool C, typename A, typename B> using conditional_t = typename conditional<C, A, B>::type;

template <typename T> struct numeric_limits;
#define EMU_LIMITS(T, LOW, HIGH)                                \
  template <> struct numeric_limits<T> {                        \
    static SHIM constexpr T min() { return LOW; }               \
    static SHIM constexpr T lowest() { return LOW; }            \
    static SHIM constexpr T max() { return HIGH; }              \
  };
EMU_LIMITS(char, -128, 127)
EMU_LIMITS(uchar, 0, 255)
EMU_LIMITS(short, -32768, 32767)
EMU_LIMITS(ushort, 0, 65535)
EMU_LIMITS(int, -2147483647 - 1, 2147483647)
EMU_LIMITS(uint, 0, 4294967295u)
EMU_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l)
EMU_LIMITS(ulong, 0, 18446744073709551615ul)
#undef EMU_LIMITS
#define EMU_LIMITS(T, SMALLEST, HIGH, EPSILON)                      \
  template <> struct numeric_limits<T> {                            \
    static SHIM constexpr T min() { return T(SMALLEST); }           \
    static SHIM constexpr T lowest() { return T(-(HIGH)); }         \
    static SHIM constexpr T max() { return T(HIGH); }               \
    static SHIM constexpr T epsilon() { return T(EPSILON); }        \
    static SHIM constexpr T infinity() { return T(INFINITY); }      \
    static SHIM constexpr T quiet_NaN() { return T(NAN); }          \
  };
EMU_LIMITS(float, 0x1p-126f, 0x1.fffffep127f, 0x1p-23f)
EMU_LIMITS(half, 0x1p-14f, 65504.0f, 0x1p-10f)
EMU_LIMITS(bfloat, 0x1p-126f, 0x1.fep127f, 0x1p-7f)
#undef EMU_LIMITS
}  // namespace metal
