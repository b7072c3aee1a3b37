// The engine behind the translated kernels: entry points for Python and for the kernels.
#include "handlers.h"
#include "launch.h"
#include "rounding.h"

extern "C" {
int mprotect(void*, u64, int);
void* signal(int, void*);
int sigaction(int, const void*, void*);
int sigemptyset(void*);
int sigaddset(void*, int);
int pthread_sigmask(int, const void*, void*);
int pthread_kill(u64, int);
u64 pthread_self();
}

#if defined(__APPLE__)
static const int UNBLOCK = 2, SIGNALS[] = {31, 11, 10, 8, 4};  // USR2 SEGV BUS FPE ILL
#else
static const int UNBLOCK = 1, SIGNALS[] = {12, 11, 7, 8, 4};
#endif
static const int SIGNAL_COUNT = 5;

static Problem spare;  // where reports go once the list is full

static Problem* report(Kind kind, u64 site, i64 buffer, i64 offset) {
  Launch* l = E.launch;
  for (u64 i = 0; i < l->problem_count; ++i) {
    Problem* p = &l->problems[i];
    if (p->kind == kind && p->site == site && p->buffer == buffer) {
      p->count++;
      return p;
    }
  }
  if (l->problem_count == MAX_PROBLEMS) return &spare;
  Problem* p = &l->problems[l->problem_count++];
  *p = Problem{};
  p->kind = kind;
  p->count = 1;
  p->site = site;
  p->buffer = buffer;
  p->offset = offset;
  p->group = E.group;
  p->thread = E.current ? E.current->thread : 0;
  return p;
}

// A loop that never synchronises, or a wild access in the unchecked mode: the launch ends here, on
// the fiber's own stack. Outside a fiber, and where it must not be left, only a flag is set.
static void on_signal(int number) {
  if (!E.in_fiber || pthread_self() != E.self) {
    if (number == SIGNALS[0]) E.cancel = 1;
    return;
  }
  u64 set[16];
  sigemptyset(set);
  sigaddset(set, number);
  pthread_sigmask(UNBLOCK, set, 0);
  report(number == SIGNALS[0] ? HANG : number == 8 ? DIVISION : CRASH, E.last_site);
  die();
}

static u64 kept_actions[SIGNAL_COUNT][32];

static void prepare() {
  if (E.fibers) return;
  E.fibers = (Fiber*)calloc(MAX_THREADS, sizeof(Fiber));
  u8* raw = (u8*)malloc(MAX_THREADS * STACK + PAGE);
  E.stacks = (u8*)(((u64)raw + PAGE - 1) & ~(PAGE - 1));
  for (u32 i = 0; i < MAX_THREADS; ++i) mprotect(E.stacks + i * STACK, PAGE, 0);
  E.arena = (u8*)(((u64)malloc(ARENA + 256) + 255) & ~255ul);
  E.arena_top = ARENA;
}

static void allocate_shadow(Launch* l) {
  if (!l->slots) return;
  arena_shift = 2;
  arena_cells = (Cell*)calloc((ARENA >> arena_shift) + 1, sizeof(Cell));
  for (u64 i = 0; i < l->buffer_count; ++i) {
    Buffer* b = &l->buffers[i];
    if (!b->cells) continue;  // Python marks the outputs
    b->shift = b->item >= 4 ? 2 : b->item == 2;
    b->cells = (Cell*)calloc((b->size >> b->shift) + 1, sizeof(Cell));
  }
}

static void release_shadow(Launch* l) {
  if (!l->slots) return;
  free(arena_cells);
  for (u64 i = 0; i < l->buffer_count; ++i) free(l->buffers[i].cells);
}

extern "C" {
// From another thread, between emu_begin and emu_end.
void emu_cancel() { pthread_kill(E.self, SIGNALS[0]); }

void emu_begin() {
  E.self = pthread_self();
  for (int i = 0; i < SIGNAL_COUNT; ++i) {
    sigaction(SIGNALS[i], 0, kept_actions[i]);
    signal(SIGNALS[i], (void*)&on_signal);
  }
}

void emu_end() {
  for (int i = 0; i < SIGNAL_COUNT; ++i) sigaction(SIGNALS[i], kept_actions[i], 0);
}

void emu_run(Launch* l) {
  prepare();
  E.launch = l;
  E.current = 0;
  E.stop = E.cancel = false;
  E.last_site = 0;
  E.random = 0x9e3779b97f4a7c15ul ^ ((u64)l->seed << 20) ^ l->seed;
  allocate_shadow(l);
  run_grid();
  release_shadow(l);
}

u64 emu_simd(u32 op, u64 a, u64 b, u32 arg, u32 place) {
  Fiber* f = E.current;
  f->place = place;
  f->op = op;
  f->arg = arg;
  f->a = a;
  f->b = b;
  return wait(AT_SIMD, SITE);
}

u64 emu_multiply(u64 a, u64 b, u64 c) {
  Fiber* f = E.current;
  f->place = 0;
  f->a = a;
  f->b = b;
  f->c = c;
  return wait(AT_MATRIX, SITE);
}

// Matrix loads and stores need all lanes but order nothing and end no interval.
void emu_converge() {
  E.current->place = 0;
  wait(AT_CONVERGE, SITE);
}

void emu_barrier(u32 flags, u32 place) {
  E.current->place = place;
  E.current->flags = flags;
  wait(AT_BARRIER, SITE);
}

void emu_simd_barrier(u32 flags, u32 place) {
  E.current->place = place;
  E.current->flags = flags;
  wait(AT_SIMD_BARRIER, SITE);
}

void* emu_threadgroup(u32 index, u64 size, u64 align) {
  Variable* v = &E.variables[index];
  if (!v->size) {
    E.arena_bytes = ((E.arena_bytes + align - 1) & ~(align - 1)) + size;
    u64 at = (E.arena_top + 63) & ~63ul;
    if (at + size + GAP > ARENA) die();  // Python reports the size
    v->offset = at;
    v->size = size;
    E.arena_top = at + size + GAP;
  }
  return E.arena + v->offset;
}

// `mode`: 0 load, 1 update, 2 store
void emu_atomic(void* p, u64 size, u32 mode) {
  if (E.launch->slots) touch((u64)p, size, mode != 0, SITE, true, mode == 1);
}

u32 emu_lane() { return E.current->lane; }
}
