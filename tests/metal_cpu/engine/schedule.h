// Threadgroups one after the other; inside one, simdgroups in turns that end at synchronisations.
#pragma once
#include "collective.h"
#include "fiber.h"

static void arrange(u32* order, u32 n) {
  for (u32 i = 0; i < n; ++i) order[i] = E.launch->order == 1 ? n - 1 - i : i;
  if (E.launch->order == 2)
    for (u32 i = n - 1; i > 0 && n > 1; --i) {
      u32 j = draw(i + 1), kept = order[i];
      order[i] = order[j];
      order[j] = kept;
    }
}

static void diverged(Kind kind, Fiber* one, Fiber* other) {
  Problem* p = report(kind, one->state == DONE ? other->site : one->site);
  p->thread = one->thread;
  p->other_thread = other->thread;
  p->other_site = other->state == DONE ? 0 : other->site;
  E.stop = true;
}

template <class T>
static inline bool together(const T* one, const T* other) {
  return one->state == other->state &&
         (one->state == DONE || (one->site == other->site && one->place == other->place));
}

// Whether all lanes stopped at the same place for the same reason; reports where they did not.
static bool agree(Fiber** lanes, u32 n) {
  for (u32 i = 1; i < n; ++i) {
    Fiber *one = lanes[0], *other = lanes[i];
    if (together(one, other)) continue;
    bool left = one->state == DONE || other->state == DONE;
    bool barrier = one->state == AT_BARRIER || other->state == AT_BARRIER;
    Kind kind = !barrier ? DIVERGENT_SIMD : left ? EARLY_RETURN : DIVERGENT_BARRIER;
    diverged(kind, one, other);
    return false;
  }
  return true;
}

static void synchronise(Simdgroup* simd, Fiber** lanes) {
  Fiber* first = lanes[0];
  simd->state = RUNNING;
  if (first->state == AT_SIMD_BARRIER) {
    E.launch->simd_barriers++;
    for (u32 space = 0; space < 2; ++space) simd->epoch[space] += first->flags >> space & 1;
    return;
  }
  if (E.launch->simd_orders) simd->epoch[0]++, simd->epoch[1]++;
  if (first->state == AT_SIMD) return resolve(lanes, simd->lanes);
  if (simd->lanes < LANES) {
    Problem* p = report(ABSENT_LANE, first->site);
    p->thread = first->thread;
    p->other_thread = simd->lanes;
    E.stop = true;
    return;
  }
  E.launch->matrix_ops++;
  multiply(lanes);
}

// Runs one simdgroup to its next synchronisation.
static void run_interval(u32 index) {
  Simdgroup* simd = &E.simds[index];
  Fiber* lanes[LANES];
  u32 order[LANES];
  for (u32 i = 0; i < simd->lanes; ++i) lanes[i] = &E.fibers[index * LANES + i];
  E.interval++;
  do {
    arrange(order, simd->lanes);
    for (u32 i = 0; i < simd->lanes && !E.stop; ++i) resume(lanes[order[i]]);
    if (E.stop || !agree(lanes, simd->lanes)) return;
  } while (lanes[0]->state == AT_CONVERGE);
  if (lanes[0]->state == DONE || lanes[0]->state == AT_BARRIER) {
    simd->state = lanes[0]->state;
    simd->site = lanes[0]->site;
    simd->flags = lanes[0]->flags;
    simd->place = lanes[0]->place;
    return;
  }
  synchronise(simd, lanes);
}

// All simdgroups stand at a barrier or have returned: releases the barrier; false at the end.
static bool release() {
  for (u32 i = 1; i < E.simd_count; ++i) {
    Simdgroup *one = &E.simds[0], *other = &E.simds[i];
    if (together(one, other)) continue;
    bool left = one->state == DONE || other->state == DONE;
    diverged(left ? EARLY_RETURN : DIVERGENT_BARRIER, &E.fibers[0], &E.fibers[i * LANES]);
    return false;
  }
  if (E.simds[0].state == DONE) return false;
  E.launch->barriers++;
  for (u32 space = 0; space < 2; ++space) E.epoch[space] += E.simds[0].flags >> space & 1;
  for (u32 i = 0; i < E.simd_count; ++i) E.simds[i].state = RUNNING;
  return true;
}

static bool sweep() {
  u32 order[MAX_GROUPS];
  bool ran = false;
  arrange(order, E.simd_count);
  for (u32 i = 0; i < E.simd_count && !E.stop; ++i) {
    // Forward and reverse run a simdgroup as far as it gets, random changes at every turn.
    while (E.simds[order[i]].state == RUNNING && !E.stop) {
      run_interval(order[i]);
      ran = true;
      if (E.cancel) {
        report(HANG, E.last_site);
        E.stop = true;
      }
      if (E.launch->order == 2) break;
    }
  }
  return ran;
}

static void run_threadgroup() {
  E.epoch[0] = E.epoch[1] = 1;
  for (u32 i = 0; i < E.simd_count; ++i) {
    u32 left = E.threads - i * LANES;
    E.simds[i] = Simdgroup{left < LANES ? left : LANES, RUNNING, 0, 0, 0, {1, 1}};
  }
  for (u32 i = 0; i < E.threads; ++i) start(&E.fibers[i]);
  do {
    while (!E.stop && sweep()) {
    }
  } while (!E.stop && release());
  E.launch->threads += E.threads;
  if (E.arena_bytes > E.launch->arena_bytes) E.launch->arena_bytes = E.arena_bytes;
}
