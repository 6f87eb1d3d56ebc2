#include "expert_walk.h"
#include "matrix_rows.h"
#include "tiles.h"

// Products of the tokens of one expert with its matrices, a tile of up to 32 tokens at a time. A matrix is the left
// factor, [its rows, columns], and decoded in registers; tokens are the right one, [columns, tokens].
//
// 64 columns are 8 tiles. A lane takes 16 neighbours of them in each of its rows of a matrix, as two eights: its
// fragment of tile i of an eight, i < 4, has neighbours i and i + 4, in the pairs that codes are decoded in. In the
// right factor element (r, token) of that tile is then column 16 (r / 2) + 4 (r % 2) + i, and 8 more in the other.
constexpr constant int ColumnStep = 64;

// ----------------------------------------------------------------------------------------- the factors
// A run of 16 neighbouring elements of one row, as they are stored, and the type that they multiply in.
template <int Bits, int Group, typename W, typename S, typename Right>
struct RowRun {
  typedef typename Decoded<Right>::type Factor;
  uint stored[2];
  S scale, bias;
};
template <int Group, typename W, typename S, typename Right>
struct RowRun<0, Group, W, S, Right> {
  typedef W Factor;
  vec<W, 4> low, high;
};
// One of such rows.
template <typename Right, int Bits, int Group, typename W, typename S>
METAL_FUNC RowRun<Bits, Group, W, S, Right> run_of(thread const MatrixRows<Bits, Group, W, S>&) {
  return {};
}

// Reads what is needed for eight 0, then eight 1, of the 16 elements from `column` on.
template <int Bits, int Group, typename W, typename S, typename Right>
METAL_FUNC void read_eight(
    thread RowRun<Bits, Group, W, S, Right>& to,
    thread const MatrixRows<Bits, Group, W, S>& rows,
    int row,
    int column,
    int eight) {
  load_run<Bits>(rows.weight + row * rows.row_size() + column / 8 * Bits, eight, to.stored);
  if (eight == 0) {
    const int group = rows.group_of(row, column);
    to.scale = rows.scales[group];
    if (IsAffine<S>::value) {
      to.bias = rows.biases[group];
    }
  }
}
template <int Group, typename W, typename S, typename Right>
METAL_FUNC void read_eight(
    thread RowRun<0, Group, W, S, Right>& to,
    thread const MatrixRows<0, Group, W, S>& rows,
    int row,
    int column,
    int eight) {
  const device W* from = rows.weight + row * rows.K + column + 8 * eight;
  to.low = fetch<4>(from);
  to.high = fetch<4>(from + 4);
}

// Elements i and i + 4 of an eight.
template <int Bits, int Group, typename W, typename S, typename Right>
METAL_FUNC vec<typename Decoded<Right>::type, 2> pair_of(
    thread const RowRun<Bits, Group, W, S, Right>& run, int eight, int i) {
  typedef typename Decoded<Right>::type Factor;
  constexpr bool Affine = IsAffine<S>::value;
  uint words[2] = {0, 0};
  words_of_run<Bits>(run.stored, eight, words);
  const half2 codes = codes_of<Bits, Affine>(words, i);
  const float factor = scale_of<Bits, Group>(run.scale) * unit_of<Bits, Affine>(i);
  const float origin = Affine ? float(run.bias) : 0.0f;
  const float first = fma(float(codes[0]), factor, origin), second = fma(float(codes[1]), factor, origin);
  return vec<Factor, 2>(Factor(first), Factor(second));
}
template <int Group, typename W, typename S, typename Right>
METAL_FUNC vec<W, 2> pair_of(thread const RowRun<0, Group, W, S, Right>& run, int, int i) {
  return vec<W, 2>(run.low[i], run.high[i]);
}

// A lane's elements of 8 tokens, of one eight of columns.
template <typename X>
struct TokenRun {
  vec<X, 4> first, second;
};
template <typename X>
METAL_FUNC vec<X, 2> pair_of(thread const TokenRun<X>& run, int i) {
  return vec<X, 2>(run.first[i], run.second[i]);
}

// Where a lane's elements of tokens at `first` and `second` begin: offsets in an array.
struct TokenPlace {
  int first, second;
};
METAL_FUNC TokenPlace token_place(int first, int second, int lane) {
  const int r0 = right_row(lane, 0), r1 = right_row(lane, 1);
  return {first + r0 / 2 * 16 + r0 % 2 * 4, second + r1 / 2 * 16 + r1 % 2 * 4};
}

// ------------------------------------------------------------------------------------------ the product
// sums[n][i] += rows 8 i to 8 i + 7 of a matrix times tokens 8 n to 8 n + 7, over one eight of each lane's columns.
template <int N, int TokenTiles, typename Right, typename Run>
METAL_FUNC void add_eight(
    const thread Run* rows,
    int eight,
    const thread TokenRun<Right>* tokens,
    int live,
    thread Fragment<float> (*sums)[N]) {
  typedef typename Run::Factor Left;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    Fragment<Left> first[N], second[N];
#pragma unroll
    for (int r = 0; r < N; ++r) {
      first[r] = pair_of(rows[r], eight, i);
      second[r] = pair_of(rows[r], eight, i + 1);
    }
#pragma unroll
    for (int n = 0; n < TokenTiles; ++n) {
      if (n < live) {
        multiply_add_two<N, Left, Right>(
            first, second, pair_of(tokens[n], i), pair_of(tokens[n], i + 1), sums[n]);
      }
    }
  }
}

template <int TokenTiles, typename X>
METAL_FUNC void read_tokens(
    thread TokenRun<X>* to, const device X* from, const thread TokenPlace* places, int column, int live) {
#pragma unroll
  for (int n = 0; n < TokenTiles; ++n) {
    if (n < live) {
      fetch_right(to[n].first, to[n].second, from + places[n].first + column, from + places[n].second + column);
    }
  }
}

template <int N, int TokenTiles>
METAL_FUNC void clear(thread Fragment<float> (*sums)[N]) {
#pragma unroll
  for (int n = 0; n < TokenTiles; ++n) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[n][i] = filled<2>(0);
    }
  }
}
