// Who last wrote and read each cell of an output or of threadgroup memory, and whether a barrier
// lies between that and now.
#pragma once
#include "fiber.h"

enum Space : u32 { THREADGROUP, DEVICE };

struct Cell {
  u32 write_group, write_epoch, write_simd_epoch, write_site;
  u32 read_group, read_epoch;
  // Two readers since the last threadgroup barrier, of different simdgroups when there were such.
  u32 read_simd_epoch[2], read_site[2];
  u16 read_thread[2], write_thread;
  u8 readers, write_atomic, read_atomic, foreign;  // foreign: read by two threadgroups
  u32 foreign_group;
};

struct Access {
  u64 site;
  Space space;
  bool write, atomic;
  bool update;          // an atomic that reads and writes
};

static inline bool same_simd(u32 a, u32 b) { return a / LANES == b / LANES; }

static void race(const Access& a, u64 site, u32 group, u32 thread, bool write, i64 buffer,
                 i64 offset, u64 size) {
  Problem* p = report(RACE, a.site, buffer, offset);
  if (p->count > 1) return;
  p->size = size;
  p->other_site = site;
  p->other_group = group - 1;
  p->other_thread = thread;
  p->other_write = write;
}

// An earlier access of this threadgroup is before this one if a barrier for its memory is between.
static inline bool ordered(const Access& a, u32 epoch, u32 simd_epoch, u32 thread) {
  if (epoch != E.epoch[a.space]) return true;
  u32 now = E.current->thread;
  if (thread == now) return true;
  return same_simd(thread, now) && simd_epoch != E.simds[now / LANES].epoch[a.space];
}

static void check_write(Cell* c, const Access& a, i64 buffer, i64 offset, u64 size) {
  if (!c->write_group || (a.atomic && c->write_atomic)) return;
  bool mine = c->write_group == E.group + 1;
  if (a.space == THREADGROUP && !mine) return;
  if (mine && ordered(a, c->write_epoch, c->write_simd_epoch, c->write_thread)) return;
  race(a, c->write_site, c->write_group, c->write_thread, true, buffer, offset, size);
}

static void check_reads(Cell* c, const Access& a, i64 buffer, i64 offset, u64 size) {
  if (!c->read_group || (a.atomic && c->read_atomic)) return;
  u32 here = E.group + 1;
  if (a.space == DEVICE && (c->foreign || c->read_group != here)) {
    u32 group = c->read_group != here ? c->read_group : c->foreign_group;
    return race(a, c->read_site[0], group, c->read_thread[0], false, buffer, offset, size);
  }
  if (c->read_group != here) return;
  for (u32 i = 0; i < c->readers; ++i)
    if (!ordered(a, c->read_epoch, c->read_simd_epoch[i], c->read_thread[i]))
      return race(a, c->read_site[i], here, c->read_thread[i], false, buffer, offset, size);
}

static void keep_read(Cell* c, const Access& a) {
  u32 here = E.group + 1, thread = E.current->thread;
  if (c->read_group && c->read_group != here && a.space == DEVICE) {
    c->foreign = 1;
    c->foreign_group = c->read_group;
  }
  if (c->read_group != here || c->read_epoch != E.epoch[a.space]) c->readers = 0;
  c->read_group = here;
  c->read_epoch = E.epoch[a.space];
  u32 at = 0;
  if (c->readers && c->read_thread[0] != thread) {
    // The second place keeps a reader of another simdgroup once there is one.
    bool spread = c->readers == 2 && !same_simd(c->read_thread[0], c->read_thread[1]);
    at = !spread || same_simd(c->read_thread[1], thread) ? 1 : 0;
  }
  c->read_thread[at] = thread;
  c->read_simd_epoch[at] = E.simds[thread / LANES].epoch[a.space];
  c->read_site[at] = (u32)a.site;
  if (c->readers <= at) c->readers = at + 1;
  c->read_atomic = a.atomic && (c->read_atomic || c->readers == 1);
}

static void keep_write(Cell* c, const Access& a) {
  u32 thread = E.current->thread;
  c->write_group = E.group + 1;
  c->write_epoch = E.epoch[a.space];
  c->write_simd_epoch = E.simds[thread / LANES].epoch[a.space];
  c->write_thread = thread;
  c->write_site = (u32)a.site;
  c->write_atomic = a.atomic;
}

static void visit(Cell* c, const Access& a, bool initialised, i64 buffer, i64 offset, u64 size) {
  bool written = c->write_group && (a.space == DEVICE || c->write_group == E.group + 1);
  if (!a.write || a.update) {
    if (!written && !initialised) {
      report(UNINITIALISED, a.site, buffer, offset)->size = size;
      keep_write(c, a);  // once is enough
    }
  }
  check_write(c, a, buffer, offset, size);
  if (a.write) {
    check_reads(c, a, buffer, offset, size);
    keep_write(c, a);
  } else {
    keep_read(c, a);
  }
}

// Smaller cells, when a kernel reaches into the elements of an output or of a threadgroup array.
static Cell* refine(Cell* cells, u64 size, u64 from, u64 to) {
  Shielded shielded;
  u64 count = (size >> to) + 1;
  Cell* finer = (Cell*)malloc(count * sizeof(Cell));
  for (u64 i = 0; i < count; ++i) finer[i] = cells[i >> (from - to)];
  free(cells);
  return finer;
}

static inline u64 fitting(u64 shift, u64 offset, u64 size) {
  while (shift > 0 && ((offset | size) & ((1ul << shift) - 1))) --shift;
  return shift;
}
