// A stand-in for MLX's complex type, whose members are qualified by address space: what its other
// headers need of it and no more.
#pragma once

template <typename T>
static constexpr constant bool is_complex_v = false;

template <typename T>
struct complex_t {
  using value_type = T;
  T real;
  T imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T re, T im = T(0)) : real(re), imag(im) {}
};
using complex64_t = complex_t<float>;
template <typename T>
static constexpr constant bool is_complex_v<complex_t<T>> = true;
