// What the instrumented kernel calls for its loads and stores, its places and its storage.
#include <string.h>

#include "counts.h"
#include "finding.h"
#include "storage.h"
#include "threads.h"

EXPORT void emu_read(uint64_t address, uint64_t size, uint32_t line, uint64_t alignment) {
  check({address, size, false, line, alignment});
}

EXPORT void emu_write(uint64_t address, uint64_t size, uint32_t line, uint64_t alignment) {
  check({address, size, true, line, alignment});
}

EXPORT void* emu_copy(uint64_t to, uint64_t from, uint64_t size, uint32_t line) {
  check({from, size, false, line});
  check({to, size, true, line});
  return memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
}

EXPORT void* emu_fill(uint64_t to, uint32_t byte, uint64_t size, uint32_t line) {
  check({to, size, true, line});
  return memset(reinterpret_cast<void*>(to), int(byte), size);
}

EXPORT void emu_atomic(uint64_t address, uint32_t size, uint32_t writes, uint32_t site) {
  check({address, size, writes != 0, line_of(site), size, THREAD, true});
}

EXPORT uint64_t emu_argument(uint32_t index) { return uint64_t(regions[index].base); }

// The attributes of msl.ATTRIBUTES, by their order there.
EXPORT uint32_t emu_attribute(uint32_t attribute, uint32_t i) {
  const Thread& t = *running;
  auto simdgroups = [](const uint32_t* size, uint32_t width) {
    return (size[0] * size[1] * size[2] + width - 1) / width;
  };
  switch (attribute) {
    case 0: return simdgroups(place.dispatched, 4);
    case 1: return simdgroups(place.dispatched, SIMD_WIDTH);
    case 2: return place.dispatched[i];
    case 3: return 0;
    case 4: return place.grid[i];
    case 5: return t.index / 4;
    case 6: return simdgroups(place.size, 4);
    case 7: return t.index / SIMD_WIDTH;
    case 8: return simdgroups(place.size, SIMD_WIDTH);
    case 9: return SIMD_WIDTH;
    case 10: return t.index % 4;
    case 11: return t.index % SIMD_WIDTH;
    case 12: return t.index;
    case 13: return place.group[i] * place.dispatched[i] + t.position[i];
    case 14: return t.position[i];
    case 15: return place.group[i];
    case 16: return place.groups[i];
    case 17: return place.grid[i];
    case 18: return SIMD_WIDTH;
    default: return place.size[i];
  }
}

static size_t storage_used;

void forget_storage() {
  storage_used = 0;
  for (uint32_t i = BUFFERS; i < SLOTS; i++)
    if (regions[i].base) forget_events(i);
}

void close_storage() {
  for (uint32_t i = BUFFERS; i < SLOTS; i++)
    if (regions[i].base) close_region(i);
  storage_used = 0;
}

// The array `index` of the text. It is the same for all threads of a threadgroup.
EXPORT uint64_t emu_storage(uint32_t index, uint64_t size, uint32_t alignment, uint32_t site) {
  constexpr size_t LIMIT = 32 << 10;
  uint32_t slot = BUFFERS + index;
  if (index >= ARRAYS) report(THREADGROUP_MEMORY, line_of(site));
  if (!regions[slot].base) {
    storage_used = (storage_used + 15) / 16 * 16 + size;
    if (storage_used > LIMIT)
      report(THREADGROUP_MEMORY, line_of(site), 0, slot, int64_t(storage_used), uint32_t(size));
    open_region(slot, size, alignment < 4 ? alignment : 4, Use::THREADGROUP);
    memset(regions[slot].base, 0xFF, size);
  }
  return uint64_t(regions[slot].base);
}
