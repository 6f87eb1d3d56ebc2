#include "matvec.h"
#include "reduce.h"

// What the splits of mla_attend found, merged to one softmax, and from latent space back to a head's values:
//
//     y = unembed (sum over splits of e acc / sum of e l),   e = exp(m - largest m)
//
//   acc           [B, splits, H, Lora] float
//   m_and_l       [B, splits, H, 2] float
//   unembed       [H, V, Lora] plain of any float type, or packed to Bits
//   unembed_scales, unembed_biases   [H, V, Lora / Group]; not read where Bits is 0: plain
//   splits        int, at most MostSplits
//   y             [B, H * V] of OutT
// Template: OutT; H, Lora, V, Threads, MostSplits, Bits, Group int. V is a multiple of 4, Lora of 8 and
// of Group, Threads of 32.
// Grid (Threads, H, B), threadgroup (Threads, 1, 1): a threadgroup owns a head. It has the latent in
// common; a simdgroup takes 4 elements of y at a time.
constexpr int Rows = 4;

typedef float4 Quad;
threadgroup float factors[MostSplits];  // e of each split
threadgroup Quad latent[Lora / 4];

const int index = thread_position_in_threadgroup.x;
const int lane = index % 32;
const int head = threadgroup_position_in_grid.y;
const int b = threadgroup_position_in_grid.z;
const size_t place = size_t(b) * splits * H + head;  // of the head in the first split
const auto m_and_l_of_head = m_and_l + 2 * place;
const auto acc_of_head = acc + place * Lora;

// Each simdgroup weighs the splits for itself.
float m = -INFINITY;
for (int i = lane; i < splits; i += 32) {
  m = max(m, m_and_l_of_head[2 * i * H]);
}
m = simd_max(m);
float l = 0;
for (int i = lane; i < splits; i += 32) {
  const float e = exp(m_and_l_of_head[2 * i * H] - m);
  l += e * m_and_l_of_head[2 * i * H + 1];
  if (index < 32) {
    factors[i] = e;
  }
}
l = simd_sum(l);
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int channel = index; channel < Lora; channel += Threads) {
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < splits; ++i) {
    sum += factors[i] * acc_of_head[i * H * Lora + channel];
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
