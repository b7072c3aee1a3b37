// What the compiler's instrumentation calls: the pass of its thread sanitizer for every access, the
// checks of its undefined-behaviour sanitizer where they fail.
#pragma once
#include "memory.h"

struct Location {
  const char* file;
  u32 line, column;
};

#define ON_ACCESS(SIZE)                                                                        \
  void __tsan_read##SIZE(void* p) { aligned((u64)p, SIZE, false, SITE); }                      \
  void __tsan_write##SIZE(void* p) { aligned((u64)p, SIZE, true, SITE); }                      \
  void __tsan_unaligned_read##SIZE(void* p) { touch((u64)p, SIZE, false, SITE); }              \
  void __tsan_unaligned_write##SIZE(void* p) { touch((u64)p, SIZE, true, SITE); }

#define ON_FAILURE(NAME, KIND)                                                                 \
  void __ubsan_handle_##NAME##_abort(Location* at) { failed(KIND, at, SITE); }                 \
  void __ubsan_handle_##NAME(Location* at) { failed(KIND, at, SITE); }

// The pass has another name for accesses that the type lets lie anywhere.
static inline void aligned(u64 address, u64 size, bool write, u64 site) {
  if (address % size && E.in_fiber) {
    report(MISALIGNED, site);
    die();
  }
  touch(address, size, write, site);
}

static void failed(Kind kind, Location* at, u64 site) {
  report(kind, site)->line = at->line;
  die();
}

extern "C" {
ON_ACCESS(1)
ON_ACCESS(2)
ON_ACCESS(4)
ON_ACCESS(8)
ON_ACCESS(16)
void __tsan_read_range(void* p, u64 n) { touch((u64)p, n, false, SITE); }
void __tsan_write_range(void* p, u64 n) { touch((u64)p, n, true, SITE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* __tsan_memcpy(void* to, const void* from, u64 n) {
  touch((u64)from, n, false, SITE);
  touch((u64)to, n, true, SITE);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, u64 n) {
  touch((u64)from, n, false, SITE);
  touch((u64)to, n, true, SITE);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, u64 n) {
  touch((u64)to, n, true, SITE);
  return memset(to, value, n);
}
ON_FAILURE(type_mismatch_v1, MISALIGNED)
ON_FAILURE(shift_out_of_bounds, SHIFT)
ON_FAILURE(divrem_overflow, DIVISION)
ON_FAILURE(out_of_bounds, ARRAY_BOUND)
ON_FAILURE(local_out_of_bounds, ARRAY_BOUND)
ON_FAILURE(missing_return, MISSING_RETURN)
ON_FAILURE(builtin_unreachable, MISSING_RETURN)
}
