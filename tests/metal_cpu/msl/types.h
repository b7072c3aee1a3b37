// The scalar and vector types of the Metal language, for clang on a CPU.
//
// An address space is one of clang's OpenCL attributes: the compiler then refuses to mix them as
// Metal does, and on a CPU all of them are the same memory.
#pragma once

#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
#define constant __attribute__((opencl_constant)) const
#define thread
#define METAL_FUNC inline __attribute__((always_inline))
// Without a debug line of its own an inlined instruction carries that of the kernel's call.
#define EMU_INLINE inline __attribute__((always_inline, nodebug))
#define __METAL__ 1
#define __METAL_VERSION__ 310

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

static_assert(sizeof(long) == 8, "Metal's long has 64 bits");

namespace emu {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// Element and length of a vector; a scalar has length 1.
template <class T>
struct shape {
  using elem = T;
  static constexpr int n = 1;
};
template <class T, int N>
struct shape<T __attribute__((ext_vector_type(N)))> {
  using elem = T;
  static constexpr int n = N;
};
template <class T>
struct shape<const T> : shape<T> {};

template <class A, class B>
struct same {
  static constexpr bool value = false;
};
template <class A>
struct same<A, A> {
  static constexpr bool value = true;
};
template <bool B, class T = void>
struct when {};
template <class T>
struct when<true, T> {
  using type = T;
};
template <bool B, class T, class F>
struct pick {
  using type = T;
};
template <class T, class F>
struct pick<false, T, F> {
  using type = F;
};

template <bool B, class T, class F>
using pick_t = typename pick<B, T, F>::type;

template <class V, class X, bool vector>
struct convert {
  static EMU_INLINE constexpr V run(X x) { return static_cast<V>(x); }
};
template <class V, class X>
struct convert<V, X, true> {
  static EMU_INLINE V run(X x) { return __builtin_convertvector(x, V); }
};

// static_cast between vectors would reinterpret the bits; Metal converts each element.
template <class V, class X>
EMU_INLINE constexpr V cast(X x) {
  static_assert(shape<X>::n == 1 || shape<X>::n == shape<V>::n, "vector lengths differ");
  return convert<V, X, (shape<X>::n > 1)>::run(x);
}

template <class V>
EMU_INLINE void fill(V&, int) {}
template <class V, class X, class... Rest>
EMU_INLINE void fill(V& v, int at, X x, Rest... rest);
template <class V, class X, bool vector>
struct place {
  static EMU_INLINE void run(V& v, int at, X x) { v[at] = typename shape<V>::elem(x); }
};
template <class V, class X>
struct place<V, X, true> {
  static EMU_INLINE void run(V& v, int at, X x) {
    for (int i = 0; i < shape<X>::n; ++i) v[at + i] = typename shape<V>::elem(x[i]);
  }
};
template <class V, class X, class... Rest>
EMU_INLINE void fill(V& v, int at, X x, Rest... rest) {
  place<V, X, (shape<X>::n > 1)>::run(v, at, x);
  fill(v, at + shape<X>::n, rest...);
}
template <class... X>
struct count {
  static constexpr int n = 0;
};
template <class X, class... Rest>
struct count<X, Rest...> {
  static constexpr int n = shape<X>::n + count<Rest...>::n;
};

// float4(a, b, c, d), float4(xy, z, w), float4(x), float4(h4), float4().
template <class V>
EMU_INLINE constexpr V make() {
  return V{};
}
template <class V, class X>
EMU_INLINE constexpr V make(X x) {
  return cast<V>(x);
}
template <class V, class X, class Y, class... Rest>
EMU_INLINE V make(X x, Y y, Rest... rest) {
  static_assert(count<X, Y, Rest...>::n == shape<V>::n, "as many values as elements");
  V v;
  fill(v, 0, x, y, rest...);
  return v;
}
}  // namespace emu

#define EMU_VECTORS(T)                                        \
  typedef T T##2 __attribute__((ext_vector_type(2)));         \
  typedef T T##3 __attribute__((ext_vector_type(3)));         \
  typedef T T##4 __attribute__((ext_vector_type(4)));         \
  typedef T##2 packed_##T##2 __attribute__((aligned(sizeof(T)))); \
  typedef T##4 packed_##T##4 __attribute__((aligned(sizeof(T))));
EMU_VECTORS(char)
EMU_VECTORS(short)
EMU_VECTORS(int)
EMU_VECTORS(long)
EMU_VECTORS(uchar)
EMU_VECTORS(ushort)
EMU_VECTORS(uint)
EMU_VECTORS(ulong)
EMU_VECTORS(half)
EMU_VECTORS(bfloat)
EMU_VECTORS(float)
// What clang gives for a comparison of float vectors; true is -1 in it.
typedef int2 bool2;
typedef int3 bool3;
typedef int4 bool4;

namespace metal {
using emu::vec;
template <class T>
using remove_cv_t = __remove_cv(T);
template <class A, class B>
struct is_same {
  static constexpr bool value = emu::same<A, B>::value;
};
template <class A, class B>
static constexpr constant bool is_same_v = emu::same<A, B>::value;
template <bool B, class T = void>
using enable_if = emu::when<B, T>;
template <bool B, class T = void>
using enable_if_t = typename emu::when<B, T>::type;
template <bool B, class T, class F>
using conditional = emu::pick<B, T, F>;
template <bool B, class T, class F>
using conditional_t = typename emu::pick<B, T, F>::type;
template <class A, class B>
static constexpr constant bool is_convertible_v = __is_convertible(A, B);
template <class T>
static constexpr constant bool is_floating_point_v =
    emu::same<T, float>::value || emu::same<T, half>::value || emu::same<T, bfloat>::value;
template <class T>
static constexpr constant bool is_integral_v = __is_integral(T);
template <class T>
static constexpr constant bool is_signed_v = __is_signed(T);
template <class T>
static constexpr constant bool is_unsigned_v = __is_unsigned(T);
}  // namespace metal

template <class To, class From>
EMU_INLINE constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, x);
}
namespace metal {
using ::as_type;
}
