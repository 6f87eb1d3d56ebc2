#include "matvec.h"
#include "reduce.h"

// What the splits of mla_attend found of a text, merged to one softmax, and from latent space back to a head's
// values:
//
//     y = unembed (sum over splits of e acc / sum of e l),   e = exp(m - largest m)
//
//   acc           [splits, tokens, H, Lora] float
//   m_and_l       [splits, tokens, H, 2] float
//   unembed       [H, V, Lora] plain of any float type, or packed to Bits
//   unembed_scales, unembed_biases   [H, V, Lora / Group]; not read where Bits is 0: plain
//   texts         int: tokens, of a text; B; a number of each text; of each text where its splits begin in the
//                 list that follows, and where the last's end; the list, of places in acc. A text has at most
//                 MostSplits.
//   y             [B * tokens, H * V] of OutT
// Template: OutT; H, Lora, V, Threads, MostSplits, Bits, Group int. V is a multiple of 4, Lora of 8 and
// of Group, Threads of 32.
// Grid (Threads, H, B * tokens), threadgroup (Threads, 1, 1): a threadgroup owns a head of a token. It has
// the latent in common; a simdgroup takes 4 elements of y at a time.
constexpr int Rows = 4;

typedef float4 Quad;
threadgroup float factors[MostSplits];  // e of each split
threadgroup int places[MostSplits];     // of the token's heads in it
threadgroup Quad latent[Lora / 4];

const int index = thread_position_in_threadgroup.x;
const int lane = index % 32;
const int head = threadgroup_position_in_grid.y;
const int b = threadgroup_position_in_grid.z;
const int tokens = texts[0];
const int B = texts[1];
const int text = b / tokens;
const int first = texts[2 + B + text];
const int splits = texts[2 + B + text + 1] - first;

// Each simdgroup weighs the splits for itself.
float m = -INFINITY;
for (int i = lane; i < splits; i += 32) {
  const int place = (texts[3 + 2 * B + first + i] * tokens + b % tokens) * H + head;
  m = max(m, m_and_l[2 * size_t(place)]);
}
m = simd_max(m);
float l = 0;
for (int i = lane; i < splits; i += 32) {
  const int place = (texts[3 + 2 * B + first + i] * tokens + b % tokens) * H + head;
  const float e = exp(m_and_l[2 * size_t(place)] - m);
  l += e * m_and_l[2 * size_t(place) + 1];
  if (index < 32) {
    factors[i] = e;
    places[i] = place;
  }
}
l = simd_sum(l);
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int channel = index; channel < Lora; channel += Threads) {
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < splits; ++i) {
    sum += factors[i] * acc[size_t(places[i]) * Lora + channel];
  }
  ((threadgroup float*)latent)[channel] = sum / l;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int row = index / 32 * Rows; row < V; row += Threads / 32 * Rows) {
  float values[Rows] = {0, 0, 0, 0};
  add_products<Rows>(
      (const threadgroup float*)latent,
      rows_from<Bits, Group>(unembed, unembed_scales, unembed_biases, head * V + row, Lora),
      lane,
      values);
  const float value = sum_of_rows<Rows>(values, lane);
  if (lane < Rows) {
    y[(b * H + head) * V + row + lane] = OutT(value);
  }
}
