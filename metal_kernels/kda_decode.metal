#include "activations.h"
#include "dequantize.h"
#include "norm.h"
#include "reduce.h"
#include "vectors.h"

// A token or a few of a KDA layer, between its input projections and its output projection. The state is
// read and written once for all of them. Of each:
//
//     q | k | v = silu(conv(...))      q, k normalised      alpha = exp(-exp(A_log) softplus(f_b f))
//     S <- S diag(alpha)      S <- S + sigmoid(b) (v - S k) k^T      y = norm(S q) sigmoid(g_b g)
//
//   x             [B * tokens, 3 * H * D + 2 * Rank + H] of any float type: q | k | v, f, g, b
//   taps          [Taps, 3 * H * D] of any float type: the convolution, the present token's last
//   tail          [B, Taps - 1, 3 * H * D] of x's type: q | k | v of the tokens before
//   f_b, g_b      [H * D, Rank] plain of any float type, or quantized: packed in uint
//   f_scales, f_biases, g_scales, g_biases   [H * D, Rank / Group]; unread where Bits is 0
//   A_log         [H], dt_bias [H, D], norm [D] of any float types
//   state         [B, H, D, D] float, as in kda_sequential
//   eps           float, of the norm
//   tokens        int, of a text
//   y             [B * tokens, H * D] of x's type
//   new_tail      like tail; new_state like state: after the last token
// Template: H, D, Rank, Taps, Bits, Group int. D is 32, 64 or 128; Rank is a multiple of 16; Bits is 0, 4
// or 8.
// Grid (4 * D, H, B), threadgroup (4 * D, 1, 1): a threadgroup owns one head of one text. 4
// neighbouring lanes own a row of its state, of f_b and of g_b, a lane every fourth group of 4
// elements; each of the first 3 * D threads owns a channel of the convolution.
constexpr int Lanes = 4;                    // of a row
constexpr int Groups = D / 4 / Lanes;       // of 4 elements of the state, of a lane
constexpr int Channels = 3 * H * D;         // of the convolution
constexpr int Width = Channels + 2 * Rank + H;
constexpr int Simdgroups = 4 * D / 32;

typedef float4 Quad;
threadgroup Quad qkv[3 * D / 4];
threadgroup Quad fg[2 * Rank / 4];
threadgroup Quad decays[D / 4];
threadgroup float partial[Simdgroups];

const int index = thread_position_in_threadgroup.x;
const int head = threadgroup_position_in_grid.y;
const int b = threadgroup_position_in_grid.z;
const int row = index / Lanes;
const int part = index % Lanes;

// The state is loaded first: it comes from memory, and takes longest.
const int place = ((b * H + head) * D + row) * D + 4 * part;
float4 S[Groups];
#pragma unroll
for (int i = 0; i < Groups; ++i) {
  S[i] = load<4>(state + place + 4 * Lanes * i);
}

const int channel = (index / D * H + head) * D + index % D;  // of the convolution, if index < 3 * D
const int before = b * (Taps - 1) * Channels + channel;       // the first of its tail
const int first = b * tokens * Width + channel;               // and of its tokens

for (int t = 0; t < tokens; ++t) {
  const int here = (b * tokens + t) * Width;
  // The convolution, whose window begins in the tail.
  if (index < 3 * D) {
    float sum = float(x[here + channel]) * float(taps[(Taps - 1) * Channels + channel]);
    for (int i = 0; i < Taps - 1; ++i) {
      const int at = t + i - (Taps - 1);
      const float earlier = at < 0 ? float(tail[before + (t + i) * Channels]) : float(x[first + at * Width]);
      sum += earlier * float(taps[i * Channels + channel]);
    }
    ((threadgroup float*)qkv)[index] = sum * sigmoid(sum);
  }
  for (int i = index; i < 2 * Rank; i += 4 * D) {
    ((threadgroup float*)fg)[i] = float(x[here + Channels + i]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // The decay of channel `row`, and the gate of output `row`.
  float4 fading = filled<4>(0), opening = filled<4>(0);
#pragma unroll
  for (int i = 0; i < Rank / 4 / Lanes; ++i) {
    const int group = Lanes * i + part;
    const int at = (head * D + row) * Rank + 4 * group;
    fading += fg[group] * weights_at<FBits, FGroup>(f_b, f_scales, f_biases, at);
    opening += fg[Rank / 4 + group] * weights_at<GBits, GGroup>(g_b, g_scales, g_biases, at);
  }
  const float f = sum_over_four_lanes(fading) + float(dt_bias[head * D + row]);
  const float gate = sigmoid(sum_over_four_lanes(opening));
  if (part == 0) {
    ((threadgroup float*)decays)[row] = exp(-exp(float(A_log[head])) * softplus(f));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // The state decays, S <- S diag(alpha), and kv_mem = S k is what it holds for this key.
  // Keys and queries stay where they are: with the state they would not fit 512 threads' registers.
  const threadgroup Quad* query = qkv;
  const threadgroup Quad* key = qkv + D / 4;
  float4 queries = filled<4>(0), keys = filled<4>(0), products = filled<4>(0);
#pragma unroll
  for (int i = 0; i < Groups; ++i) {
    const int at = Lanes * i + part;
    queries += query[at] * query[at];
    keys += key[at] * key[at];
    S[i] *= decays[at];
    products += S[i] * key[at];
  }
  const float key_scale = inverse_l2(sum_over_four_lanes(keys), 1);
  const float query_scale = inverse_l2(sum_over_four_lanes(queries), D);
  const float kv_mem = key_scale * sum_over_four_lanes(products);

  // The state is corrected towards the value, S <- S + delta k^T, and S q answers the query.
  const float beta = sigmoid(float(x[here + Channels + 2 * Rank + head]));
  const float value = ((threadgroup float*)qkv)[2 * D + row];
  const float delta = key_scale * beta * (value - kv_mem);
  products = filled<4>(0);
#pragma unroll
  for (int i = 0; i < Groups; ++i) {
    const int at = Lanes * i + part;
    S[i] += delta * key[at];
    products += S[i] * query[at];
  }
  const float answer = query_scale * sum_over_four_lanes(products);

  // Normalise the answers of all rows, and gate them.
  const float square = part == 0 ? answer * answer : 0.0f;
  const float squares = sum_over_threadgroup<Simdgroups>(square, index, partial);
  if (part == 0) {
    const float normed = answer * inverse_rms(squares, D, eps) * float(norm[row]);
    put(y + ((b * tokens + t) * H + head) * D + row, normed * gate);
  }
}

#pragma unroll
for (int i = 0; i < Groups; ++i) {
  store<4>(new_state + place + 4 * Lanes * i, S[i]);
}
if (index < 3 * D) {
  for (int i = 0; i < Taps - 1; ++i) {
    const int at = tokens + i - (Taps - 1);
    if (at < 0) {
      new_tail[before + i * Channels] = tail[before + (tokens + i) * Channels];
    } else {
      new_tail[before + i * Channels] = x[first + at * Width];
    }
  }
}
