// Metal's language in CUDA's, as far as kernels here go: types, mathematics, simdgroups of 32 lanes,
// threadgroup memory. A kernel's Metal text follows, between `namespace msl {` and `}`; in there the
// names below hide CUDA's own.
//
// Simdgroups must be whole, and every thread of a threadgroup must exist. An 8 x 8 product takes and
// gives Apple's layout, by shuffles; kernels whose tiles are those of tiles.h have this GPU's own, which
// cuda_tiles.h brings.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define device
#define constant
#define thread
#define threadgroup
#define METAL_FUNC __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

namespace msl {
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;

// 16 bits that compute as float: `half * float` is float, `half * half` rounds once.
struct half {
  __half bits;
  half() = default;
  half(float x) : bits(__float2half_rn(x)) {}
  operator float() const { return __half2float(bits); }
};
struct bfloat {
  __nv_bfloat16 bits;
  bfloat() = default;
  explicit bfloat(float x) : bits(__float2bfloat16_rn(x)) {}
  operator float() const { return __bfloat162float(bits); }
};
typedef half float16_t;
typedef bfloat bfloat16_t;

template <typename T> struct is_narrow { static constexpr bool value = false; };
template <> struct is_narrow<half> { static constexpr bool value = true; };
template <> struct is_narrow<bfloat> { static constexpr bool value = true; };
template <bool, typename T> struct only_if {};
template <typename T> struct only_if<true, T> { typedef T type; };

#define MSL_NARROW(OP)                                                \
  template <typename T>                                               \
  typename only_if<is_narrow<T>::value, T>::type operator OP(T x, T y) { \
    return T(float(x) OP float(y));                                   \
  }
MSL_NARROW(+)
MSL_NARROW(-)
MSL_NARROW(*)
MSL_NARROW(/)
#undef MSL_NARROW

template <typename T, int N> struct vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  explicit vec(T all) : x(all), y(all) {}
  vec(T x, T y) : x(x), y(y) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  explicit vec(T all) : x(all), y(all), z(all) {}
  vec(T x, T y, T z) : x(x), y(y), z(z) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  explicit vec(T all) : x(all), y(all), z(all), w(all) {}
  vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};

// The scalar of `vec * scalar` is converted, so that it takes no part in finding T.
template <typename T> struct as_it_is { typedef T type; };
#define MSL_OPERATOR(OP)                                                             \
  template <typename T, int N>                                                       \
  vec<T, N>& operator OP##=(vec<T, N>& x, vec<T, N> y) {                             \
    for (int i = 0; i < N; ++i) x[i] = x[i] OP y[i];                                 \
    return x;                                                                        \
  }                                                                                  \
  template <typename T, int N>                                                       \
  vec<T, N>& operator OP##=(vec<T, N>& x, typename as_it_is<T>::type y) {            \
    for (int i = 0; i < N; ++i) x[i] = x[i] OP y;                                    \
    return x;                                                                        \
  }                                                                                  \
  template <typename T, int N>                                                       \
  vec<T, N> operator OP(vec<T, N> x, vec<T, N> y) { return x OP##= y; }              \
  template <typename T, int N>                                                       \
  vec<T, N> operator OP(vec<T, N> x, typename as_it_is<T>::type y) { return x OP##= y; } \
  template <typename T, int N>                                                       \
  vec<T, N> operator OP(typename as_it_is<T>::type x, vec<T, N> y) {                 \
    for (int i = 0; i < N; ++i) y[i] = x OP y[i];                                    \
    return y;                                                                        \
  }
MSL_OPERATOR(+)
MSL_OPERATOR(-)
MSL_OPERATOR(*)
MSL_OPERATOR(/)
#undef MSL_OPERATOR

#define MSL_VECTORS(T)     \
  typedef vec<T, 2> T##2;  \
  typedef vec<T, 3> T##3;  \
  typedef vec<T, 4> T##4;
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
MSL_VECTORS(double)
#undef MSL_VECTORS

inline half2 operator-(half2 x, half2 y) {
  const __half2 difference = __hsub2((const __half2&)x, (const __half2&)y);
  return (const half2&)difference;
}

template <typename To, typename From>
inline To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits as another type");
  To y;  // (through a reference, the compiler may read it before x is there)
  memcpy(&y, &x, sizeof(To));
  return y;
}

namespace metal {
inline float exp(float x) { return ::expf(x); }
inline float exp2(float x) { return ::exp2f(x); }
inline float log(float x) { return ::logf(x); }
inline float log2(float x) { return ::log2f(x); }
inline float sqrt(float x) { return ::sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / ::sqrtf(x); }
inline float floor(float x) { return ::floorf(x); }
inline float fabs(float x) { return ::fabsf(x); }
inline float abs(float x) { return ::fabsf(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline float fma(float x, float y, float z) { return ::fmaf(x, y, z); }
inline bool isnan(float x) { return x != x; }

// Overloads, not templates: max(float, int) is ambiguous, as in Metal.
#define MSL_ORDER(T)                                    \
  inline T min(T x, T y) { return y < x ? y : x; }      \
  inline T max(T x, T y) { return x < y ? y : x; }      \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
MSL_ORDER(int)
MSL_ORDER(uint)
MSL_ORDER(float)
#undef MSL_ORDER

template <typename T, int N>
T dot(vec<T, N> x, vec<T, N> y) {
  T sum = x[0] * y[0];
  for (int i = 1; i < N; ++i) sum += x[i] * y[i];
  return sum;
}
template <typename T>
T select(T no, T yes, bool choose) { return choose ? yes : no; }

enum mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

template <typename T>
T simd_shuffle(T x, ushort from) { return __shfl_sync(0xffffffffu, x, from); }
template <typename T>
T simd_broadcast(T x, ushort from) { return __shfl_sync(0xffffffffu, x, from); }
template <typename T>
T simd_shuffle_xor(T x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Neighbours first, so that sums have the same order of additions in every lane and on every GPU.
#define MSL_REDUCTION(NAME, F)                                           \
  template <typename T>                                                  \
  T NAME(T x) {                                                          \
    for (int mask = 1; mask < 32; mask *= 2) {                           \
      const T y = simd_shuffle_xor(x, mask);                             \
      x = F;                                                             \
    }                                                                    \
    return x;                                                            \
  }
MSL_REDUCTION(simd_sum, x + y)
MSL_REDUCTION(simd_min, min(x, y))
MSL_REDUCTION(simd_max, max(x, y))
#undef MSL_REDUCTION

template <typename T>
T simd_prefix_exclusive_sum(T x) {
  T sum = x;
  for (int width = 1; width < 32; width *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, sum, width);
    sum = lane() < width ? sum : sum + before;
  }
  return sum - x;
}

template <typename T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has simdgroup matrices of 8 by 8 only");
  vec<T, 2> elements;
  vec<T, 2>& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

// Of a tile, lane 4 g + t holds the elements (g, 2 t) and (g, 2 t + 1): of left factors and of sums. Of a
// right factor it holds (2 t, g) and (2 t + 1, g).
template <typename T> vec<T, 2> as_right(vec<T, 2> x);
template <>
inline float2 as_right<float>(float2 x) {
  const int g = lane() / 4, t = lane() % 4;
  const int even_row = 8 * t + g / 2, odd_row = even_row + 4;
  const float2 even(simd_shuffle(x.x, even_row), simd_shuffle(x.y, even_row));
  const float2 odd(simd_shuffle(x.x, odd_row), simd_shuffle(x.y, odd_row));
  return float2(g % 2 ? even.y : even.x, g % 2 ? odd.y : odd.x);
}

#if __CUDA_ARCH__ >= 800
template <typename T>
inline vec<T, 2> as_right(vec<T, 2> x) {
  static_assert(is_narrow<T>::value, "the unit that transposes has elements of 16 bits");
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"((uint&)x));
  return x;
}

// Matrix units read 11 bits of a float's 24: two parts have 23 of them. Elements of 16 bits are one part.
struct Parts {
  uint upper, lower;
};
inline Parts parts(float x) {
  const uint upper = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  return {upper, __float_as_uint(x - __uint_as_float(upper))};
}
inline Parts parts(half x) { return {__float_as_uint(float(x)), 0}; }
inline Parts parts(bfloat x) { return {__float_as_uint(float(x)), 0}; }
// 16 rows: those of two tiles. Columns of the left factor and rows of the right one are in the order 0, 2, 4,
// 6, 1, 3, 5, 7, so that a lane has those it brings.
inline void add_parts(thread float4& sum, uint2 a0, uint2 a1, uint2 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %6, %5, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
      : "r"(a0.x), "r"(a0.y), "r"(a1.x), "r"(a1.y), "r"(b.x), "r"(b.y));
}

// c0 += a0 b and c1 += a1 b. What is left out, the product of both lower parts, is up to 2^-22 of it.
template <typename L, typename R>
inline void add_products(vec<L, 2> a0, vec<L, 2> a1, vec<R, 2> b, thread float2& c0, thread float2& c1) {
  const Parts a0x = parts(a0.x), a0y = parts(a0.y), a1x = parts(a1.x), a1y = parts(a1.y);
  const Parts bx = parts(b.x), by = parts(b.y);
  const uint2 top(a0x.upper, a0y.upper), bottom(a1x.upper, a1y.upper), right(bx.upper, by.upper);
  float4 sum(0, 0, 0, 0);
  if (!is_narrow<L>::value) {
    add_parts(sum, uint2(a0x.lower, a0y.lower), uint2(a1x.lower, a1y.lower), right);
  }
  if (!is_narrow<R>::value) {
    add_parts(sum, top, bottom, uint2(bx.lower, by.lower));
  }
  add_parts(sum, top, bottom, right);
  c0 += float2(sum.x, sum.y);  // (This addition rounds; those of the units cut off.)
  c1 += float2(sum.z, sum.w);
}
// Factors of 16 bits as they are. What the units cut off from the sums is little beside their roundings.
#define MSL_PRODUCTS(T, TYPE)                                                                       \
  inline void add_products(                                                                         \
      vec<T, 2> a0, vec<T, 2> a1, vec<T, 2> b, thread float2& c0, thread float2& c1) {              \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5}, "   \
        "{%6}, {%0, %1, %2, %3};"                                                                   \
        : "+f"(c0.x), "+f"(c0.y), "+f"(c1.x), "+f"(c1.y)                                            \
        : "r"((uint&)a0), "r"((uint&)a1), "r"((uint&)b));                                           \
  }
MSL_PRODUCTS(half, "f16")
MSL_PRODUCTS(bfloat, "bf16")
#undef MSL_PRODUCTS
// The same with two left and two right factors, of columns and rows 0 to 7 and 8 to 15.
#define MSL_PRODUCTS(T, TYPE)                                                                       \
  inline void add_two_products(                                                                     \
      vec<T, 2> a00, vec<T, 2> a10, vec<T, 2> a01, vec<T, 2> a11, vec<T, 2> b0, vec<T, 2> b1,       \
      thread float2& c0, thread float2& c1) {                                                       \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, "            \
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                             \
        : "+f"(c0.x), "+f"(c0.y), "+f"(c1.x), "+f"(c1.y)                                            \
        : "r"((uint&)a00), "r"((uint&)a10), "r"((uint&)a01), "r"((uint&)a11), "r"((uint&)b0),       \
          "r"((uint&)b1));                                                                          \
  }
MSL_PRODUCTS(half, "f16")
MSL_PRODUCTS(bfloat, "bf16")
#undef MSL_PRODUCTS
template <typename L, typename R>
inline void add_two_products(
    vec<L, 2> a00, vec<L, 2> a10, vec<L, 2> a01, vec<L, 2> a11, vec<R, 2> b0, vec<R, 2> b1,
    thread float2& c0, thread float2& c1) {
  add_products(a00, a10, b0, c0, c1);
  add_products(a01, a11, b1, c0, c1);
}

// c[i] += a[i] b, two tiles at a time.
template <int N, typename L, typename R>
inline void multiply_add(const vec<L, 2>* a, vec<R, 2> b, float2* c) {
#pragma unroll
  for (int i = 0; i + 1 < N; i += 2) {
    add_products(a[i], a[i + 1], b, c[i], c[i + 1]);
  }
  if (N % 2) {
    float2 none(0, 0);
    add_products(a[N - 1], vec<L, 2>(L(0.0f)), b, c[N - 1], none);
  }
}
// c[i] += a0[i] b0 + a1[i] b1; N is even.
template <int N, typename L, typename R>
inline void multiply_add_two(
    const vec<L, 2>* a0, const vec<L, 2>* a1, vec<R, 2> b0, vec<R, 2> b1, float2* c) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    add_two_products(a0[i], a0[i + 1], a1[i], a1[i + 1], b0, b1, c[i], c[i + 1]);
  }
}
#else
// By shuffles: a lane needs all of its row of a, and two columns of b.
template <typename T>
inline vec<T, 2> as_right(vec<T, 2> x) {
  const float2 right = as_right<float>(float2(float(x.x), float(x.y)));
  return vec<T, 2>(T(right.x), T(right.y));
}
template <int N, typename L, typename R>
inline void multiply_add(const vec<L, 2>* a, vec<R, 2> b, float2* c) {
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float2 right(
        simd_shuffle(float(b[k % 2]), 8 * t + k / 2), simd_shuffle(float(b[k % 2]), 8 * t + 4 + k / 2));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      c[i] += simd_shuffle(float(a[i][k % 2]), 4 * g + k / 2) * right;
    }
  }
}
template <int N, typename L, typename R>
inline void multiply_add_two(
    const vec<L, 2>* a0, const vec<L, 2>* a1, vec<R, 2> b0, vec<R, 2> b1, float2* c) {
  multiply_add<N, L, R>(a0, b0, c);
  multiply_add<N, L, R>(a1, b1, c);
}
#endif

// Apple's lanes hold elements (row, column) and (row, column + 1), with row = l / 16 * 4 + l / 2 % 4 and
// column = l / 8 % 2 * 4 + l % 2 * 2.
inline float2 from_apple(float2 x) {
  const int g = lane() / 4, t = lane() % 4;
  const int from = g / 4 * 16 + t / 2 * 8 + g % 4 * 2 + t % 2;
  return float2(simd_shuffle(x.x, from), simd_shuffle(x.y, from));
}
inline float2 to_apple(float2 x) {
  const int row = lane() / 16 * 4 + lane() / 2 % 4, pair = lane() / 8 % 2 * 2 + lane() % 2;
  return float2(simd_shuffle(x.x, 4 * row + pair), simd_shuffle(x.y, 4 * row + pair));
}

inline void simdgroup_multiply_accumulate(
    simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, simdgroup_float8x8 c) {
  const float2 left = from_apple(a.elements);
  float2 sum(0, 0);
  multiply_add<1, float, float>(&left, as_right<float>(from_apple(b.elements)), &sum);
  d.elements = c.elements + to_apple(sum);
}

// Where a thread is, by the names that a kernel's text asks for.
namespace place {
inline uint3 of(dim3 x) { return uint3(x.x, x.y, x.z); }
inline uint3 threads_per_threadgroup() { return of(blockDim); }
inline uint3 threadgroups_per_grid() { return of(gridDim); }
inline uint3 threads_per_grid() {
  return uint3(gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z);
}
inline uint3 thread_position_in_threadgroup() { return uint3(threadIdx.x, threadIdx.y, threadIdx.z); }
inline uint3 threadgroup_position_in_grid() { return uint3(blockIdx.x, blockIdx.y, blockIdx.z); }
inline uint3 thread_position_in_grid() {
  return uint3(
      blockIdx.x * blockDim.x + threadIdx.x,
      blockIdx.y * blockDim.y + threadIdx.y,
      blockIdx.z * blockDim.z + threadIdx.z);
}
inline uint thread_index_in_threadgroup() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
inline uint thread_index_in_simdgroup() { return lane(); }
inline uint simdgroup_index_in_threadgroup() { return thread_index_in_threadgroup() / 32; }
inline uint simdgroups_per_threadgroup() { return blockDim.x * blockDim.y * blockDim.z / 32; }
inline uint threads_per_simdgroup() { return 32; }
inline uint thread_execution_width() { return 32; }
}  // namespace place
}  // namespace metal
using namespace metal;
}  // namespace msl
