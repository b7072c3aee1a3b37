// Simdgroup operations, once every lane has arrived: reductions, scans, shuffles, 8x8 products.
#pragma once
#include "engine.h"

enum Op : u32 {
  SUM, PRODUCT, MIN, MAX, AND, OR, XOR,
  SCAN_SUM, SCAN_PRODUCT, SCAN_SUM_EXCLUSIVE, SCAN_PRODUCT_EXCLUSIVE,
  BALLOT, SHUFFLE = 16, SHUFFLE_XOR, SHUFFLE_UP, SHUFFLE_DOWN, ROTATE_UP, ROTATE_DOWN, FILL_UP,
  FILL_DOWN, BROADCAST, BROADCAST_FIRST,
};
enum Type : u32 { F32, F16, I32, U32 };

template <class T>
static inline T bits(u64 x) {
  T value;
  __builtin_memcpy(&value, &x, sizeof(T));
  return value;
}
template <class T>
static inline u64 bits_of(T value) {
  u64 x = 0;
  __builtin_memcpy(&x, &value, sizeof(T));
  return x;
}

template <class T>
static inline T combine(u32 op, T x, T y) {
  switch (op) {
    case SUM: return x + y;
    case PRODUCT: return x * y;
    case MIN: return y < x || x != x ? y : x;
    default: return x < y || x != x ? y : x;
  }
}
static inline u32 combine_bits(u32 op, u32 x, u32 y) {
  return op == AND ? x & y : op == OR ? x | y : x ^ y;
}
template <class T>
static inline T join(u32 op, T x, T y) {
  if (op >= AND) return bits<T>(combine_bits(op, (u32)bits_of(x), (u32)bits_of(y)));
  return combine<T>(op, x, y);
}

// The order in which lanes are added is not documented; three are offered.
template <class T>
static T reduce(u32 op, T* v, u32 n) {
  if (E.launch->reduce == 1) {
    for (u32 step = 1; step < n; step *= 2)
      for (u32 i = 0; i + step < n; i += 2 * step) v[i] = join(op, v[i], v[i + step]);
    return v[0];
  }
  if (E.launch->reduce == 2)
    for (u32 i = n - 1; i > 0; --i) {
      u32 j = draw(i + 1);
      T kept = v[i];
      v[i] = v[j];
      v[j] = kept;
    }
  T total = v[0];
  for (u32 i = 1; i < n; ++i) total = join(op, total, v[i]);
  return total;
}

template <class T>
static void collect(Fiber** lanes, u32 n, u32 op) {
  T v[LANES];
  for (u32 i = 0; i < n; ++i) v[i] = bits<T>(lanes[i]->a);
  if (op < SCAN_SUM) {
    u64 total = bits_of(reduce<T>(op, v, n));
    for (u32 i = 0; i < n; ++i) lanes[i]->result = total;
    return;
  }
  u32 plain = op == SCAN_SUM || op == SCAN_SUM_EXCLUSIVE ? SUM : PRODUCT;
  bool exclusive = op >= SCAN_SUM_EXCLUSIVE;
  T total = plain == SUM ? T(0) : T(1);
  for (u32 i = 0; i < n; ++i) {
    T next = combine<T>(plain, total, v[i]);
    lanes[i]->result = bits_of(exclusive ? total : next);
    total = next;
  }
}

// A shuffle with a filling: true where the lane takes of the filling. The argument is the distance
// and, above 8 bits, the width after which the lanes begin anew.
static bool fill(Fiber** lanes, u32 n, u32 lane, u32 op) {
  u32 delta = lanes[lane]->arg & 255, width = lanes[lane]->arg >> 8;
  u32 at = lane % width, base = lane - at;
  if (op == FILL_UP ? at >= delta : at + delta < width) return false;
  u32 from = op == FILL_UP ? at + width - delta : at + delta - width;
  lanes[lane]->result = lanes[(base + from) % n]->b;
  return true;
}

static void shuffle(Fiber** lanes, u32 n, u32 op) {
  for (u32 i = 0; i < n; ++i) {
    Fiber* f = lanes[i];
    u32 arg = f->arg, from = i;
    f->result = f->a;
    switch (op) {
      case SHUFFLE: case BROADCAST: from = arg; break;
      case SHUFFLE_XOR: from = i ^ arg; break;
      case SHUFFLE_UP: from = i >= arg ? i - arg : i; break;
      case SHUFFLE_DOWN: from = i + arg < LANES ? i + arg : i; break;
      case ROTATE_UP: from = (i - arg) % LANES; break;
      case ROTATE_DOWN: from = (i + arg) % LANES; break;
      case BROADCAST_FIRST: from = 0; break;
      case FILL_UP: case FILL_DOWN:
        if (fill(lanes, n, i, op)) continue;
        from = op == FILL_UP ? i - (arg & 255) : i + (arg & 255);
    }
    if (from >= n) {
      Problem* p = report(ABSENT_LANE, f->site);
      p->thread = f->thread;
      p->other_thread = from;
      f->result = ~0ul;
      continue;
    }
    f->result = lanes[from]->a;
  }
}

// Each lane holds two neighbours of a row of an 8x8 matrix; MLX's kernels rely on this map.
static inline u32 fragment_row(u32 lane) { return (lane / 4 & 4) + lane / 2 % 4; }
static inline u32 fragment_column(u32 lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

static void gather(Fiber** lanes, u64 Fiber::*from, float (*m)[8]) {
  for (u32 i = 0; i < LANES; ++i)
    __builtin_memcpy(&m[fragment_row(i)][fragment_column(i)], &(lanes[i]->*from), 8);
}

static void multiply(Fiber** lanes) {
  float a[8][8], b[8][8], c[8][8];
  gather(lanes, &Fiber::a, a);
  gather(lanes, &Fiber::b, b);
  gather(lanes, &Fiber::c, c);
  for (u32 i = 0; i < 8; ++i)
    for (u32 k = 0; k < 8; ++k)
      for (u32 j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (u32 i = 0; i < LANES; ++i)
    __builtin_memcpy(&lanes[i]->result, &c[fragment_row(i)][fragment_column(i)], 8);
}

static void resolve(Fiber** lanes, u32 n) {
  u32 op = lanes[0]->op & 255, type = lanes[0]->op >> 8;
  if (op >= SHUFFLE) {
    E.launch->shuffles++;
    return shuffle(lanes, n, op);
  }
  E.launch->reductions++;
  if (op == BALLOT) {
    u64 mask = 0;
    for (u32 i = 0; i < n; ++i) mask |= (lanes[i]->a & 1) << i;
    for (u32 i = 0; i < n; ++i) lanes[i]->result = mask;
    return;
  }
  switch (type) {
    case F32: return collect<float>(lanes, n, op);
    case F16: return collect<_Float16>(lanes, n, op);
    case I32: return collect<int>(lanes, n, op);
    default: return collect<u32>(lanes, n, op);
  }
}
