// metal::numeric_limits, and the constants of the math library.
#pragma once

namespace metal {
template <class T>
struct numeric_limits;

#define EMU_INTEGER_LIMITS(T, LOW, HIGH)                       \
  template <>                                                  \
  struct numeric_limits<T> {                                   \
    static constexpr T min() { return LOW; }                   \
    static constexpr T lowest() { return LOW; }                \
    static constexpr T max() { return HIGH; }                  \
    static constexpr constant bool is_signed = (LOW) != 0;     \
    static constexpr constant bool is_integer = true;          \
    static constexpr constant int digits = 8 * sizeof(T) - ((LOW) != 0); \
  };
EMU_INTEGER_LIMITS(bool, false, true)
EMU_INTEGER_LIMITS(int8_t, -128, 127)
EMU_INTEGER_LIMITS(uint8_t, 0, 255)
EMU_INTEGER_LIMITS(int16_t, -32768, 32767)
EMU_INTEGER_LIMITS(uint16_t, 0, 65535)
EMU_INTEGER_LIMITS(int32_t, -2147483647 - 1, 2147483647)
EMU_INTEGER_LIMITS(uint32_t, 0, 4294967295u)
EMU_INTEGER_LIMITS(int64_t, -9223372036854775807l - 1, 9223372036854775807l)
EMU_INTEGER_LIMITS(uint64_t, 0, 18446744073709551615ul)

#define EMU_FLOAT_LIMITS(T, U, MIN, MAX, EPS, INF, NAN, DIGITS)                   \
  template <>                                                                     \
  struct numeric_limits<T> {                                                      \
    static constexpr T min() { return __builtin_bit_cast(T, U(MIN)); }            \
    static constexpr T max() { return __builtin_bit_cast(T, U(MAX)); }            \
    static constexpr T lowest() { return -max(); }                                \
    static constexpr T epsilon() { return __builtin_bit_cast(T, U(EPS)); }        \
    static constexpr T infinity() { return __builtin_bit_cast(T, U(INF)); }       \
    static constexpr T quiet_NaN() { return __builtin_bit_cast(T, U(NAN)); }      \
    static constexpr constant bool is_signed = true;                              \
    static constexpr constant bool is_integer = false;                            \
    static constexpr constant int digits = DIGITS;                                \
  };
EMU_FLOAT_LIMITS(float, uint32_t, 0x00800000, 0x7f7fffff, 0x34000000, 0x7f800000, 0x7fc00000, 24)
EMU_FLOAT_LIMITS(half, uint16_t, 0x0400, 0x7bff, 0x1400, 0x7c00, 0x7e00, 11)
EMU_FLOAT_LIMITS(bfloat, uint16_t, 0x0080, 0x7f7f, 0x3c00, 0x7f80, 0x7fc0, 8)
}  // namespace metal

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.40282347e+38f
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define HALF_MAX (as_type<half>(uint16_t(0x7bff)))
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f
#define M_1_PI_F 0.31830988618379067154f
