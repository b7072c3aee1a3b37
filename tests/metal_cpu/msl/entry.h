// How the generated entry point reads an attribute.
#pragma once
#include "attributes.h"

namespace emu {
EMU_INLINE uint attribute(unsigned x) { return x; }
EMU_INLINE uint3 attribute(const unsigned (&x)[3]) { return uint3{x[0], x[1], x[2]}; }
}  // namespace emu
