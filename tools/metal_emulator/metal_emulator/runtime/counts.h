// What a launch did, for a cost model. The order is that of launch.COUNTS.
#pragma once
#include <stdint.h>

#include "export.h"

enum Count : uint32_t {
  MATRIX_PRODUCTS,  // of 8x8 tiles
  SIMD_REDUCTIONS,  // one per simdgroup, as the next three
  SHUFFLES,
  SIMDGROUP_BARRIERS,
  MATRIX_TRANSFERS,  // tiles loaded or stored
  THREADGROUP_BARRIERS,  // one per threadgroup
  DEVICE_READ,  // bytes, as the next three
  DEVICE_WRITTEN,
  THREADGROUP_READ,
  THREADGROUP_WRITTEN,
  FLOAT_OPERATIONS,  // per thread, as the next three; a fused multiply-add is one
  INTEGER_OPERATIONS,
  SPECIAL_FUNCTIONS,  // exp, rsqrt, division, ...
  SLOW_INTEGERS,  // shifts, products, conversions to and from float
  COUNTS,
};

EXPORT uint64_t counts[COUNTS];
