// Relaxed atomics. Threads are fibers of one thread, so an ordinary update is one; the engine is
// told that the access is atomic, for its bounds and races.
#pragma once

namespace metal {
enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T held;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;

#define EMU_QUIET __attribute__((no_sanitize("thread"), noinline, nodebug))
#define EMU_ATOMIC_UPDATE(SPACE, NAME, EXPR)                                         \
  template <class T>                                                                 \
  EMU_QUIET T emu_##NAME(volatile SPACE atomic<T>* p, T x) {                         \
    T old = p->held;                                                                 \
    p->held = EXPR;                                                                  \
    return old;                                                                      \
  }                                                                                  \
  template <class T, class U>                                                        \
  EMU_INLINE T NAME(volatile SPACE atomic<T>* p, U x, memory_order) {                \
    emu_atomic((const void*)p, sizeof(T), 1);                                        \
    return emu_##NAME(p, T(x));                                                      \
  }
#define EMU_ATOMICS(SPACE)                                                           \
  EMU_ATOMIC_UPDATE(SPACE, atomic_fetch_add_explicit, old + x)                       \
  EMU_ATOMIC_UPDATE(SPACE, atomic_fetch_sub_explicit, old - x)                       \
  EMU_ATOMIC_UPDATE(SPACE, atomic_fetch_max_explicit, old < x ? x : old)             \
  EMU_ATOMIC_UPDATE(SPACE, atomic_fetch_min_explicit, x < old ? x : old)             \
  EMU_ATOMIC_UPDATE(SPACE, atomic_fetch_or_explicit, old | x)                        \
  EMU_ATOMIC_UPDATE(SPACE, atomic_fetch_and_explicit, old & x)                       \
  EMU_ATOMIC_UPDATE(SPACE, atomic_exchange_explicit, x)                              \
  template <class T>                                                                 \
  EMU_QUIET T emu_peek(const volatile SPACE atomic<T>* p) { return p->held; }        \
  template <class T>                                                                 \
  EMU_QUIET void emu_poke(volatile SPACE atomic<T>* p, T x) { p->held = x; }         \
  template <class T>                                                                 \
  EMU_INLINE T atomic_load_explicit(const volatile SPACE atomic<T>* p, memory_order) { \
    emu_atomic((const void*)p, sizeof(T), 0);                                        \
    return emu_peek(p);                                                              \
  }                                                                                  \
  template <class T, class U>                                                        \
  EMU_INLINE void atomic_store_explicit(volatile SPACE atomic<T>* p, U x, memory_order) { \
    emu_atomic((const void*)p, sizeof(T), 2);                                        \
    emu_poke(p, T(x));                                                               \
  }
EMU_ATOMICS(device)
EMU_ATOMICS(threadgroup)
}  // namespace metal
