// Every buffer and threadgroup array in a slot of its own, and who touched each element last.
#pragma once
#include <stddef.h>
#include <stdint.h>

constexpr uint32_t BUFFERS = 32, ARRAYS = 32;  // a Metal kernel takes at most 31 buffers
constexpr uint32_t SLOTS = BUFFERS + ARRAYS;
constexpr uint32_t SLOT_BITS = 33;  // 8 GiB: an offset wrong by up to 4 GiB stays in its slot
constexpr size_t SLOT = size_t(1) << SLOT_BITS;

enum class Use : uint32_t { INPUT, OUTPUT, FILLED_OUTPUT, THREADGROUP };
enum Space : uint32_t { DEVICE, THREADGROUP };

// Who an event speaks for: events that no barrier separates are merged to the next wider level.
enum Level : uint32_t { NEVER, BEFORE_LAUNCH, THREAD, SIMDGROUP, GROUP, EVERYONE };

// One access: by whom, and after how many barriers.
struct Event {
  uint32_t group;
  uint32_t barrier;
  uint32_t simd_barrier;
  uint32_t line : 17, thread : 10, level : 4, atomic : 1;
};

struct Cell {
  Event write, read;
};

struct Region {
  char* base;
  size_t size;
  uint32_t granule;  // bytes a cell stands for: one element
  Use use;
  Cell* cells;
  uint32_t shift;  // bytes from an aligned address to the base
};

extern Region regions[SLOTS];

void reserve_memory();
void open_region(uint32_t slot, size_t size, uint32_t granule, Use use, uint32_t shift = 0);
void close_region(uint32_t slot);
void forget_events(uint32_t slot);
int64_t first_unwritten(const Region&);

// One access of the running thread; `alignment` is what its type asks of the address.
struct Access {
  uintptr_t address;
  size_t size;
  bool write;
  uint32_t line;
  size_t alignment = 1;
  Level level = THREAD;
  bool atomic = false;
};

// Check an access and remember it.
void check(const Access&);
