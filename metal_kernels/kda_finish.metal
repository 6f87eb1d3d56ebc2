#include "activations.h"
#include "norm.h"
#include "vectors.h"

// The delta rule's outputs, normalised and gated: y = o / sqrt(mean(o^2) + eps) * norm * sigmoid(g).
//
//   o             [N, H, D] float
//   g             [N, H * D] of any float type
//   norm          [D] of any float type
//   eps           float
//   y             [N, H * D] of g's type
// Template: H, D int. D is 64 or 128.
// Grid (32, H, N), any threadgroup (32, n, 1) that divides it: a simdgroup owns a head of one token, a
// lane D / 32 neighbouring channels.
constexpr int Each = D / 32;

const int lane = thread_position_in_grid.x;
const int head = thread_position_in_grid.y;
const size_t at = (size_t(thread_position_in_grid.z) * H + head) * D + Each * lane;

const vec<float, Each> answer = load<Each>(o + at);
const vec<float, Each> gate = load<Each>(g + at);
float square = 0;
#pragma unroll
for (int i = 0; i < Each; ++i) {
  square += answer[i] * answer[i];
}
const float factor = inverse_rms(simd_sum(square), D, eps);
vec<float, Each> result = answer * factor * load<Each>(norm + Each * lane);
#pragma unroll
for (int i = 0; i < Each; ++i) {
  result[i] *= sigmoid(gate[i]);
}
store<Each>(y + at, result);
