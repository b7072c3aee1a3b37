"""Fixtures that several test files use."""

import os
from collections.abc import Iterator

import mlx.core as mx
import pytest

from metal_cpu import Launch, emulated
from qwen35_mlx.kernels import library

# Which kernels are used is each test's own decision: on a Mac, too, no model tries them when it is
# loaded, and nothing is written below the user's caches.
os.environ["QWEN35_REFERENCE"] = "1"


@pytest.fixture(autouse=True)
def no_kernel_is_left_in_use() -> Iterator[None]:
    library.forget()
    yield
    library.forget()


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
