// simdgroup_matrix of 8x8: two elements in each lane, products in float.
#pragma once

namespace metal {
template <class T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "Metal has 8x8 matrices only");
  static_assert(is_floating_point_v<T>, "of float, half or bfloat");
  using pair = vec<T, 2>;
  pair held;
  simdgroup_matrix() = default;
  explicit EMU_INLINE simdgroup_matrix(T diagonal);
  EMU_INLINE pair& thread_elements() { return held; }
  EMU_INLINE const pair& thread_elements() const { return held; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;
}  // namespace metal

extern "C" __attribute__((const)) uint emu_lane();

namespace emu {
EMU_INLINE uint fragment_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
EMU_INLINE uint fragment_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

template <class T>
EMU_INLINE uint64_t widen(vec<T, 2> x) {
  return __builtin_bit_cast(uint64_t, __builtin_convertvector(x, float2));
}

template <class V, class P>
EMU_INLINE V matrix_load(const P* from, ulong stride, ulong2 origin, bool transpose) {
  emu_converge();
  uint row = fragment_row(emu_lane()), column = fragment_column(emu_lane());
  V v;
  for (uint i = 0; i < 2; ++i) {
    ulong x = transpose ? row : column + i, y = transpose ? column + i : row;
    v[i] = from[(y + origin.y) * stride + x + origin.x];
  }
  return v;
}
template <class V, class P>
EMU_INLINE void matrix_store(V v, P* to, ulong stride, ulong2 origin, bool transpose) {
  emu_converge();
  uint row = fragment_row(emu_lane()), column = fragment_column(emu_lane());
  for (uint i = 0; i < 2; ++i) {
    ulong x = transpose ? row : column + i, y = transpose ? column + i : row;
    to[(y + origin.y) * stride + x + origin.x] = v[i];
  }
}
}  // namespace emu

namespace metal {
template <class T, int R, int C>
EMU_INLINE simdgroup_matrix<T, R, C>::simdgroup_matrix(T diagonal) {
  uint row = emu::fragment_row(emu_lane()), column = emu::fragment_column(emu_lane());
  held[0] = row == column ? diagonal : T(0);
  held[1] = row == column + 1 ? diagonal : T(0);
}

#define EMU_MATRIX_MEMORY(SPACE)                                                                \
  template <class T>                                                                            \
  EMU_INLINE void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const SPACE T* from,             \
                                 ulong stride = 8, ulong2 origin = ulong2(0),                   \
                                 bool transpose = false) {                                      \
    m.held = emu::matrix_load<typename simdgroup_matrix<T, 8, 8>::pair>(from, stride, origin,   \
                                                                        transpose);             \
  }                                                                                             \
  template <class T>                                                                            \
  EMU_INLINE void simdgroup_store(simdgroup_matrix<T, 8, 8> m, SPACE T* to, ulong stride = 8,   \
                                  ulong2 origin = ulong2(0), bool transpose = false) {          \
    emu::matrix_store(m.held, to, stride, origin, transpose);                                   \
  }
EMU_MATRIX_MEMORY(device)
EMU_MATRIX_MEMORY(threadgroup)

template <class D, class A, class B, class C>
EMU_INLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                              const simdgroup_matrix<A, 8, 8>& a,
                                              const simdgroup_matrix<B, 8, 8>& b,
                                              const simdgroup_matrix<C, 8, 8>& c) {
  uint64_t product =
      emu_multiply(emu::widen<A>(a.held), emu::widen<B>(b.held), emu::widen<C>(c.held));
  d.held = __builtin_convertvector(__builtin_bit_cast(float2, product),
                                   typename simdgroup_matrix<D, 8, 8>::pair);
}
template <class D, class A, class B>
EMU_INLINE void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b) {
  uint64_t product = emu_multiply(emu::widen<A>(a.held), emu::widen<B>(b.held), 0);
  d.held = __builtin_convertvector(__builtin_bit_cast(float2, product),
                                   typename simdgroup_matrix<D, 8, 8>::pair);
}
template <class T, int R, int C>
EMU_INLINE simdgroup_matrix<T, R, C> operator*(const simdgroup_matrix<T, R, C>& a,
                                               const simdgroup_matrix<T, R, C>& b) {
  simdgroup_matrix<T, R, C> d;
  simdgroup_multiply(d, a, b);
  return d;
}
template <class T, int R, int C = R>
EMU_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.held = value;
  return m;
}
}  // namespace metal
