// One launch: the grid cut into threadgroups, and the attributes of every thread.
#pragma once
#include "schedule.h"

struct Grid {
  u32 groups[3];
  u32 size[3];   // of this threadgroup; smaller at the far edges
  u32 at[3];
};

static void fill_attributes(Fiber* f, const Grid& g, u32 thread) {
  const Launch* l = E.launch;
  Attributes* a = &f->at;
  f->thread = thread;
  f->lane = thread % LANES;
  f->simd = thread / LANES;
  u32 row = thread / g.size[0];
  u32 local[3] = {thread % g.size[0], row % g.size[1], row / g.size[1]};
  u32 nominal = l->group[0] * l->group[1] * l->group[2];
  for (u32 i = 0; i < 3; ++i) {
    a->thread_position_in_threadgroup[i] = local[i];
    a->thread_position_in_grid[i] = g.at[i] * l->group[i] + local[i];
    a->threadgroup_position_in_grid[i] = g.at[i];
    a->threadgroups_per_grid[i] = g.groups[i];
    a->threads_per_grid[i] = a->grid_size[i] = l->grid[i];
    a->threads_per_threadgroup[i] = g.size[i];
    a->dispatch_threads_per_threadgroup[i] = l->group[i];
    a->grid_origin[i] = 0;
  }
  a->thread_index_in_threadgroup = thread;
  a->thread_index_in_simdgroup = f->lane;
  a->simdgroup_index_in_threadgroup = f->simd;
  a->simdgroups_per_threadgroup = E.simd_count;
  a->dispatch_simdgroups_per_threadgroup = (nominal + LANES - 1) / LANES;
  a->threads_per_simdgroup = a->thread_execution_width = LANES;
  a->thread_index_in_quadgroup = thread % 4;
  a->quadgroup_index_in_threadgroup = thread / 4;
  a->quadgroups_per_threadgroup = (E.threads + 3) / 4;
  a->dispatch_quadgroups_per_threadgroup = (nominal + 3) / 4;
}

static void reset_arena() {
  memset(E.arena, 0xff, E.arena_top);
  memset(E.variables, 0, sizeof(E.variables));
  E.arena_top = E.arena_bytes = 0;
}

static void run_group_at(Grid& g, u64 index) {
  const Launch* l = E.launch;
  u64 groups = (u64)g.groups[0] * g.groups[1] * g.groups[2];
  if (l->order == 1) index = groups - 1 - index;
  // A large prime for a stride visits every threadgroup once, in an order nobody expects.
  if (l->order == 2) index = (index * 0x9e3779b1ul + l->seed) % groups;
  g.at[0] = index % g.groups[0];
  g.at[1] = index / g.groups[0] % g.groups[1];
  g.at[2] = index / g.groups[0] / g.groups[1];
  for (u32 i = 0; i < 3; ++i) {
    u32 left = l->grid[i] - g.at[i] * l->group[i];
    g.size[i] = left < l->group[i] ? left : l->group[i];
  }
  E.group = (u32)index;
  E.threads = g.size[0] * g.size[1] * g.size[2];
  E.simd_count = (E.threads + LANES - 1) / LANES;
  for (u32 i = 0; i < E.threads; ++i) fill_attributes(&E.fibers[i], g, i);
  reset_arena();
  run_threadgroup();
}

static void run_grid() {
  Launch* l = E.launch;
  Grid g;
  for (u32 i = 0; i < 3; ++i) g.groups[i] = (l->grid[i] + l->group[i] - 1) / l->group[i];
  u64 groups = (u64)g.groups[0] * g.groups[1] * g.groups[2];
  for (u64 i = 0; i < groups && !E.stop; ++i) run_group_at(g, i);
}
