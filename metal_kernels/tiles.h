// Matrices as tiles of 8 x 8 floats over the 32 lanes of a simdgroup. A lane's fragment of a tile is
// two neighbours of one row: (tile_row, tile_column) and (tile_row, tile_column + 1).
template <typename T>
using Fragment = vec<T, 2>;
METAL_FUNC int tile_row(int lane) {
  return lane / 16 * 4 + lane / 2 % 4;
}
METAL_FUNC int tile_column(int lane) {
  return lane / 8 % 2 * 4 + lane % 2 * 2;
}
// The lane whose fragment has element (row, column).
METAL_FUNC int tile_lane(int row, int column) {
  return row / 4 * 16 + row % 4 * 2 + column / 4 * 8 + column % 4 / 2;
}

// Where element (row, column) stands in a stored tile. Fragments are stored in the order of the lanes, which
// makes 4 x 4 blocks: a simdgroup reads 64 neighbours.
METAL_FUNC int in_tile(int row, int column) {
  return row / 4 * 32 + column / 4 * 16 + row % 4 * 4 + column % 4;
}
enum { Tile = 64 };  // elements

// The fragment of the transpose. (Shuffled as float: Metal shuffles no bfloat.)
template <typename T>
METAL_FUNC vec<T, 2> transposed(vec<T, 2> elements, int lane) {
  const int row = tile_row(lane), column = tile_column(lane);
  const float x = float(elements[0]), y = float(elements[1]);
  const int upper = tile_lane(column, row), lower = tile_lane(column + 1, row);
  const float2 first = float2(simd_shuffle(x, upper), simd_shuffle(y, upper));
  const float2 second = float2(simd_shuffle(x, lower), simd_shuffle(y, lower));
  return row % 2 == 0 ? vec<T, 2>(T(first.x), T(second.x)) : vec<T, 2>(T(first.y), T(second.y));
}

// The fragment of a matrix as the right factor of `multiply_add`: here as it is. NVIDIA's matrix units take
// right factors in another layout than left ones (cuda_tiles.h).
template <typename T>
METAL_FUNC vec<T, 2> as_right(vec<T, 2> elements) {
  return elements;
}

// The type in which a factor of type T is multiplied by one of type Other: its own, without a conversion, where
// Apple's matrix products are known to take the pair. Products and sums are float in any case.
template <typename T, typename Other>
struct Factor {
  typedef float type;
};
template <typename T>
struct Factor<T, T> {
  typedef T type;
};
template <>
struct Factor<half, float> {
  typedef half type;
};

// c[i] += a[i] b for N tiles of fragments. L and R are the types of the factors, of any float type.
template <int N, typename L, typename R>
METAL_FUNC void multiply_add(const thread vec<L, 2>* a, vec<R, 2> b, thread float2* c) {
  typedef typename Factor<L, R>::type Left;
  typedef typename Factor<R, L>::type Right;
  simdgroup_matrix<Left, 8, 8> A;
  simdgroup_matrix<Right, 8, 8> B;
  simdgroup_float8x8 C;
  B.thread_elements()[0] = Right(b[0]);
  B.thread_elements()[1] = Right(b[1]);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    A.thread_elements()[0] = Left(a[i][0]);
    A.thread_elements()[1] = Left(a[i][1]);
    C.thread_elements()[0] = c[i].x;
    C.thread_elements()[1] = c[i].y;
    simdgroup_multiply_accumulate(C, A, B, C);
    c[i] = float2(C.thread_elements()[0], C.thread_elements()[1]);
  }
}

// c[i] += a0[i] b0 + a1[i] b1 for N tiles: NVIDIA's matrix units take two products at once.
template <int N, typename L, typename R>
METAL_FUNC void multiply_add_two(
    const thread vec<L, 2>* a0,
    const thread vec<L, 2>* a1,
    vec<R, 2> b0,
    vec<R, 2> b1,
    thread float2* c) {
  multiply_add<N, L, R>(a0, b0, c);
  multiply_add<N, L, R>(a1, b1, c);
}

// Where element e of a lane's fragment of a right factor stands: its row, and its column. A matrix of which rows
// are the columns of a factor is read so, without a transposition.
METAL_FUNC int right_row(int lane, int) {
  return tile_row(lane);
}
METAL_FUNC int right_column(int lane, int e) {
  return tile_column(lane) + e;
}
// 4 elements of each of two such rows, of right_column(lane, 0) and right_column(lane, 1). Where those are the same
// (cuda_tiles.h) the second 4 follow the first.
template <typename T>
METAL_FUNC void fetch_right(
    thread vec<T, 4>& first, thread vec<T, 4>& second, const device T* first_row, const device T* second_row) {
  first = *(const device vec<T, 4>*)first_row;
  second = *(const device vec<T, 4>*)second_row;
}

// The type that a number made of a code takes as a left factor, beside a right factor of type T: not rounded.
template <typename T>
struct Decoded {
  typedef float type;
};

// The maximum and the sum over the 8 lanes that hold the same column of a tile.
METAL_FUNC float max_over_rows(float x) {
  x = max(x, simd_shuffle_xor(x, 2));
  x = max(x, simd_shuffle_xor(x, 4));
  return max(x, simd_shuffle_xor(x, 16));
}
METAL_FUNC float sum_over_rows(float x) {
  x += simd_shuffle_xor(x, 2);
  x += simd_shuffle_xor(x, 4);
  return x + simd_shuffle_xor(x, 16);
}
// The sum over the 4 lanes that hold the same row of a tile.
METAL_FUNC float sum_over_columns(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}
