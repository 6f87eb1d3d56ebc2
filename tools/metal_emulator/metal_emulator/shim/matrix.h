// simdgroup_matrix, 8 by 8: each lane holds two neighbours of a row.
#pragma once
#include "simd.h"

extern "C" {
uint emu_matrix_row();
uint emu_matrix_column();
EMU_TOGETHER void emu_matrix_transfer(uint site);
ulong emu_matrix_load(ulong address, uint size, uint site);
void emu_matrix_store(ulong address, ulong bits, uint size, uint site);
float emu_half_factor(ulong bits);
float emu_bfloat_factor(ulong bits);
EMU_TOGETHER ulong emu_matrix_multiply(float a0, float a1, float b0, float b1, float c0, float c1,
                                       uint site);
}

namespace metal {
template <typename T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has simdgroup matrices of 8 by 8 only");
  typedef vec<T, 2> storage_type;
  storage_type elements;

  SHIM simdgroup_matrix() thread : elements(storage_type(T(NAN))) {}
  SHIM explicit simdgroup_matrix(T diagonal) {
    uint row = emu_matrix_row(), column = emu_matrix_column();
    elements[0] = row == column ? diagonal : T(0);
    elements[1] = row == column + 1 ? diagonal : T(0);
  }
  SHIM thread storage_type& thread_elements() thread { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int C, int R = C>
SHIM simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, C, R> made;
  made.elements = vec<T, 2>(value);
  return made;
}

template <typename T>
SHIM T matrix_read(ulong address, uint site) {
  return from_bits<T>(emu_matrix_load(address, sizeof(T), site));
}
// Where element `i` of this lane lies, in elements.
SHIM ulong matrix_offset(uint i, ulong width, vec<ulong, 2> origin, bool transpose) {
  ulong row = emu_matrix_row(), column = emu_matrix_column() + i;
  return transpose ? (origin.y + column) * width + origin.x + row
                   : (origin.y + row) * width + origin.x + column;
}

#define EMU_TRANSFER(SPACE)                                                                     \
  template <typename T>                                                                         \
  SHIM void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& to, const SPACE T* from,           \
                           ulong width = 8, vec<ulong, 2> origin = vec<ulong, 2>(0),            \
                           bool transpose = false, SITE) {                                      \
    emu_matrix_transfer(site);                                                                  \
    for (uint i = 0; i < 2; i++)                                                                \
      to.elements[i] = matrix_read<T>(                                                          \
          ulong(from + matrix_offset(i, width, origin, transpose)), site);                      \
  }                                                                                             \
  template <typename T>                                                                         \
  SHIM void simdgroup_store(simdgroup_matrix<T, 8, 8> from, SPACE T* to, ulong width = 8,       \
                            vec<ulong, 2> origin = vec<ulong, 2>(0), bool transpose = false,    \
                            SITE) {                                                             \
    emu_matrix_transfer(site);                                                                  \
    for (uint i = 0; i < 2; i++)                                                                \
      emu_matrix_store(ulong(to + matrix_offset(i, width, origin, transpose)),                  \
                       to_bits(T(from.elements[i])), sizeof(T), site);                          \
  }
EMU_TRANSFER(device)
EMU_TRANSFER(threadgroup)
#undef EMU_TRANSFER

// An element as a factor. The matrix units take 16 bits as they are: no conversion is counted.
SHIM float as_factor(float x) { return x; }
SHIM float as_factor(half x) { return emu_half_factor(to_bits(x)); }
SHIM float as_factor(bfloat x) { return emu_bfloat_factor(to_bits(x)); }

template <typename T, typename A, typename B, typename C>
SHIM void simdgroup_multiply_accumulate(thread simdgroup_matrix<T, 8, 8>& d,
                                        simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                                        simdgroup_matrix<C, 8, 8> c, SITE) {
  ulong both = emu_matrix_multiply(as_factor(a.elements[0]), as_factor(a.elements[1]),
                                   as_factor(b.elements[0]), as_factor(b.elements[1]),
                                   c.elements[0], c.elements[1], site);
  d.elements[0] = T(from_bits<float>(both & 0xFFFFFFFFul));
  d.elements[1] = T(from_bits<float>(both >> 32));
}
template <typename T, typename A, typename B>
SHIM void simdgroup_multiply(thread simdgroup_matrix<T, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                             simdgroup_matrix<B, 8, 8> b, SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<T, 8, 8>(T(0)), site);
}
}  // namespace metal
