#include "activations.h"
#include "norm.h"
#include "vectors.h"

// What the delta rule is given for many tokens, made of a layer's input projections:
//
//     q | k | v = silu(convolution)      q <- q / |q| / sqrt(D)      k <- k / |k|
//     alpha = exp(-exp(A_log) softplus(f + dt_bias))      beta = sigmoid(b)
//
//   x             [B, T, Width] of any float type: q | k | v, others, and last b of each head
//   f             [B, T, H * D] of any float type
//   taps          [Taps, 3 * H * D] of any float type: the convolution, the present token's last
//   tail          [B, Taps - 1, 3 * H * D] of x's type: q | k | v of the tokens before
//   lengths       [B] int: how many tokens of a row are valid; the others are padding. Not Padded: not read
//   A_log         [H], dt_bias [H, D] of any float types
//   T             int
//   q, k, v       [B, T, H, D] of x's type
//   alpha         [B, T, H, D] float, 1 for padding
//   beta          [B, T, H] float, 0 for padding
//   new_tail      like tail: q | k | v of the last valid tokens
// Template: H, D, Width, Taps, Run int; Padded bool. D is 64 or 128; Width is a multiple of D / 32.
// Grid (32, 4 * H, B * ceil(T / Run)), any threadgroup (32, n, 1) that divides it: a simdgroup owns q, k,
// v or the gate of one head, for Run tokens; a lane D / 32 neighbouring channels.
constexpr int N = D / 32;
constexpr int Channels = 3 * H * D;  // of the convolution

const int lane = thread_position_in_grid.x;
const int what = thread_position_in_grid.y / H;  // q, k, v, gate
const int head = thread_position_in_grid.y % H;
const int runs = (T + Run - 1) / Run;
const int b = thread_position_in_grid.z / runs;
const int begin = thread_position_in_grid.z % runs * Run;
const int end = min(begin + Run, T);
const int length = Padded ? int(lengths[b]) : T;
const int first = head * D + N * lane;  // the lane's first channel of what it makes

// Of this run's first token, in the arrays over tokens; the next ones are 32 bits away.
const size_t token = size_t(b) * T + begin;
const size_t here = token * (H * D) + first;

if (what == 3) {
  const float rate = exp(float(A_log[head]));
  const vec<float, N> bias = load<N>(dt_bias + first);
  const auto f_here = f + here;
  const auto b_here = x + token * Width + (Width - H + head);
  const auto alpha_here = alpha + here;
  const auto beta_here = beta + token * H + head;
  for (int t = begin; t < end; ++t) {
    const int i = t - begin;
    vec<float, N> fading = load<N>(f_here + i * H * D) + bias;
#pragma unroll
    for (int c = 0; c < N; ++c) {
      fading[c] = t < length ? exp(-rate * softplus(fading[c])) : 1.0f;
    }
    store<N>(alpha_here + i * H * D, fading);
    if (lane == 0) {
      const float own_beta = sigmoid(float(b_here[i * Width]));
      beta_here[i * H] = t < length ? own_beta : 0.0f;
    }
  }
} else {
  const int channel = what * H * D + first;
  const auto x_here = x + token * Width + channel;

  // The last tokens, each in the place of its number modulo Taps, counted from the oldest: so none moves. Its
  // places are constants, since the loop over as many tokens is unrolled.
  vec<float, N> window[Taps];
#pragma unroll
  for (int i = 0; i < Taps - 1; ++i) {
    const int t = begin + i - (Taps - 1);
    window[i] = t < 0 ? load<N>(tail + (b * (Taps - 1) + t + Taps - 1) * Channels + channel)
                      : load<N>(x_here + (t - begin) * Width);
  }
  for (int round = begin; round < end; round += Taps) {
#pragma unroll
    for (int oldest = 0; oldest < Taps; ++oldest) {
      const int t = round + oldest;
      if (t < end) {
        window[(oldest + Taps - 1) % Taps] = load<N>(x_here + (t - begin) * Width);
        vec<float, N> sum = filled<N>(0);
#pragma unroll
        for (int i = 0; i < Taps; ++i) {
          sum += window[(oldest + i) % Taps] * load<N>(taps + i * Channels + channel);
        }
        float square = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sum[i] *= sigmoid(sum[i]);
          square += sum[i] * sum[i];
        }
        const float squares = simd_sum(square);
        const size_t to = here + (t - begin) * (H * D);
        if (what == 0) {
          store<N>(q + to, sum * inverse_l2(squares, D));
        } else if (what == 1) {
          store<N>(k + to, sum * inverse_l2(squares, 1));
        } else {
          store<N>(v + to, sum);
        }
      }
    }
  }

  if (begin == 0) {
    for (int i = 0; i < Taps - 1; ++i) {
      const int t = length + i - (Taps - 1);
      const auto from = t < 0 ? tail + (b * (Taps - 1) + t + Taps - 1) * Channels + channel
                              : x + (size_t(b) * T + t) * Width + channel;
      store<N>(new_tail + (b * (Taps - 1) + i) * Channels + channel, load<N>(from));
    }
  }
}
