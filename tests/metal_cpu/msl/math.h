// The math library. Each function is one `__metal_NAME(float, mode)`, which MLX's own bfloat16
// overloads also call, and overloads of it for float, half and their vectors.
#pragma once

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

namespace emu {
// metal::fast is less exact on a GPU. How much is not documented: two bits stand for it, so that a
// test whose tolerance has no room for it fails here.
EMU_INLINE float coarse(float x, int mode) {
  return mode == 1 && x == x ? __builtin_bit_cast(float, __builtin_bit_cast(uint, x) & ~3u) : x;
}
EMU_INLINE float turn(float x) { return x - 2.0f * __builtin_floorf(0.5f * x); }
template <class T>
struct real {
  static constexpr bool value = false;
};
template <>
struct real<float> {
  static constexpr bool value = true;
};
template <>
struct real<half> {
  static constexpr bool value = true;
};
}  // namespace emu

#define EMU_PI 3.14159265358979323846f
#define EMU_EACH(N) for (int i = 0; i < N; ++i)

#define EMU_MATH1(NAME, EXPR)                                                              \
  EMU_INLINE float __metal_##NAME(float x, int mode) { return emu::coarse(EXPR, mode); }   \
  namespace metal {                                                                        \
  EMU_INLINE float NAME(float x) { return __metal_##NAME(x, 0); }                          \
  EMU_INLINE half NAME(half x) { return half(__metal_##NAME(float(x), 0)); }               \
  template <class T, int N, class = enable_if_t<emu::real<T>::value>>                      \
  EMU_INLINE vec<T, N> NAME(vec<T, N> x) {                                                 \
    EMU_EACH(N) x[i] = NAME(T(x[i]));                                                      \
    return x;                                                                              \
  }                                                                                        \
  namespace fast {                                                                         \
  EMU_INLINE float NAME(float x) { return __metal_##NAME(x, 1); }                          \
  template <int N>                                                                         \
  EMU_INLINE vec<float, N> NAME(vec<float, N> x) {                                         \
    EMU_EACH(N) x[i] = __metal_##NAME(x[i], 1);                                            \
    return x;                                                                              \
  }                                                                                        \
  }                                                                                        \
  namespace precise {                                                                      \
  EMU_INLINE float NAME(float x) { return __metal_##NAME(x, 2); }                          \
  template <int N>                                                                         \
  EMU_INLINE vec<float, N> NAME(vec<float, N> x) {                                         \
    EMU_EACH(N) x[i] = __metal_##NAME(x[i], 2);                                            \
    return x;                                                                              \
  }                                                                                        \
  }                                                                                        \
  }

#define EMU_MATH2(NAME, EXPR)                                                              \
  EMU_INLINE float __metal_##NAME(float x, float y, int mode = 0) {                        \
    return emu::coarse(EXPR, mode);                                                        \
  }                                                                                        \
  namespace metal {                                                                        \
  EMU_INLINE float NAME(float x, float y) { return __metal_##NAME(x, y, 0); }              \
  EMU_INLINE half NAME(half x, half y) { return half(__metal_##NAME(float(x), float(y), 0)); } \
  template <class T, int N, class = enable_if_t<emu::real<T>::value>>                      \
  EMU_INLINE vec<T, N> NAME(vec<T, N> x, vec<T, N> y) {                                    \
    EMU_EACH(N) x[i] = NAME(T(x[i]), T(y[i]));                                             \
    return x;                                                                              \
  }                                                                                        \
  namespace fast {                                                                         \
  EMU_INLINE float NAME(float x, float y) { return __metal_##NAME(x, y, 1); }              \
  }                                                                                        \
  namespace precise {                                                                      \
  EMU_INLINE float NAME(float x, float y) { return __metal_##NAME(x, y, 2); }              \
  }                                                                                        \
  }

EMU_MATH1(acos, __builtin_acosf(x))
EMU_MATH1(acosh, __builtin_acoshf(x))
EMU_MATH1(asin, __builtin_asinf(x))
EMU_MATH1(asinh, __builtin_asinhf(x))
EMU_MATH1(atan, __builtin_atanf(x))
EMU_MATH1(atanh, __builtin_atanhf(x))
EMU_MATH1(ceil, __builtin_ceilf(x))
EMU_MATH1(cos, __builtin_cosf(x))
EMU_MATH1(cosh, __builtin_coshf(x))
EMU_MATH1(cospi, __builtin_cosf(EMU_PI * emu::turn(x)))
EMU_MATH1(exp, __builtin_expf(x))
EMU_MATH1(exp2, __builtin_exp2f(x))
EMU_MATH1(exp10, __builtin_powf(10.0f, x))
EMU_MATH1(fabs, __builtin_fabsf(x))
EMU_MATH1(floor, __builtin_floorf(x))
EMU_MATH1(fract, __builtin_fminf(x - __builtin_floorf(x), 0.99999994f))
EMU_MATH1(log, __builtin_logf(x))
EMU_MATH1(log2, __builtin_log2f(x))
EMU_MATH1(log10, __builtin_log10f(x))
EMU_MATH1(rint, __builtin_rintf(x))
EMU_MATH1(round, __builtin_roundf(x))
EMU_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x))
EMU_MATH1(sin, __builtin_sinf(x))
EMU_MATH1(sinh, __builtin_sinhf(x))
EMU_MATH1(sinpi, __builtin_sinf(EMU_PI * emu::turn(x)))
EMU_MATH1(sqrt, __builtin_sqrtf(x))
EMU_MATH1(tan, __builtin_tanf(x))
EMU_MATH1(tanh, __builtin_tanhf(x))
EMU_MATH1(tanpi, __builtin_tanf(EMU_PI * emu::turn(x)))
EMU_MATH1(trunc, __builtin_truncf(x))
EMU_MATH1(sign, x != x ? 0.0f : x == 0.0f ? x : __builtin_copysignf(1.0f, x))
EMU_MATH1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))

EMU_MATH2(atan2, __builtin_atan2f(x, y))
EMU_MATH2(copysign, __builtin_copysignf(x, y))
EMU_MATH2(divide, x / y)
EMU_MATH2(fdim, __builtin_fdimf(x, y))
EMU_MATH2(fmax, __builtin_fmaxf(x, y))
EMU_MATH2(fmin, __builtin_fminf(x, y))
EMU_MATH2(fmod, __builtin_fmodf(x, y))
EMU_MATH2(nextafter, __builtin_nextafterf(x, y))
EMU_MATH2(pow, __builtin_powf(x, y))
EMU_MATH2(powr, __builtin_powf(x, y))
EMU_MATH2(step, y < x ? 0.0f : 1.0f)

EMU_INLINE float __metal_fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
EMU_INLINE float __metal_fmax3(float x, float y, float z, int) {
  return __builtin_fmaxf(__builtin_fmaxf(x, y), z);
}
EMU_INLINE float __metal_fmin3(float x, float y, float z, int) {
  return __builtin_fminf(__builtin_fminf(x, y), z);
}
EMU_INLINE float __metal_fmedian3(float x, float y, float z, int) {
  return __builtin_fmaxf(__builtin_fminf(x, y),
                         __builtin_fminf(__builtin_fmaxf(x, y), z));
}
EMU_INLINE float __metal_ldexp(float x, int k, int = 0) { return __builtin_ldexpf(x, k); }
EMU_INLINE float __metal_frexp(float x, int* e, int = 0) { return __builtin_frexpf(x, e); }
EMU_INLINE float __metal_frexp(float x, int& e, int = 0) { return __builtin_frexpf(x, &e); }

namespace metal {
EMU_INLINE float ldexp(float x, int k) { return __metal_ldexp(x, k); }
EMU_INLINE float frexp(float x, int& e) { return __metal_frexp(x, e); }
EMU_INLINE float modf(float x, float& whole) { return __builtin_modff(x, &whole); }
EMU_INLINE float sincos(float x, float& c) {
  c = cos(x);
  return sin(x);
}
EMU_INLINE bool isnan(float x) { return x != x; }
EMU_INLINE bool isnan(half x) { return x != x; }
EMU_INLINE bool isnan(bfloat x) { return x != x; }
EMU_INLINE bool isinf(float x) { return __builtin_isinf(x); }
EMU_INLINE bool isinf(half x) { return __builtin_isinf(float(x)); }
EMU_INLINE bool isinf(bfloat x) { return __builtin_isinf(float(x)); }
EMU_INLINE bool isfinite(float x) { return __builtin_isfinite(x); }
EMU_INLINE bool isfinite(half x) { return __builtin_isfinite(float(x)); }
EMU_INLINE bool isfinite(bfloat x) { return __builtin_isfinite(float(x)); }
EMU_INLINE bool signbit(float x) { return as_type<int>(x) < 0; }
}  // namespace metal
