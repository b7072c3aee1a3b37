// Conversions that clang leaves to its run-time library, which is not linked: float to bfloat, and
// half where the processor has no instruction for it.
#pragma once
#include "engine.h"

extern "C" {
__bf16 __truncsfbf2(float x) {
  u32 u = __builtin_bit_cast(u32, x);
  u16 rounded = x != x ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return __builtin_bit_cast(__bf16, rounded);
}

#if defined(__x86_64__)
float __extendhfsf2(_Float16 x) {
  u32 h = __builtin_bit_cast(u16, x), sign = (h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
  if (e == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | m << 13);
  if (e) return __builtin_bit_cast(float, sign | (e + 112) << 23 | m << 13);
  float small = (float)(int)m * 0x1p-24f;
  return sign ? -small : small;
}

_Float16 __truncsfhf2(float x) {
  u32 u = __builtin_bit_cast(u32, x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff, h;
  if (a > 0x7f800000) {
    h = 0x7e00 | (a >> 13 & 1023);
  } else if (a >= 0x477ff000) {
    h = 0x7c00;
  } else if (a >= 0x38800000) {
    h = (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13;
  } else {
    // Adding 0.5 leaves the rounded subnormal in the lowest bits.
    h = __builtin_bit_cast(u32, __builtin_bit_cast(float, a) + 0.5f) - 0x3f000000;
  }
  return __builtin_bit_cast(_Float16, (u16)(sign | h));
}
#endif
}
