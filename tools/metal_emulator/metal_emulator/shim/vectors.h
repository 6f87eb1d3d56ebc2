// Vector constructors. OpenCL writes (float4)(a, b), Metal float4(a, b): the names become macros of
// their calls, and `vec<T, N>(` in the text becomes `make_vec<T, N>(`.
#pragma once
#include "types.h"

namespace metal {
template <typename T, int N, typename U>
SHIM void append(thread vec<T, N>& to, thread int& at, U x) {
  to[at++] = T(x);
}
template <typename T, int N, typename U>
SHIM void append(thread vec<T, N>& to, thread int& at, vec<U, 2> x) {
  for (int i = 0; i < 2; i++) to[at++] = T(x[i]);
}
template <typename T, int N, typename U>
SHIM void append(thread vec<T, N>& to, thread int& at, vec<U, 3> x) {
  for (int i = 0; i < 3; i++) to[at++] = T(x[i]);
}
template <typename T, int N, typename U>
SHIM void append(thread vec<T, N>& to, thread int& at, vec<U, 4> x) {
  for (int i = 0; i < 4; i++) to[at++] = T(x[i]);
}

template <typename T, int N, typename... Parts>
SHIM vec<T, N> make_vec(Parts... parts) {
  vec<T, N> made = vec<T, N>(T(0));
  int at = 0;
  (append<T, N>(made, at, parts), ...);
  if (at == 1)
    for (int i = 1; i < N; i++) made[i] = made[0];
  return made;
}
}  // namespace metal

#define EMU_MAKE(T, N) metal::make_vec<T, N>
#define char2(...) EMU_MAKE(char, 2)(__VA_ARGS__)
#define char3(...) EMU_MAKE(char, 3)(__VA_ARGS__)
#define char4(...) EMU_MAKE(char, 4)(__VA_ARGS__)
#define uchar2(...) EMU_MAKE(uchar, 2)(__VA_ARGS__)
#define uchar3(...) EMU_MAKE(uchar, 3)(__VA_ARGS__)
#define uchar4(...) EMU_MAKE(uchar, 4)(__VA_ARGS__)
#define short2(...) EMU_MAKE(short, 2)(__VA_ARGS__)
#define short3(...) EMU_MAKE(short, 3)(__VA_ARGS__)
#define short4(...) EMU_MAKE(short, 4)(__VA_ARGS__)
#define ushort2(...) EMU_MAKE(ushort, 2)(__VA_ARGS__)
#define ushort3(...) EMU_MAKE(ushort, 3)(__VA_ARGS__)
#define ushort4(...) EMU_MAKE(ushort, 4)(__VA_ARGS__)
#define int2(...) EMU_MAKE(int, 2)(__VA_ARGS__)
#define int3(...) EMU_MAKE(int, 3)(__VA_ARGS__)
#define int4(...) EMU_MAKE(int, 4)(__VA_ARGS__)
#define uint2(...) EMU_MAKE(uint, 2)(__VA_ARGS__)
#define uint3(...) EMU_MAKE(uint, 3)(__VA_ARGS__)
#define uint4(...) EMU_MAKE(uint, 4)(__VA_ARGS__)
#define long2(...) EMU_MAKE(long, 2)(__VA_ARGS__)
#define long3(...) EMU_MAKE(long, 3)(__VA_ARGS__)
#define long4(...) EMU_MAKE(long, 4)(__VA_ARGS__)
#define ulong2(...) EMU_MAKE(ulong, 2)(__VA_ARGS__)
#define ulong3(...) EMU_MAKE(ulong, 3)(__VA_ARGS__)
#define ulong4(...) EMU_MAKE(ulong, 4)(__VA_ARGS__)
#define half2(...) EMU_MAKE(half, 2)(__VA_ARGS__)
#define half3(...) EMU_MAKE(half, 3)(__VA_ARGS__)
#define half4(...) EMU_MAKE(half, 4)(__VA_ARGS__)
#define bfloat2(...) EMU_MAKE(bfloat, 2)(__VA_ARGS__)
#define bfloat3(...) EMU_MAKE(bfloat, 3)(__VA_ARGS__)
#define bfloat4(...) EMU_MAKE(bfloat, 4)(__VA_ARGS__)
#define float2(...) EMU_MAKE(float, 2)(__VA_ARGS__)
#define float3(...) EMU_MAKE(float, 3)(__VA_ARGS__)
#define float4(...) EMU_MAKE(float, 4)(__VA_ARGS__)
