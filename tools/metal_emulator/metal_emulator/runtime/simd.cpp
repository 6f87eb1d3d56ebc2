// What lanes do together: reductions, prefix operations, shuffles, votes, matrix products.
#include <string.h>

#include "bfloat.h"
#include "counts.h"
#include "finding.h"
#include "threads.h"

enum Operation : uint32_t { SUM, PRODUCT, MIN, MAX, AND, OR, XOR, INCLUSIVE_SUM, EXCLUSIVE_SUM,
                            INCLUSIVE_PRODUCT, EXCLUSIVE_PRODUCT, SHUFFLE, BALLOT, BARRIER, MATRIX,
                            MULTIPLY };
enum Type : uint32_t { F32, F16, BF16, I32, U32, I64, U64 };

template <class T>
static T unpack(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
static uint64_t pack(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
static T combine(T a, T b, uint32_t operation) {
  switch (operation) {
    case SUM: case INCLUSIVE_SUM: case EXCLUSIVE_SUM: return T(a + b);
    case PRODUCT: case INCLUSIVE_PRODUCT: case EXCLUSIVE_PRODUCT: return T(a * b);
    case MIN: return b < a ? b : a;
    case MAX: return a < b ? b : a;
    case AND: return unpack<T>(pack(a) & pack(b));
    case OR: return unpack<T>(pack(a) | pack(b));
    default: return unpack<T>(pack(a) ^ pack(b));
  }
}

// Neighbours first, then pairs of pairs: 1, 2, 4, 8, 16. Every lane takes the same bits.
template <class T>
static void reduce(Meeting& m, uint32_t lanes, uint32_t operation) {
  T values[SIMD_WIDTH];
  for (uint32_t i = 0; i < lanes; i++) values[i] = unpack<T>(m.brought[i]);
  for (uint32_t step = 1; step < SIMD_WIDTH; step *= 2)
    for (uint32_t i = 0; i + step < lanes; i += 2 * step)
      values[i] = combine(values[i], values[i + step], operation);
  for (uint32_t i = 0; i < lanes; i++) m.taken[i] = pack(values[0]);
}

template <class T>
static void prefix(Meeting& m, uint32_t lanes, uint32_t operation) {
  bool inclusive = operation == INCLUSIVE_SUM || operation == INCLUSIVE_PRODUCT;
  T total = T(operation == INCLUSIVE_PRODUCT || operation == EXCLUSIVE_PRODUCT ? 1 : 0);
  for (uint32_t i = 0; i < lanes; i++) {
    T with = combine(total, unpack<T>(m.brought[i]), operation);
    m.taken[i] = pack(inclusive ? with : total);
    total = with;
  }
}

template <class T>
static void together(Meeting& m, uint32_t lanes, uint32_t operation) {
  operation <= XOR ? reduce<T>(m, lanes, operation) : prefix<T>(m, lanes, operation);
}

static void together(Meeting& m, uint32_t lanes, uint32_t operation, uint32_t type) {
  switch (type) {
    case F32: return together<float>(m, lanes, operation);
    case F16: return together<_Float16>(m, lanes, operation);
    case BF16: return together<Bfloat>(m, lanes, operation);
    case I32: return together<int32_t>(m, lanes, operation);
    case U32: return together<uint32_t>(m, lanes, operation);
    case I64: return together<int64_t>(m, lanes, operation);
    default: return together<uint64_t>(m, lanes, operation);
  }
}

EXPORT uint64_t emu_simd_reduce(uint64_t value, uint32_t type, uint32_t operation,
                                    uint32_t site) {
  Meeting& m = next_meeting();
  m.brought[my_lane()] = value;
  if (arrive(operation, site)) {
    counts[SIMD_REDUCTIONS]++;
    together(m, my_simdgroup().lanes, operation, type);
  }
  return m.taken[my_lane()];
}

EXPORT uint64_t emu_simd_shuffle(uint64_t value, uint32_t source, uint32_t site) {
  Meeting& m = next_meeting();
  m.brought[my_lane()] = value;
  if (arrive(SHUFFLE, site)) counts[SHUFFLES]++;
  if (source >= my_simdgroup().lanes) report(INACTIVE_LANE, line_of(site), 0, 0, source);
  return m.brought[source];
}

EXPORT uint64_t emu_simd_ballot(uint32_t vote, uint32_t site) {
  Meeting& m = next_meeting();
  m.brought[my_lane()] = vote;
  if (arrive(BALLOT, site)) counts[SIMD_REDUCTIONS]++;
  uint64_t votes = 0;
  for (uint32_t i = 0; i < my_simdgroup().lanes; i++) votes |= m.brought[i] << i;
  return votes;
}

EXPORT void emu_simdgroup_barrier(uint32_t flags, uint32_t site) {
  next_meeting();
  if (!arrive(BARRIER + flags * 256, site)) return;
  counts[SIMDGROUP_BARRIERS]++;
  count_barrier(my_simdgroup().barriers, flags);
}

EXPORT void emu_threadgroup_barrier(uint32_t flags, uint32_t site) {
  meet_threadgroup(flags, site);
}

static uint32_t row_of(uint32_t lane) { return (lane / 4 & 4) + lane / 2 % 4; }
static uint32_t column_of(uint32_t lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
EXPORT uint32_t emu_matrix_row() { return row_of(my_lane()); }
EXPORT uint32_t emu_matrix_column() { return column_of(my_lane()); }

EXPORT void emu_matrix_transfer(uint32_t site) {
  next_meeting();
  if (arrive(MATRIX, site)) counts[MATRIX_TRANSFERS]++;
}

// Which lane touches which element is Metal's affair: the access speaks for the whole simdgroup.
EXPORT uint64_t emu_matrix_load(uint64_t address, uint32_t size, uint32_t site) {
  check({address, size, false, line_of(site), size, SIMDGROUP});
  uint64_t bits = 0;
  memcpy(&bits, reinterpret_cast<void*>(address), size);
  return bits;
}

EXPORT void emu_matrix_store(uint64_t address, uint64_t bits, uint32_t size, uint32_t site) {
  check({address, size, true, line_of(site), size, SIMDGROUP});
  memcpy(reinterpret_cast<void*>(address), &bits, size);
}

static void multiply(Meeting& m) {
  float tiles[3][8][8];
  for (uint32_t lane = 0; lane < SIMD_WIDTH; lane++)
    for (uint32_t i = 0; i < 6; i++)
      tiles[i / 2][row_of(lane)][column_of(lane) + i % 2] = m.operands[lane][i];
  for (uint32_t lane = 0; lane < SIMD_WIDTH; lane++) {
    float sums[2];
    for (uint32_t j = 0; j < 2; j++) {
      uint32_t row = row_of(lane), column = column_of(lane) + j;
      sums[j] = tiles[2][row][column];
      for (uint32_t k = 0; k < 8; k++)
        sums[j] = __builtin_fmaf(tiles[0][row][k], tiles[1][k][column], sums[j]);
    }
    memcpy(&m.taken[lane], sums, sizeof sums);
  }
}

EXPORT float emu_half_factor(uint64_t bits) {
  const uint16_t low = uint16_t(bits);
  _Float16 x;
  memcpy(&x, &low, sizeof x);
  return float(x);
}
EXPORT float emu_bfloat_factor(uint64_t bits) {
  const uint32_t high = uint32_t(bits) << 16;
  float x;
  memcpy(&x, &high, sizeof x);
  return x;
}

// D = A B + C in float32; each lane brings and takes two elements of every tile.
EXPORT uint64_t emu_matrix_multiply(float a0, float a1, float b0, float b1, float c0, float c1,
                                        uint32_t site) {
  Meeting& m = next_meeting();
  float mine[6] = {a0, a1, b0, b1, c0, c1};
  memcpy(m.operands[my_lane()], mine, sizeof mine);
  if (my_simdgroup().lanes < SIMD_WIDTH) report(SIMD_DIVERGENCE, line_of(site));
  if (arrive(MULTIPLY, site)) {
    counts[MATRIX_PRODUCTS]++;
    multiply(m);
  }
  return m.taken[my_lane()];
}
