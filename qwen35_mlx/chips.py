"""Memory bandwidth of Apple's chips, which bounds what a kernel can do.

Source: the technical specifications that Apple publishes with each Mac. A chip that is not here
has no share in a table: better none than a wrong one.
"""

# GB/s by the name that Metal gives the chip.
_GBPS = {
    "Apple M1": 68.25,
    "Apple M1 Pro": 200,
    "Apple M1 Max": 400,
    "Apple M1 Ultra": 800,
    "Apple M2": 100,
    "Apple M2 Pro": 200,
    "Apple M2 Max": 400,
    "Apple M2 Ultra": 800,
    "Apple M3": 100,
    "Apple M3 Pro": 150,
    "Apple M3 Ultra": 819,
    "Apple M4": 120,
    "Apple M4 Pro": 273,
    "Apple M5": 153,
    "Apple M5 Pro": 307,
}
# These come with fewer cores and a narrower memory too, which only the sizes sold with it tell:
# GB of memory of the narrower one, its GB/s, and those of the wider.
_TWO_KINDS = {
    "Apple M3 Max": ((36, 96), 300, 400),
    "Apple M4 Max": ((36,), 410, 546),
    "Apple M5 Max": ((36,), 460, 614),
}


def bandwidth(name: str, memory_bytes: int) -> float | None:
    """GB/s of the chip that Metal calls `name`, in a Mac with so much memory; None if unknown."""
    if name in _TWO_KINDS:
        narrow, few, many = _TWO_KINDS[name]
        return few if round(memory_bytes / 2**30) in narrow else many
    return _GBPS.get(name)
