// Metal's mathematics. Functions of one result rounding come from the C library: Apple's exp, log
// and their kin differ from it by a few units in the last place.
#pragma once
#include "traits.h"
#include "vectors.h"

extern "C" {
float expf(float);
float exp2f(float);
float logf(float);
float log2f(float);
float log10f(float);
float log1pf(float);
float expm1f(float);
float sinf(float);
float cosf(float);
float tanf(float);
float tanhf(float);
float sinhf(float);
float coshf(float);
float asinf(float);
float acosf(float);
float atanf(float);
float asinhf(float);
float acoshf(float);
float atanhf(float);
float erff(float);
float powf(float, float);
float fmodf(float, float);
float atan2f(float, float);
}

namespace metal {
SHIM float emu_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
SHIM float emu_exp10(float x) { return powf(10.0f, x); }
SHIM float emu_fract(float x) { return x - __builtin_floorf(x); }
SHIM float emu_sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f; }

// A function of one argument, for scalars and vectors; half and bfloat through float.
#define EMU_UNARY(NAME, F)                                           \
  SHIM float NAME(float x) { return F(x); }                          \
  SHIM half NAME(half x) { return half(F(float(x))); }               \
  SHIM bfloat NAME(bfloat x) { return bfloat(F(float(x))); }         \
  template <typename T, int N>                                       \
  SHIM vec<T, N> NAME(vec<T, N> x) {                                 \
    for (int i = 0; i < N; i++) x[i] = NAME(T(x[i]));                \
    return x;                                                        \
  }
#define EMU_UNARIES          \
  EMU_UNARY(exp, expf)       \
  EMU_UNARY(exp2, exp2f)     \
  EMU_UNARY(exp10, emu_exp10) \
  EMU_UNARY(log, logf)       \
  EMU_UNARY(log2, log2f)     \
  EMU_UNARY(log10, log10f)   \
  EMU_UNARY(sin, sinf)       \
  EMU_UNARY(cos, cosf)       \
  EMU_UNARY(tan, tanf)       \
  EMU_UNARY(sinh, sinhf)     \
  EMU_UNARY(cosh, coshf)     \
  EMU_UNARY(tanh, tanhf)     \
  EMU_UNARY(asin, asinf)     \
  EMU_UNARY(acos, acosf)     \
  EMU_UNARY(atan, atanf)     \
  EMU_UNARY(asinh, asinhf)   \
  EMU_UNARY(acosh, acoshf)   \
  EMU_UNARY(atanh, atanhf)   \
  EMU_UNARY(sqrt, __builtin_sqrtf) \
  EMU_UNARY(rsqrt, emu_rsqrt) \
  EMU_UNARY(floor, __builtin_floorf) \
  EMU_UNARY(ceil, __builtin_ceilf) \
  EMU_UNARY(trunc, __builtin_truncf) \
  EMU_UNARY(rint, __builtin_rintf) \
  EMU_UNARY(round, __builtin_roundf) \
  EMU_UNARY(fabs, __builtin_fabsf) \
  EMU_UNARY(fract, emu_fract) \
  EMU_UNARY(sign, emu_sign)
EMU_UNARIES
namespace fast { EMU_UNARIES }
namespace precise { EMU_UNARIES }

// Overloads, not templates: min(float, int) is ambiguous, as in Metal.
#define EMU_BINARY_OF(T, NAME, ...)                                    \
  SHIM T NAME(T x, T y) { return __VA_ARGS__; }
#define EMU_BINARY_VECTOR(NAME)                                        \
  template <typename T, int N>                                         \
  SHIM vec<T, N> NAME(vec<T, N> x, vec<T, N> y) {                      \
    for (int i = 0; i < N; i++) x[i] = NAME(T(x[i]), T(y[i]));         \
    return x;                                                          \
  }
#define EMU_FLOATS(M, NAME, ...) \
  M(float, NAME, __VA_ARGS__) M(half, NAME, __VA_ARGS__) M(bfloat, NAME, __VA_ARGS__)
#define EMU_INTEGERS(M, NAME, ...)                                     \
  M(char, NAME, __VA_ARGS__) M(uchar, NAME, __VA_ARGS__)               \
  M(short, NAME, __VA_ARGS__) M(ushort, NAME, __VA_ARGS__)             \
  M(int, NAME, __VA_ARGS__) M(uint, NAME, __VA_ARGS__)                 \
  M(long, NAME, __VA_ARGS__) M(ulong, NAME, __VA_ARGS__)

EMU_INTEGERS(EMU_BINARY_OF, min, y < x ? y : x)
EMU_INTEGERS(EMU_BINARY_OF, max, x < y ? y : x)
#define EMU_FLOAT_BINARIES                                                     \
  EMU_FLOATS(EMU_BINARY_OF, min, x != x ? y : y < x ? y : x)                   \
  EMU_FLOATS(EMU_BINARY_OF, max, x != x ? y : x < y ? y : x)                   \
  EMU_FLOATS(EMU_BINARY_OF, fmin, x != x ? y : y < x ? y : x)                  \
  EMU_FLOATS(EMU_BINARY_OF, fmax, x != x ? y : x < y ? y : x)                  \
  EMU_FLOATS(EMU_BINARY_OF, pow, decltype(x)(powf(float(x), float(y))))        \
  EMU_FLOATS(EMU_BINARY_OF, powr, decltype(x)(powf(float(x), float(y))))       \
  EMU_FLOATS(EMU_BINARY_OF, fmod, decltype(x)(fmodf(float(x), float(y))))      \
  EMU_FLOATS(EMU_BINARY_OF, atan2, decltype(x)(atan2f(float(x), float(y))))    \
  EMU_FLOATS(EMU_BINARY_OF, divide, x / y)                                     \
  EMU_FLOATS(EMU_BINARY_OF, copysign,                                          \
             decltype(x)(__builtin_copysignf(float(x), float(y))))
EMU_FLOAT_BINARIES
namespace fast { EMU_FLOAT_BINARIES }
namespace precise { EMU_FLOAT_BINARIES }
EMU_BINARY_VECTOR(min)
EMU_BINARY_VECTOR(max)
EMU_BINARY_VECTOR(pow)

#define EMU_ABS(T, NAME, ...) SHIM T NAME(T x) { return x < 0 ? T(-x) : x; }
EMU_INTEGERS(EMU_ABS, abs)
SHIM float abs(float x) { return __builtin_fabsf(x); }
SHIM half abs(half x) { return half(__builtin_fabsf(float(x))); }
SHIM bfloat abs(bfloat x) { return bfloat(__builtin_fabsf(float(x))); }
template <typename T, int N>
SHIM vec<T, N> abs(vec<T, N> x) {
  for (int i = 0; i < N; i++) x[i] = abs(T(x[i]));
  return x;
}

SHIM float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
SHIM half ldexp(half x, int e) { return half(__builtin_ldexpf(float(x), e)); }
SHIM bfloat ldexp(bfloat x, int e) { return bfloat(__builtin_ldexpf(float(x), e)); }
SHIM float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
SHIM half fma(half x, half y, half z) { return half(__builtin_fmaf16(x, y, z)); }
SHIM bfloat fma(bfloat x, bfloat y, bfloat z) {
  return bfloat(__builtin_fmaf(float(x), float(y), float(z)));
}
template <typename T, int N>
SHIM vec<T, N> fma(vec<T, N> x, vec<T, N> y, vec<T, N> z) {
  for (int i = 0; i < N; i++) x[i] = fma(T(x[i]), T(y[i]), T(z[i]));
  return x;
}

#define EMU_CLAMP(T, NAME, ...) \
  SHIM T NAME(T x, T low, T high) { return min(max(x, low), high); }
EMU_INTEGERS(EMU_CLAMP, clamp)
EMU_FLOATS(EMU_CLAMP, clamp)
template <typename T, int N>
SHIM vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) { return min(max(x, low), high); }
SHIM float saturate(float x) { return clamp(x, 0.0f, 1.0f); }
SHIM float mix(float x, float y, float a) { return x + (y - x) * a; }

template <typename T, int N>
SHIM T dot(vec<T, N> x, vec<T, N> y) {
  T sum = x[0] * y[0];
  for (int i = 1; i < N; i++) sum += x[i] * y[i];
  return sum;
}
template <typename T, int N> SHIM T length_squared(vec<T, N> x) { return dot(x, x); }
template <typename T, int N> SHIM T length(vec<T, N> x) { return sqrt(dot(x, x)); }

template <typename T> SHIM T select(T no, T yes, bool choose) { return choose ? yes : no; }
template <typename T, typename U, int N>
SHIM vec<T, N> select(vec<T, N> no, vec<T, N> yes, vec<U, N> choose) {
  for (int i = 0; i < N; i++) no[i] = choose[i] ? yes[i] : no[i];
  return no;
}
template <typename T, int N>
SHIM bool any(vec<T, N> x) {
  bool found = false;
  for (int i = 0; i < N; i++) found = found || x[i];
  return found;
}
template <typename T, int N>
SHIM bool all(vec<T, N> x) {
  bool found = true;
  for (int i = 0; i < N; i++) found = found && x[i];
  return found;
}

#define EMU_PREDICATE(NAME, F) \
  SHIM bool NAME(float x) { return F(x); } \
  SHIM bool NAME(half x) { return F(float(x)); } \
  SHIM bool NAME(bfloat x) { return F(float(x)); }
EMU_PREDICATE(isnan, __builtin_isnan)
EMU_PREDICATE(isinf, __builtin_isinf)
EMU_PREDICATE(isfinite, __builtin_isfinite)
EMU_PREDICATE(signbit, __builtin_signbit)

SHIM uint popcount(uint x) { return __builtin_popcount(x); }
SHIM uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
SHIM uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }

template <typename To, typename From>
SHIM To as_type(From x) { return __builtin_bit_cast(To, x); }
}  // namespace metal
