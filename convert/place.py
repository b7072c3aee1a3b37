"""Whether this machine can make OUT, judged before anything is fetched or written."""

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen35_mlx import memory
from qwen35_mlx.errors import ConversionError, ModelError, shown

from . import folder, overview
from .job import SPARE
from .origin import Found, Model
from .overview import Overview
from .plan import Plan


def named(given: str) -> Path:
    """A folder as it was typed. Raises: ConversionError when it starts from one that is gone."""
    path = Path(os.path.expanduser(given))
    try:
        path.absolute()
    except OSError:
        raise ConversionError(
            f"{shown(path)}: the working folder is gone; expected one, or a whole path. Change to "
            "another folder."
        ) from None
    return path


def assessed(model: Model, out: Path, found: Found, planned: Plan) -> Overview:
    """What the conversion needs of this machine, beside what is there."""
    from huggingface_hub import constants

    done = sum(file.stat().st_size for file in folder.partial_of(out).glob("*.safetensors"))
    uses = [(out, "output", max(planned.output_bytes - done, 0))]
    if found.streaming:
        uses.insert(0, (out, "two source files", found.streaming))
    if found.download:
        uses.insert(0, (Path(constants.HF_HUB_CACHE), "download", found.download))
    disks = overview.disks(uses)
    what = "; ".join(filter(None, (found.what, found.lacks)))
    return Overview(model.name, out, what, planned, disks, available_memory(), SPARE)


def available_memory() -> int:
    """Bytes this process may still use: of the machine, and below a limit set by `ulimit -v`."""
    free, statm = memory.available(), Path("/proc/self/statm")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or not statm.is_file():
        return free
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    return max(0, min(free, limit - taken))


def require_room(needs: Overview) -> None:
    """Raises: ConversionError before anything is begun that this machine cannot end."""
    needed = sum(disk.needed for disk in needs.disks)
    if needs.obstacles:
        raise ConversionError(
            f"{shown(needs.out)}: {'; '.join(needs.obstacles)}; {needed:,} bytes of disk and "
            f"{needs.plan.peak_memory:,} of memory are needed. Free some, choose another --out, or "
            "see what --plan says."
        )


def require_writable(out: Path) -> None:
    """Raises: ConversionError before anything is fetched for a folder that cannot be made."""
    above = next(path for path in folder.partial_of(out).parents if os.path.exists(path))
    try:
        tempfile.TemporaryDirectory(dir=above).cleanup()
    except OSError as error:
        raise ConversionError(
            f"{shown(out)}: nothing can be made in {shown(above)} ({error.strerror}); expected a "
            "folder that can be written. Choose another --out."
        ) from None


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """What the file system refuses, as one line."""
    try:
        yield
    except OSError as error:
        path = Path(os.path.realpath(error.filename or out))
        ours = (Path(os.path.realpath(out)), folder.partial_of(out))
        if not any(path == mine or path in mine.parents or mine in path.parents for mine in ours):
            raise ModelError(
                f"{shown(error.filename)}: {error.strerror or error}; expected to read it. Mend "
                "that and run the same command."
            ) from None
        raise ConversionError(
            f"{shown(error.filename or out)}: {error.strerror or error}; expected a folder that "
            "can be written. Mend that, or choose another --out."
        ) from None
