"""Fixtures that several test files use."""

from collections.abc import Iterator

import mlx.core as mx
import pytest

from metal_cpu import Launch, emulated


@pytest.fixture
def metal_backend() -> Iterator[list[Launch] | None]:
    """Custom kernels run: on the GPU where there is Metal, in the emulator elsewhere.

    Yields the launches that the emulator saw, None on a GPU. Tests that look for problems or count
    bytes open `emulated` themselves, which works on both.
    """
    if mx.metal.is_available():
        yield None
        return
    with emulated() as launches:
        yield launches
