"""What the benchmarks print that a test can know."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen35_mlx.kernels import library

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_table_of_traffic_has_every_kernel_and_no_byte_too_many() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/kernel_traffic.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {row[0].rstrip(":") for row in rows} == set(library.names())
    for row in rows:
        *_, read, read_unique, _, written, written_unique, _, _, _ = row
        parts = row[0].startswith("top_k")  # two launches share what one operation must touch
        assert parts or (read, written) == (read_unique, written_unique), row
