#include "matvec.h"
#include "norm.h"
#include "reduce.h"

// The residual stream takes up a layer's output, is normalised, and scores the experts:
//
//     sum = x + part      normed = sum / sqrt(mean(sum^2) + eps) * weight      logits = gate normed
//
//   x, part       [B, W] of any float types
//   weight        [W] of any float type
//   eps           float
//   gate          [E, W], plain of any float type or packed to Bits
//   gate_scales, gate_biases   [E, W / Group]; not read where Bits is 0: plain
//   sum, normed   [B, W] of OutT
//   logits        [B, E] float: of normed as it is kept, whatever its type
// Template: OutT; E, W, Experts, Bits, Group int. W is a multiple of 8 and of Group.
// Grid (32 * Experts, ceil(E / Experts), B), threadgroup (32 * Experts, 1, 1): a threadgroup normalises the
// whole row for itself, and a simdgroup of it owns an expert. The first one writes sum and normed.
constexpr int Threads = 32 * Experts;
constexpr int Owned = (W + Threads - 1) / Threads;

typedef float4 Quad;
threadgroup float partial[Experts];
threadgroup Quad row[W / 4];

const int index = thread_position_in_threadgroup.x;
const int lane = index % 32;
const int expert = threadgroup_position_in_grid.y * Experts + index / 32;
const int b = threadgroup_position_in_grid.z;

// The norm is that of the sum as it is stored: rounded.
float kept[Owned];
float square = 0;
#pragma unroll
for (int i = 0; i < Owned; ++i) {
  const int at = index + i * Threads;
  kept[i] = 0;
  if (at < W) {
    const OutT rounded = OutT(float(x[b * W + at]) + float(part[b * W + at]));
    kept[i] = float(rounded);
    square += kept[i] * kept[i];
    if (expert < Experts) {
      sum[b * W + at] = rounded;
    }
  }
}
const float squares = sum_over_threadgroup<Experts>(square, index, partial);
const float factor = inverse_rms(squares, W, eps);
#pragma unroll
for (int i = 0; i < Owned; ++i) {
  const int at = index + i * Threads;
  if (at < W) {
    const OutT rounded = OutT(kept[i] * factor * float(weight[at]));
    ((threadgroup float*)row)[at] = float(rounded);
    if (expert < Experts) {
      normed[b * W + at] = rounded;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (expert < E) {
  float products[1] = {0};
  add_products<1>(
      (const threadgroup float*)row,
      rows_from<Bits, Group>(gate, gate_scales, gate_biases, expert, W),
      lane,
      products);
  const float logit = simd_sum(products[0]);
  if (lane == 0) {
    logits[b * E + expert] = logit;
  }
}
