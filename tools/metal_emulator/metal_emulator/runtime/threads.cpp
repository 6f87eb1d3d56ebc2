#include "threads.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "counts.h"
#include "fiber.h"
#include "finding.h"
#include "schedule.h"

constexpr size_t STACK = 256 << 10;

Place place;
Thread* running;

static Thread threads[MAX_THREADS];
static Simdgroup simdgroups[MAX_THREADS / SIMD_WIDTH];
static uint32_t arrived, barriers[2];
static void* scheduler;
static void (*entry)();
static char* stacks;
static Finding finding;

Finding& last_finding() { return finding; }

static void note(Kind kind, uint32_t line, uint32_t other_line, uint32_t region = 0,
                 int64_t offset = 0, uint32_t size = 0, Between between = NOBODY) {
  finding = Finding{1, kind, region, between, offset, size, line, other_line, running->index, {}};
  for (int i = 0; i < 3; i++) finding.group[i] = place.group[i];
}

void report(Kind kind, uint32_t line, uint32_t other_line, uint32_t region, int64_t offset,
            uint32_t size, Between between) {
  note(kind, line, other_line, region, offset, size, between);
  void* abandoned;
  emu_switch_stack(&abandoned, scheduler);
  abort();
}

Simdgroup& my_simdgroup() { return simdgroups[running->index / SIMD_WIDTH]; }
uint32_t my_lane() { return running->index % SIMD_WIDTH; }

Event this_moment(Space space) {
  Event now{};
  now.group = place.linear_group;
  now.barrier = barriers[space];
  now.simd_barrier = my_simdgroup().barriers[space];
  now.thread = running->index;
  return now;
}

static void yield() { emu_switch_stack(&running->stack, scheduler); }

static void wait(Wait what, uint32_t operation, uint32_t site) {
  running->wait = what;
  running->operation = operation;
  running->site = site;
}

// The members that wait are all at one place, or it is a divergence.
static void require_one_place(uint32_t first, uint32_t count, Kind kind) {
  for (uint32_t i = first; i < first + count; i++)
    if (threads[i].site != running->site || threads[i].operation != running->operation)
      report(kind, line_of(running->site), line_of(threads[i].site));
}

static void release(uint32_t first, uint32_t count) {
  for (uint32_t i = first; i < first + count; i++) threads[i].wait = Wait::NONE;
}

Meeting& next_meeting() { return my_simdgroup().meeting[running->meetings++ & 1]; }

bool arrive(uint32_t operation, uint32_t site) {
  Simdgroup& mine = my_simdgroup();
  wait(Wait::SIMD, operation, site);
  if (++mine.arrived < mine.lanes) {
    yield();
    return false;
  }
  uint32_t first = running->index - my_lane();
  require_one_place(first, mine.lanes, SIMD_DIVERGENCE);
  mine.arrived = 0;
  release(first, mine.lanes);
  return true;
}

void meet_threadgroup(uint32_t flags, uint32_t site) {
  wait(Wait::BARRIER, flags, site);
  if (++arrived < place.threads) return yield();
  require_one_place(0, place.threads, BARRIER_DIVERGENCE);
  arrived = 0;
  counts[THREADGROUP_BARRIERS]++;
  count_barrier(barriers, flags);
  release(0, place.threads);
}

static void thread_main() {
  entry();
  running->wait = Wait::FINISHED;
  yield();
}

static char* stack_top(uint32_t index) {
  if (!stacks) {
    size_t size = STACK * MAX_THREADS;
    int flags = MAP_PRIVATE | MAP_ANON | MAP_NORESERVE;
    void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (found == MAP_FAILED) abort();
    stacks = static_cast<char*>(found);
    for (uint32_t i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * STACK, 16 << 10, PROT_NONE);
  }
  return stacks + (index + 1) * STACK;
}

static void prepare_threads() {
  uint32_t index = 0;
  for (uint32_t z = 0; z < place.size[2]; z++)
    for (uint32_t y = 0; y < place.size[1]; y++)
      for (uint32_t x = 0; x < place.size[0]; x++, index++)
        threads[index] = {
            new_stack(stack_top(index), thread_main), index, {x, y, z}, 0, Wait::NONE, 0, 0, 0};
  for (uint32_t first = 0; first < index; first += SIMD_WIDTH) {
    Simdgroup& s = simdgroups[first / SIMD_WIDTH];
    s.lanes = index - first < SIMD_WIDTH ? index - first : SIMD_WIDTH;
    s.arrived = s.barriers[DEVICE] = s.barriers[THREADGROUP] = 0;
  }
  place.threads = index;
  arrived = barriers[DEVICE] = barriers[THREADGROUP] = 0;
}

// Nobody can run: those who wait do so for threads that are elsewhere.
static void find_divergence() {
  Thread* waiting = nullptr;
  for (uint32_t i = 0; i < place.threads; i++) {
    Thread& t = threads[i];
    if (t.wait == Wait::SIMD || (t.wait == Wait::BARRIER && !waiting)) waiting = &t;
    if (t.wait == Wait::SIMD) break;
  }
  bool simd = waiting->wait == Wait::SIMD;
  uint32_t first = simd ? waiting->index / SIMD_WIDTH * SIMD_WIDTH : 0;
  uint32_t count = simd ? simdgroups[first / SIMD_WIDTH].lanes : place.threads;
  uint32_t elsewhere = 0;  // the line where another waits; none where others have finished
  for (uint32_t i = first; i < first + count; i++)
    if (threads[i].wait != Wait::FINISHED && threads[i].site != waiting->site)
      elsewhere = line_of(threads[i].site);
  running = waiting;
  note(simd ? SIMD_DIVERGENCE : BARRIER_DIVERGENCE, line_of(waiting->site), elsewhere);
}

static bool resume(Thread& thread) {
  running = &thread;
  emu_switch_stack(&scheduler, thread.stack);
  return !finding.found;
}

void run_threadgroup(void (*function)(), uint64_t schedule) {
  entry = function;
  finding = Finding{};
  prepare_threads();
  static uint32_t order[MAX_THREADS];
  arrange(order, place.threads, schedule);
  for (bool progress = true; progress;) {
    progress = false;
    for (uint32_t i = 0; i < place.threads; i++) {
      Thread& thread = threads[order[i]];
      if (thread.wait != Wait::NONE) continue;
      progress = true;
      if (!resume(thread)) return;
    }
  }
  for (uint32_t i = 0; i < place.threads; i++)
    if (threads[i].wait != Wait::FINISHED) return find_divergence();
}
