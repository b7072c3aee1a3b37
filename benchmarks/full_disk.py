"""A disk that fills up, for real: sudo .venv-bench/bin/python benchmarks/full_disk.py

Linux only: mounts a small tmpfs, which needs root. A conversion is refused beforehand where the
folder cannot fit; where it could, another program takes the room in the middle, and after that
gives it back. The folder that comes out must equal an undisturbed one, byte for byte.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import checkpoints
from conversion import ROOT, make

SHARD = "100MB"


@contextmanager
def disk(size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes."""
    with tempfile.TemporaryDirectory() as place:
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
        subprocess.run(["mount", *options], check=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qwen35_mlx.convert", str(source), "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--bits", "4", "--shard-size", SHARD],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and the last line on stderr."""
    _, errors = process.communicate()
    return process.returncode, errors.strip().splitlines()[-1]


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


def filled_midway(source: Path, place: Path) -> dict[str, str]:
    """Convert into `place` while something else fills it, then again with the room given back."""
    out, filler = place / "out", place / "filler"
    process = start(source, out)
    while process.poll() is None and not list(place.glob("out.partial/model-*.safetensors")):
        time.sleep(0.01)
    with filler.open("wb") as file:
        try:
            while file.write(bytes(1 << 20)):
                file.flush()
        except OSError:
            pass
    code, line = ended(process)
    kept = len(list(place.glob("out.partial/model-*.safetensors")))
    begun = len(list(place.glob("out.partial/*.tmp")))
    print(f"full in the middle: exit {code}, {kept} finished shards stay, {begun} .tmp\n  {line}")
    assert code == 2 and "full" in line and kept
    filler.unlink()
    code, line = ended(start(source, out))
    print(f"the same command again: exit {code}\n  {line}")
    assert code == 0
    return digests(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=checkpoints.DEFAULT_CACHE)
    args = parser.parse_args()
    source = make("2b", 4, args.cache)
    with disk(300_000_000) as place:
        code, line = ended(start(source, place / "out"))
        left = [path.name for path in place.rglob("*") if path.is_file()]
        print(f"too small beforehand: exit {code}, left behind {left}\n  {line}")
        assert code == 2 and "disk" in line and not left
    with disk(2_000_000_000) as place:
        assert ended(start(source, place / "out"))[0] == 0
        undisturbed = digests(place / "out")
    with disk(2_000_000_000) as place:
        assert filled_midway(source, place) == undisturbed
    print("byte-identical to an undisturbed conversion")


if __name__ == "__main__":
    main()
