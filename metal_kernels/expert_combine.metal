#include "vectors.h"

// What the chosen experts say of each token, weighted and summed in router order, and the shared expert.
//
//   y             [Rows, W] of any float type: outputs of experts, in any order
//   places        [N, TopK] int: where in y the outputs for a token stand, in router order
//   weights       [N, TopK] float
//   shared        [N, W] of y's type; not read where Shared is false
//   combined      [N, W] of y's type
// Template: TopK, W int; Shared bool. W is a multiple of 4.
// Grid (W / 4, N, 1), any threadgroup that divides it: a thread owns 4 neighbours.
const int at = 4 * thread_position_in_grid.x;
const int token = thread_position_in_grid.y;
const size_t here = size_t(token) * W + at;

float4 sum = filled<4>(0);
#pragma unroll
for (int i = 0; i < TopK; ++i) {
  sum += weights[token * TopK + i] * load<4>(y + size_t(places[token * TopK + i]) * W + at);
}
if (Shared) {
  sum += load<4>(shared + here);
}
store<4>(combined + here, sum);
