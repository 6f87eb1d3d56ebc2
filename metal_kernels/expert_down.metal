#include "matvec.h"
#include "reduce.h"

// The second half of every expert that a token uses, and their weighted sum in router order, the
// shared expert last and unweighted.
//
//   h                         [B, TopK * N + SharedN], the output of expert_gate_up
//   experts                   [B, TopK] int
//   weights                   [B, TopK] float
//   down                      [E, M, N], packed to Bits or of a float type
//   down_{scales,biases}      [E, M, N / Group]; not read where Bits is 0: plain
//   shared_down               [M, SharedN] with SharedBits and SharedGroup, and so on
//   y                         [B, M] of h's type
// Template: OutT; TopK, M, N, Bits, Group, SharedN, SharedBits, SharedGroup int. N and SharedN are
// multiples of 8 and of their groups, M of 4; SharedN may be 0.
// Grid (32, Slots, B * M / 4), threadgroup (32, Slots, 1), Slots = TopK, and one more if SharedN is not
// 0: a threadgroup owns 4 elements of y, each of its simdgroups the part of one expert.
constexpr int Rows = 4;
constexpr int Slots = TopK + (SharedN > 0 ? 1 : 0);

threadgroup float parts[Slots * Rows];

const int lane = thread_position_in_grid.x;
const int slot = thread_position_in_grid.y;
const int token = thread_position_in_grid.z / (M / Rows);
const int first = thread_position_in_grid.z % (M / Rows) * Rows;

float sums[Rows] = {0, 0, 0, 0};
auto input = h + token * (TopK * N + SharedN) + slot * N;
if (slot < TopK) {
  const int row = experts[token * TopK + slot] * M + first;
  add_products<Rows>(
      input, rows_from<Bits, Group>(down, down_scales, down_biases, row, N), lane, sums);
} else {
  add_products<Rows>(
      input,
      rows_from<SharedBits, SharedGroup>(
          shared_down, shared_down_scales, shared_down_biases, first, SharedN),
      lane,
      sums);
}
const float sum = sum_of_rows<Rows>(sums, lane);
if (lane < Rows) {
  parts[slot * Rows + lane] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (slot == 0 && lane < Rows) {
  float total = 0;
  for (int i = 0; i < TopK; ++i) {
    total += weights[token * TopK + i] * parts[i * Rows + lane];
  }
  if (SharedN > 0) {
    total += parts[TopK * Rows + lane];
  }
  y[token * M + first + lane] = OutT(total);
}
