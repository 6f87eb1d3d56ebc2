// One launch: buffers in, threadgroups one after another, buffers out.
#include <stdlib.h>
#include <string.h>

#include "counts.h"
#include "finding.h"
#include "memory.h"
#include "schedule.h"
#include "storage.h"
#include "threads.h"

uint64_t counts[COUNTS];

Finding& last_finding();

struct Buffer {
  void* data;
  uint64_t size;
  uint32_t granule;
  Use use;
  uint32_t shift;  // bytes from an aligned address to the first
};

struct Launch {
  void (*entry)();
  Buffer* buffers;
  uint32_t buffer_count;
  uint32_t grid[3], threadgroup[3];
  uint64_t schedule;
};

static void open_buffers(const Launch& launch) {
  reserve_memory();
  for (uint32_t i = 0; i < launch.buffer_count; i++) {
    const Buffer& b = launch.buffers[i];
    open_region(i, b.size, b.granule, b.use, b.shift);
    memcpy(regions[i].base, b.data, b.size);
  }
}

static void close_buffers(const Launch& launch) {
  for (uint32_t i = 0; i < launch.buffer_count; i++) {
    const Buffer& b = launch.buffers[i];
    if (b.use != Use::INPUT) memcpy(b.data, regions[i].base, b.size);
    close_region(i);
  }
  close_storage();
}

static void set_group(uint32_t index) {
  place.linear_group = index;
  uint32_t rest = index;
  for (int i = 0; i < 3; i++) {
    place.group[i] = rest % place.groups[i];
    rest /= place.groups[i];
    uint32_t left = place.grid[i] - place.group[i] * place.dispatched[i];
    place.size[i] = left < place.dispatched[i] ? left : place.dispatched[i];
  }
}

static uint32_t set_grid(const Launch& launch) {
  uint32_t groups = 1;
  for (int i = 0; i < 3; i++) {
    place.grid[i] = launch.grid[i];
    uint32_t asked = launch.threadgroup[i];
    place.dispatched[i] = asked < place.grid[i] ? asked : place.grid[i];
    place.groups[i] = (place.grid[i] + place.dispatched[i] - 1) / place.dispatched[i];
    groups *= place.groups[i];
  }
  return groups;
}

static void find_unwritten(const Launch& launch, Finding& found) {
  for (uint32_t i = 0; i < launch.buffer_count && !found.found; i++) {
    if (launch.buffers[i].use != Use::OUTPUT) continue;
    int64_t offset = first_unwritten(regions[i]);
    if (offset < 0) continue;
    uint32_t size = regions[i].granule;
    found = Finding{1, UNWRITTEN_OUTPUT, i, NOBODY, offset, size, 0, 0, 0, {}};
  }
}

EXPORT void emu_launch(const Launch* launch, Finding* found, uint64_t* counted) {
  memset(counts, 0, sizeof counts);
  open_buffers(*launch);
  uint32_t groups = set_grid(*launch);
  uint32_t* order = static_cast<uint32_t*>(malloc(groups * sizeof(uint32_t)));
  arrange(order, groups, launch->schedule);
  for (uint32_t i = 0; i < groups && !last_finding().found; i++) {
    set_group(order[i]);
    forget_storage();
    run_threadgroup(launch->entry, launch->schedule);
  }
  free(order);
  find_unwritten(*launch, last_finding());
  *found = last_finding();
  last_finding() = Finding{};
  close_buffers(*launch);
  memcpy(counted, counts, sizeof counts);
}
