// The few type traits that kernels ask for, and numeric limits.
#pragma once
#include "types.h"

namespace metal {
template <typename T, T V>
struct integral_constant {
  typedef T value_type;
  static constexpr constant T value = V;
  SHIM constexpr operator T() const { return V; }
};
template <bool V>
using bool_constant = integral_constant<bool, V>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <typename A, typename B> struct is_same : false_type {};
template <typename A> struct is_same<A, A> : true_type {};
template <typename A, typename B>
constexpr constant bool is_same_v = __is_same(A, B);
template <typename T> struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T>
constexpr constant bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
constexpr constant bool is_integral_v = __is_integral(T);
template <typename T>
constexpr constant bool is_signed_v = is_floating_point_v<T> || __is_signed(T);
template <typename T>
constexpr constant bool is_unsigned_v = __is_unsigned(T);
template <typename From, typename To>
constexpr constant bool is_convertible_v = __is_convertible(From, To);

template <typename T> using remove_cv_t = __remove_cv(T);
template <typename T> using remove_const_t = __remove_const(T);
template <typename T> using remove_reference_t = __remove_reference_t(T);
template <typename T> struct remove_addrspace { typedef T type; };
template <typename T> struct remove_addrspace<thread T> { typedef T type; };
template <typename T> struct remove_addrspace<threadgroup T> { typedef T type; };
template <typename T> struct remove_addrspace<device T> { typedef T type; };
template <typename T> struct remove_addrspace<constant T> { typedef T type; };
template <typename T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <typename... Ts> using disjunction = bool_constant<(false || ... || Ts::value)>;
template <typename... Ts> using _disjunction = disjunction<Ts...>;  // as Apple's headers name it
template <typename... Ts> using conjunction = bool_constant<(true && ... && Ts::value)>;

template <bool C, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool C, typename T = void> using enable_if_t = typename enable_if<C, T>::type;
template <bool C, typename A, typename B> struct conditional { typedef A type; };
template <typename A, typename B> struct conditional<false, A, B> { typedef B type; };
template <bool C, typename A, typename B> using conditional_t = typename conditional<C, A, B>::type;

// What `static_cast` of the text becomes: clang has none from half to bfloat.
template <typename To, typename From>
SHIM constexpr To emu_cast(From x) {
  if constexpr (is_same_v<To, bfloat> && is_same_v<From, half>)
    return static_cast<bfloat>(static_cast<float>(x));
  else
    return static_cast<To>(x);
}

template <typename T> struct numeric_limits;
#define EMU_LIMITS(T, LOW, HIGH)                                \
  template <> struct numeric_limits<T> {                        \
    static SHIM constexpr T min() { return LOW; }               \
    static SHIM constexpr T lowest() { return LOW; }            \
    static SHIM constexpr T max() { return HIGH; }              \
  };
EMU_LIMITS(char, -128, 127)
EMU_LIMITS(int8_t, -128, 127)
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
