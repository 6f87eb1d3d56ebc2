#include "memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "counts.h"
#include "finding.h"
#include "threads.h"

constexpr uint64_t ENDLESS_ACCESSES = 1 << 26;  // of one thread: a second

Region regions[SLOTS];
static uintptr_t arena;

// Memory that nobody may touch yet, at an address of the system's choice or at this one.
static void* map(void* at, size_t size) {
  int flags = MAP_PRIVATE | MAP_ANON | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* found = mmap(at, size, PROT_NONE, flags, -1, 0);
  if (found == MAP_FAILED) abort();
  return found;
}

static size_t pages(size_t size) {
  size_t page = size_t(sysconf(_SC_PAGESIZE));
  return (size + page - 1) / page * page;
}

static size_t cell_count(const Region& r) { return (r.size + r.granule - 1) / r.granule; }

void reserve_memory() {
  if (!arena) arena = uintptr_t(map(nullptr, SLOTS * SLOT));
}

void open_region(uint32_t slot, size_t size, uint32_t granule, Use use, uint32_t shift) {
  char* base = reinterpret_cast<char*>(arena + slot * SLOT + SLOT / 2);
  if (size) mprotect(base, pages(shift + size), PROT_READ | PROT_WRITE);
  regions[slot] = Region{base + shift, size, granule, use, nullptr, shift};
  if (use == Use::INPUT) return;
  Region& r = regions[slot];
  r.cells = static_cast<Cell*>(calloc(cell_count(r) + 1, sizeof(Cell)));
  if (use == Use::FILLED_OUTPUT)
    for (size_t i = 0; i < cell_count(r); i++) r.cells[i].write.level = BEFORE_LAUNCH;
}

void close_region(uint32_t slot) {
  Region& r = regions[slot];
  free(r.cells);
  // Mapping them anew gives the pages back, which mprotect alone does not.
  if (r.size) map(r.base - r.shift, pages(r.shift + r.size));
  r = Region{};
}

void forget_events(uint32_t slot) {
  Region& r = regions[slot];
  memset(r.cells, 0, cell_count(r) * sizeof(Cell));
}

int64_t first_unwritten(const Region& r) {
  for (size_t i = 0; i < cell_count(r); i++)
    if (r.cells[i].write.level == NEVER) return int64_t(i * r.granule);
  return -1;
}

static uint32_t simdgroup(const Event& e) { return e.thread / SIMD_WIDTH; }

// Does a barrier, or being the same thread, put `then` before `now`?
static bool ordered(const Event& then, const Event& now) {
  if (then.level <= BEFORE_LAUNCH || (then.atomic && now.atomic)) return true;
  if (then.level == EVERYONE || then.group != now.group) return false;
  if (then.barrier < now.barrier) return true;
  if (then.level == GROUP || simdgroup(then) != simdgroup(now)) return false;
  if (then.simd_barrier < now.simd_barrier) return true;
  return then.level == THREAD && now.level == THREAD && then.thread == now.thread;
}

static Between distance(const Event& then, const Event& now) {
  if (then.level == EVERYONE || then.group != now.group) return THREADGROUPS;
  if (then.level == GROUP || simdgroup(then) != simdgroup(now)) return THREADGROUP_MATES;
  return SIMDGROUP_MATES;
}

// One event that stands for two reads. A later write is ordered after it only if after both.
static Event both(const Event& then, const Event& now) {
  Event merged = now;
  Between between = distance(then, now);
  Level widest[] = {NEVER, SIMDGROUP, GROUP, EVERYONE};
  merged.level = widest[between];
  merged.atomic = then.atomic && now.atomic;
  return merged;
}

static void check_cell(const Region& r, size_t index, bool write, const Event& now) {
  Cell& cell = r.cells[index];
  uint32_t slot = uint32_t(&r - regions);
  int64_t offset = int64_t(index * r.granule);
  auto race = [&](const Event& then) {
    report(RACE, now.line, then.line, slot, offset, r.granule, distance(then, now));
  };
  if (!write && cell.write.level == NEVER)
    report(UNINITIALISED_READ, now.line, 0, slot, offset, r.granule);
  if (!ordered(cell.write, now)) race(cell.write);
  if (!write) {
    cell.read = ordered(cell.read, now) ? now : both(cell.read, now);
    return;
  }
  if (!ordered(cell.read, now)) race(cell.read);
  cell.write = now;
}

static void count_bytes(Use use, bool write, size_t size) {
  if (use == Use::THREADGROUP)
    counts[write ? THREADGROUP_WRITTEN : THREADGROUP_READ] += size;
  else
    counts[write ? DEVICE_WRITTEN : DEVICE_READ] += size;
}

void check(const Access& access) {
  const auto [address, size, write, line, alignment, level, atomic] = access;
  if (++running->accesses > ENDLESS_ACCESSES) report(ENDLESS, line);
  uintptr_t place = address - arena;
  if (place >= SLOTS * SLOT) return;  // a thread's own variables
  uint32_t slot = uint32_t(place >> SLOT_BITS);
  const Region& r = regions[slot];
  int64_t offset = int64_t(place % SLOT) - int64_t(SLOT / 2) - int64_t(r.shift);
  if (offset < 0 || size_t(offset) + size > r.size) {
    Kind kind = slot < BUFFERS ? OUT_OF_BOUNDS_DEVICE : OUT_OF_BOUNDS_THREADGROUP;
    report(kind, line, 0, slot, offset, uint32_t(size));
  }
  if (address % alignment) report(MISALIGNED, line, 0, slot, offset, uint32_t(size));
  count_bytes(r.use, write, size);
  if (r.use == Use::INPUT) {
    if (write) report(WRITE_TO_INPUT, line, 0, slot, offset, uint32_t(size));
    return;
  }
  Event now = this_moment(r.use == Use::THREADGROUP ? THREADGROUP : DEVICE);
  now.level = level;
  now.atomic = atomic;
  now.line = line;
  size_t last = (size_t(offset) + size - 1) / r.granule;
  for (size_t i = size_t(offset) / r.granule; i <= last; i++) check_cell(r, i, write, now);
}
