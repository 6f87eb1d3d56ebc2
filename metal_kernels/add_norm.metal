#include "norm.h"
#include "reduce.h"

// The residual stream takes up a layer's output, and is normalised for the layer that follows:
//
//     sum = x + part      normed = sum / sqrt(mean(sum^2) + eps) * weight
//
//   x, part       [N, W] of any float types
//   weight        [W] of any float type
//   eps           float
//   sum, normed   [N, W] of OutT
// Template: OutT; W, Threads int. Threads is a multiple of 32.
// Grid (Threads, N, 1), threadgroup (Threads, 1, 1): a threadgroup owns a row, a thread every
// Threads-th of its elements.
constexpr int Owned = (W + Threads - 1) / Threads;

threadgroup float partial[Threads / 32];

const int index = thread_position_in_threadgroup.x;
const size_t start = size_t(threadgroup_position_in_grid.y) * W;
const auto x_row = x + start;
const auto part_row = part + start;
const auto sum_row = sum + start;
const auto normed_row = normed + start;

// The norm is that of the sum as it is stored: rounded.
float kept[Owned];
float square = 0;
#pragma unroll
for (int i = 0; i < Owned; ++i) {
  const int at = index + i * Threads;
  kept[i] = 0;
  if (at < W) {
    const OutT rounded = OutT(float(x_row[at]) + float(part_row[at]));
    sum_row[at] = rounded;
    kept[i] = float(rounded);
    square += kept[i] * kept[i];
  }
}
const float squares = sum_over_threadgroup<Threads / 32>(square, index, partial);
const float factor = inverse_rms(squares, W, eps);
#pragma unroll
for (int i = 0; i < Owned; ++i) {
  const int at = index + i * Threads;
  if (at < W) {
    normed_row[at] = OutT(kept[i] * factor * float(weight[at]));
  }
}
