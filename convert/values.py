"""Stored floats that are no numbers."""

from typing import Any

import numpy as np

# Type of a float's bits, the same with a sign, and the bits that are all set in an infinity or NaN;
# E4M3 has no infinity.
FLOATS: dict[str, tuple[type[np.unsignedinteger[Any]], type[np.signedinteger[Any]], int]] = {
    "BF16": (np.uint16, np.int16, 0x7F80),
    "F16": (np.uint16, np.int16, 0x7C00),
    "F32": (np.uint32, np.int32, 0x7F800000),
    "F8_E4M3": (np.uint8, np.int8, 0x7F),
}


def not_finite(data: bytes, dtype: str) -> int:
    """How many infinities and NaN there are in the bytes of a tensor; 0 for what is no float."""
    if dtype not in FLOATS or not data:
        return 0
    unsigned, signed, full = FLOATS[dtype]
    bits = np.frombuffer(data, unsigned)
    # The largest positive and the largest negative one tell, in half the time of counting.
    if bits.view(signed).max() < full and bits.max() < full | np.iinfo(signed).max + 1:
        return 0
    return int(np.count_nonzero((bits & full) == full))
