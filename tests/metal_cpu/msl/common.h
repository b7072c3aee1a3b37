// min, max, clamp, select, dot and the other functions that exist for several types. The overloads
// are of exact types: `min(1.0f, n)` is ambiguous here as it is for Metal.
#pragma once

namespace metal {
#define EMU_ORDERED(T)                                                       \
  EMU_INLINE T min(T x, T y) { return y < x ? y : x; }                       \
  EMU_INLINE T max(T x, T y) { return x < y ? y : x; }                       \
  EMU_INLINE T min3(T x, T y, T z) { return min(min(x, y), z); }             \
  EMU_INLINE T max3(T x, T y, T z) { return max(max(x, y), z); }             \
  EMU_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }
#define EMU_INTEGER(T, U)                                                    \
  EMU_ORDERED(T)                                                             \
  EMU_INLINE T mulhi(T x, T y) {                                             \
    return T((emu::wide<T>(x) * emu::wide<T>(y)) >> (8 * sizeof(T)));        \
  }                                                                          \
  EMU_INLINE T popcount(T x) { return T(__builtin_popcountll(U(x))); }       \
  EMU_INLINE T clz(T x) {                                                    \
    return x == 0 ? T(8 * sizeof(T))                                         \
                  : T(__builtin_clzll(U(x)) - (64 - 8 * int(sizeof(T))));    \
  }                                                                          \
  EMU_INLINE T ctz(T x) { return x == 0 ? T(8 * sizeof(T)) : T(__builtin_ctzll(U(x))); }
}  // namespace metal
namespace emu {
template <class T>
using wide = pick_t<(sizeof(T) > 4), __int128, pick_t<__is_signed(T), int64_t, uint64_t>>;
}
namespace metal {
EMU_INTEGER(char, uint8_t)
EMU_INTEGER(int8_t, uint8_t)
EMU_INTEGER(uint8_t, uint8_t)
EMU_INTEGER(int16_t, uint16_t)
EMU_INTEGER(uint16_t, uint16_t)
EMU_INTEGER(int32_t, uint32_t)
EMU_INTEGER(uint32_t, uint32_t)
EMU_INTEGER(int64_t, uint64_t)
EMU_INTEGER(uint64_t, uint64_t)

#define EMU_SIGNED(T)                                  \
  EMU_INLINE T abs(T x) { return x < 0 ? T(-x) : x; }
EMU_SIGNED(int8_t)
EMU_SIGNED(int16_t)
EMU_SIGNED(int32_t)
EMU_SIGNED(int64_t)

// A NaN loses against a number, as in fmin and fmax.
#define EMU_REAL(T)                                                                       \
  EMU_INLINE T abs(T x) { return fabs(x); }                                               \
  EMU_INLINE T min(T x, T y) { return fmin(x, y); }                                       \
  EMU_INLINE T max(T x, T y) { return fmax(x, y); }                                       \
  EMU_INLINE T min3(T x, T y, T z) { return min(min(x, y), z); }                          \
  EMU_INLINE T max3(T x, T y, T z) { return max(max(x, y), z); }                          \
  EMU_INLINE T clamp(T x, T low, T high) { return fmin(fmax(x, low), high); }             \
  EMU_INLINE T fma(T x, T y, T z) { return __builtin_elementwise_fma(x, y, z); }          \
  EMU_INLINE T mix(T x, T y, T a) { return x + (y - x) * a; }                             \
  EMU_INLINE T mad(T x, T y, T z) { return x * y + z; }                                   \
  EMU_INLINE T smoothstep(T low, T high, T x) {                                           \
    T t = clamp((x - low) / (high - low), T(0), T(1));                                    \
    return t * t * (T(3) - T(2) * t);                                                     \
  }
EMU_REAL(float)
EMU_REAL(half)
#define EMU_REAL_NAMED(SPACE)                                                             \
  namespace SPACE {                                                                       \
  EMU_INLINE float min(float x, float y) { return __builtin_fminf(x, y); }                \
  EMU_INLINE float max(float x, float y) { return __builtin_fmaxf(x, y); }                \
  EMU_INLINE float abs(float x) { return __builtin_fabsf(x); }                            \
  EMU_INLINE float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }     \
  EMU_INLINE float clamp(float x, float low, float high) { return metal::clamp(x, low, high); } \
  }
EMU_REAL_NAMED(fast)
EMU_REAL_NAMED(precise)

#define EMU_VECTOR2(NAME)                                            \
  template <class T, int N>                                          \
  EMU_INLINE vec<T, N> NAME(vec<T, N> x, vec<T, N> y) {              \
    EMU_EACH(N) x[i] = NAME(T(x[i]), T(y[i]));                       \
    return x;                                                        \
  }                                                                  \
  template <class T, int N>                                          \
  EMU_INLINE vec<T, N> NAME(vec<T, N> x, T y) {                      \
    EMU_EACH(N) x[i] = NAME(T(x[i]), y);                             \
    return x;                                                        \
  }
#define EMU_VECTOR3(NAME)                                            \
  template <class T, int N>                                          \
  EMU_INLINE vec<T, N> NAME(vec<T, N> x, vec<T, N> y, vec<T, N> z) { \
    EMU_EACH(N) x[i] = NAME(T(x[i]), T(y[i]), T(z[i]));              \
    return x;                                                        \
  }                                                                  \
  template <class T, int N>                                          \
  EMU_INLINE vec<T, N> NAME(vec<T, N> x, T y, T z) {                 \
    EMU_EACH(N) x[i] = NAME(T(x[i]), y, z);                          \
    return x;                                                        \
  }
EMU_VECTOR2(min)
EMU_VECTOR2(max)
EMU_VECTOR3(clamp)
EMU_VECTOR3(fma)
EMU_VECTOR3(mix)
template <class T, int N>
EMU_INLINE vec<T, N> abs(vec<T, N> x) {
  EMU_EACH(N) x[i] = abs(T(x[i]));
  return x;
}

template <class T, int N>
EMU_INLINE T dot(vec<T, N> x, vec<T, N> y) {
  T sum = x[0] * y[0];
  for (int i = 1; i < N; ++i) sum += x[i] * y[i];
  return sum;
}
template <class T, int N>
EMU_INLINE T length_squared(vec<T, N> x) {
  return dot(x, x);
}
template <class T, int N>
EMU_INLINE T length(vec<T, N> x) {
  return sqrt(dot(x, x));
}

EMU_INLINE bool any(bool x) { return x; }
EMU_INLINE bool all(bool x) { return x; }
template <class T, int N>
EMU_INLINE bool any(vec<T, N> x) {
  bool found = false;
  EMU_EACH(N) found = found || x[i];
  return found;
}
template <class T, int N>
EMU_INLINE bool all(vec<T, N> x) {
  bool found = true;
  EMU_EACH(N) found = found && x[i];
  return found;
}

// select(a, b, c) is c ? b : a, as in Metal.
template <class T>
EMU_INLINE T select(T x, T y, bool c) {
  return c ? y : x;
}
template <class T, class C, int N>
EMU_INLINE vec<T, N> select(vec<T, N> x, vec<T, N> y, vec<C, N> c) {
  EMU_EACH(N) x[i] = c[i] ? y[i] : x[i];
  return x;
}

template <class T>
EMU_INLINE void swap(T& x, T& y) {
  T kept = x;
  x = y;
  y = kept;
}

template <class T, int N>
struct array {
  T values[N];
  constexpr T& operator[](int i) { return values[i]; }
  constexpr const T& operator[](int i) const { return values[i]; }
  constexpr int size() const { return N; }
};
}  // namespace metal
