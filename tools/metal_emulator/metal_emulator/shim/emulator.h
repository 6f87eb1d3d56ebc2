// Included before the text of a kernel: Metal's library, and what the translation of it calls.
#pragma once
#include "atomic.h"
#include "containers.h"
#include "math.h"
#include "matrix.h"

extern "C" {
ulong emu_argument(uint index);
ulong emu_storage(uint index, ulong size, uint alignment, uint site);
}

namespace metal {
template <typename Array>
SHIM threadgroup Array& threadgroup_storage(uint index, SITE) {
  return *(threadgroup Array*)emu_storage(index, sizeof(Array), alignof(Array), site);
}
SHIM vec<uint, 3> attribute(uint i) {
  vec<uint, 3> place;
  for (uint c = 0; c < 3; c++) place[c] = emu_attribute(i, c);
  return place;
}
}  // namespace metal
