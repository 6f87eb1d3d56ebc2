// tiles.h for NVIDIA GPUs, in the layout of their matrix units: lane 4 g + t holds the elements (g, 2 t) and
// (g, 2 t + 1) of a tile. `as_right`, `multiply_add` and `multiply_add_two` are cuda.h's.
template <typename T>
using Fragment = vec<T, 2>;
METAL_FUNC int tile_row(int lane) { return lane / 4; }
METAL_FUNC int tile_column(int lane) { return lane % 4 * 2; }
METAL_FUNC int tile_lane(int row, int column) { return row * 4 + column / 2; }
METAL_FUNC int in_tile(int row, int column) { return row * 8 + column; }
enum { Tile = 64 };  // elements

template <typename T>
METAL_FUNC vec<T, 2> transposed(vec<T, 2> elements, int) { return as_right<T>(elements); }

METAL_FUNC int right_row(int lane, int e) { return tile_column(lane) + e; }
METAL_FUNC int right_column(int lane, int) { return tile_row(lane); }
template <typename T>
METAL_FUNC void fetch_right(vec<T, 4>& first, vec<T, 4>& second, const T* first_row, const T*) {
  struct alignas(16) Both {
    vec<T, 4> first, second;
  };
  const Both both = *(const Both*)first_row;
  first = both.first;
  second = both.second;
}

// Matrix units take both factors in one type.
template <typename T>
struct Decoded {
  typedef T type;
};

METAL_FUNC float max_over_rows(float x) {
  x = max(x, simd_shuffle_xor(x, 4));
  x = max(x, simd_shuffle_xor(x, 8));
  return max(x, simd_shuffle_xor(x, 16));
}
METAL_FUNC float sum_over_rows(float x) {
  x += simd_shuffle_xor(x, 4);
  x += simd_shuffle_xor(x, 8);
  return x + simd_shuffle_xor(x, 16);
}
METAL_FUNC float sum_over_columns(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 2);
}
