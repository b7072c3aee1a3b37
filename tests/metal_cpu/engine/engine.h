// What the engine's parts share: the launch as Python describes it, a thread, a threadgroup.
//
// Nothing of the system's headers is used, so that any clang compiles this, with or without them.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long i64;

#include "../msl/attributes.h"

extern "C" {
void* calloc(u64, u64);
void* malloc(u64);
void free(void*);
void* memcpy(void*, const void*, u64);
void* memset(void*, int, u64);
void* memmove(void*, const void*, u64);
}

static const u32 LANES = 32;
static const u32 MAX_THREADS = 1024;
static const u32 MAX_GROUPS = MAX_THREADS / LANES;
static const u32 SLOT_BITS = 36;  // a buffer's slot is wider than any 32-bit index reaches
static const u64 SLOTS = 64;
static const u32 MAX_PROBLEMS = 64;
static const u32 MAX_VARIABLES = 256;
static const u32 ARENA = 1 << 20;

enum Kind : u32 {
  BOUNDS_READ = 1, BOUNDS_WRITE, RACE, UNINITIALISED, DIVERGENT_BARRIER, EARLY_RETURN,
  DIVERGENT_SIMD, ABSENT_LANE, MISALIGNED, SHIFT, DIVISION, ARRAY_BOUND, HANG, CRASH,
  MISSING_RETURN, INPUT_WRITE,
};

// Mirrored by ctypes in runtime.py; the order of the fields is the contract.
struct Problem {
  u32 kind, count;
  i64 buffer;           // index of the buffer; -1 threadgroup memory, -2 neither
  i64 offset;           // bytes from the buffer's start
  u64 size;             // bytes of the access
  u64 site, other_site; // offsets into the kernel's image; 0 unknown
  u32 group, thread, other_group, other_thread;
  u32 line;             // from the compiler's own checks, which know it; else 0
  u32 other_write;      // of a race: the earlier access was a write
};

struct Buffer {
  u8* base;
  u64 size;
  u8* touched;          // per byte: 1 read, 2 written
  u64* read_line;       // per 64 bytes: the interval that last fetched it
  u64* write_line;
  struct Cell* cells;   // outputs only
  u64 item;             // bytes of an element
  u64 initialised;
  u64 read, written, lines_read, lines_written;
  u64 shift;            // log2 of the bytes of a cell
};

struct Launch {
  void (*entry)(void**, const struct Attributes*);
  void** arguments;
  Buffer* buffers;
  u64 buffer_count;
  u8* slots;            // base of all slots, 0 when unchecked
  u32 grid[3], group[3];
  u32 order;            // 0 forward, 1 reverse, 2 random
  u32 seed;
  u32 reduce;           // 0 ascending, 1 butterfly, 2 random
  u32 simd_orders;      // simdgroup operations order memory too
  u64 image;            // address of the kernel's image
  u64 barriers, simd_barriers, reductions, shuffles, matrix_ops, arena_bytes, threads;
  u64 problem_count;
  Problem problems[MAX_PROBLEMS];
};

enum State : u32 { RUNNING, DONE, AT_SIMD, AT_MATRIX, AT_SIMD_BARRIER, AT_BARRIER, AT_CONVERGE };

struct Fiber {
  void* sp;
  State state;
  u32 op, arg, flags, place;  // place: of the call in the text
  u64 a, b, c, result;
  u64 site;
  u32 thread, lane, simd;
  Attributes at;
};

struct Simdgroup {
  u32 lanes;
  State state;          // RUNNING: has an interval to run
  u64 site;
  u32 flags, place;
  u32 epoch[2];         // simdgroup barriers passed, for threadgroup and device memory
};

struct Variable {
  u64 offset, size;
};

static struct Engine {
  Launch* launch;
  Fiber* fibers;        // MAX_THREADS, with a stack each
  u8* stacks;
  void* scheduler;      // stack pointer of the caller while a fiber runs
  Fiber* current;
  Simdgroup simds[MAX_GROUPS];
  u32 threads, simd_count;
  u32 group;            // linear index of the threadgroup
  u32 epoch[2];         // threadgroup barriers passed, for threadgroup and device memory
  u64 interval;         // of one simdgroup between two synchronisations; never repeats
  bool stop;
  volatile int in_fiber, cancel;
  u64 random;
  u8* arena;
  u64 arena_top, arena_bytes;
  Variable variables[MAX_VARIABLES];
  u64 last_site;        // of an access or a collective, for a launch that is stopped
  u64 self;             // pthread_self of the launching thread
} E;

static inline u32 draw(u32 below) {
  E.random ^= E.random << 13;
  E.random ^= E.random >> 7;
  E.random ^= E.random << 17;
  return (u32)((E.random >> 16) % below);
}

static inline u64 site_of(void* address) { return (u64)address - 1 - E.launch->image; }
#define SITE site_of(__builtin_return_address(0))

static Problem* report(Kind kind, u64 site, i64 buffer = -2, i64 offset = 0);
[[noreturn]] static void die();
