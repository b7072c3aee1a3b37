// Every load and store that can reach memory: where it lies, whether it may, and what it costs.
#pragma once
#include "fiber.h"
#include "shadow.h"

extern "C" int dladdr(const void*, void*);

static Cell* arena_cells;
static u64 arena_shift;
static const u64 GAP = 64;  // between threadgroup variables, so that an overrun meets nothing

static void outside(const Access& a, i64 buffer, i64 offset, u64 size) {
  report(a.write ? BOUNDS_WRITE : BOUNDS_READ, a.site, buffer, offset)->size = size;
  die();
}

static void count_lines(Buffer* b, u64 offset, u64 size, bool write) {
  u64* lines = write ? b->write_line : b->read_line;
  for (u64 line = offset / 64; line <= (offset + size - 1) / 64; ++line) {
    if (lines[line] == E.interval) continue;
    lines[line] = E.interval;
    (write ? b->lines_written : b->lines_read)++;
  }
}

static void touch_device(u64 distance, u64 size, const Access& a) {
  u64 index = distance >> SLOT_BITS, offset = distance & ((1ul << SLOT_BITS) - 1);
  if (index >= E.launch->buffer_count) return outside(a, -2, 0, size);
  Buffer* b = &E.launch->buffers[index];
  if (offset + size > b->size) {
    // The far half of a slot is what a negative index into the next buffer reaches.
    bool before = offset >> (SLOT_BITS - 1) && index + 1 < E.launch->buffer_count;
    if (before) return outside(a, index + 1, (i64)offset - (i64)(1ul << SLOT_BITS), size);
    return outside(a, index, offset, size);
  }
  (a.write ? b->written : b->read) += size;
  for (u64 i = 0; i < size; ++i) b->touched[offset + i] |= a.write ? 2 : 1;
  count_lines(b, offset, size, a.write);
  if (!b->cells) {
    if (a.write) {
      report(INPUT_WRITE, a.site, index, offset)->size = size;
      die();
    }
    return;
  }
  u64 shift = fitting(b->shift, offset, size);
  if (shift < b->shift) {
    b->cells = refine(b->cells, b->size, b->shift, shift);
    b->shift = shift;
  }
  for (u64 i = offset >> b->shift; i <= (offset + size - 1) >> b->shift; ++i)
    visit(&b->cells[i], a, b->initialised, index, i << b->shift, size);
}

static void touch_arena(u64 offset, u64 size, const Access& a) {
  u32 v = 0;
  for (; v < MAX_VARIABLES; ++v) {
    u64 from = offset - E.variables[v].offset;
    if (from < E.variables[v].size && from + size <= E.variables[v].size) break;
  }
  if (v == MAX_VARIABLES) return outside(a, -1, offset, size);
  u64 shift = fitting(arena_shift, offset, size);
  if (shift < arena_shift) {
    arena_cells = refine(arena_cells, ARENA, arena_shift, shift);
    arena_shift = shift;
  }
  for (u64 i = offset >> arena_shift; i <= (offset + size - 1) >> arena_shift; ++i)
    visit(&arena_cells[i], a, false, -1, (i << arena_shift) - E.variables[v].offset, size);
}

static bool private_or_constant(u64 address, u64 size) {
  u64 stack = (u64)(E.stacks + E.current->thread * STACK);
  if (address - stack < STACK && address + size - stack <= STACK) return true;
  u64 at = (u64)&E.current->at;
  if (address - at < sizeof(Attributes)) return true;
  Shielded shielded;
  u64 found[4];  // Dl_info: the tables of constants lie in the kernel's image
  return dladdr((void*)address, found) != 0;
}

static void touch(u64 address, u64 size, bool write, u64 site, bool atomic = false,
                  bool update = false) {
  if (!E.in_fiber || size == 0) return;
  E.last_site = site;
  Access a = {site, DEVICE, write, atomic, update};
  u64 distance = address - (u64)E.launch->slots;
  if (distance < SLOTS << SLOT_BITS) return touch_device(distance, size, a);
  a.space = THREADGROUP;
  if (address - (u64)E.arena < ARENA) return touch_arena(address - (u64)E.arena, size, a);
  if (!private_or_constant(address, size)) outside(a, -2, (i64)address, size);
}
