"""What MODEL on the command line stands for, and where its headers and weights come from."""

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from qwen35_mlx import hub
from qwen35_mlx.family import Size, find

from . import folder, published
from .job import Supply
from .source import Source, open_folder

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Model:
    """A local folder, or the repository called `name`.

    name: what the result will declare as its source. size: where it was named by its size.
    """

    name: str
    folder: Path | None = None
    size: Size | None = None


@dataclass(frozen=True)
class Found:
    """A model's headers and what has to be fetched for its weights.

    what: where the headers are from, for people. download: bytes of all that is missing.
    streaming: bytes of weight files that lie on the disk for a while, where `supply` brings them.
    """

    source: Source
    what: str
    revision: str | None = None
    download: int = 0
    supply: Supply | None = None
    streaming: int = 0

    @property
    def lacks(self) -> str:
        """What config.json declares and the source does not give, for people; may be empty."""
        parts = self.source.lacking
        return f"no {' and no '.join(parts)}, which config.json declares" if parts else ""


def model_of(given: str) -> Model:
    """A folder where there is one, else the repository of a size, else one named on the Hub.

    Raises: ModelError when it is none of these.
    """
    path, size = Path(os.path.expanduser(given)), find(given)
    if os.path.isfile(path / "config.json") or (size is None and os.path.isdir(path)):
        return Model(path.resolve().name or "model", folder=path)
    if size is not None:
        return Model(size.hf_id, size=size)
    if not hub.HUB_ID.fullmatch(given) or ".." in given or "--" in given:
        hub.resolve(given)  # says what a name may be
    return Model(given)


def headers(model: Model, out: Path, stream: bool, revision: str | None) -> Found:
    """Enough to plan by; no weights are fetched, and nothing at all for a size.

    out: the folder to be made, beside which streamed files would lie.
    Raises: ModelError when the headers are not to be had.
    """
    if model.size is not None and revision is None:
        found = Found(published.source(model.size), "published shapes")
        return found if cached(model.name, None) else _with_transport(found, stream)
    found_here = here(model, revision)
    return found_here or _with_transport(streamed(model, out, revision), stream)


def here(model: Model, revision: str | None) -> Found | None:
    """The source, when all of it is on this machine."""
    if model.folder is not None:
        return Found(open_folder(model.folder), "local folder")
    snapshot = cached(model.name, revision)
    return of_snapshot(snapshot) if snapshot else None


def commit(model: Model, revision: str) -> str:
    """The commit that `revision` means: itself, or what the Hub says of a branch or tag.

    Raises: ModelError when the Hub does not say.
    """
    return revision if COMMIT.fullmatch(revision) else hub.listing(model.name, revision).revision


def of_snapshot(snapshot: Path) -> Found:
    """A folder of the Hugging Face cache, which is called like the commit it holds."""
    return Found(open_folder(snapshot), "Hugging Face cache", snapshot.name)


def cached(repo: str, revision: str | None) -> Path | None:
    """The complete folder of `repo` in the Hugging Face cache; no network."""
    from huggingface_hub import try_to_load_from_cache

    with hub.explained(repo):  # a name that the client does not like
        found = try_to_load_from_cache(repo, "config.json", revision=revision)
    snapshot = Path(found).parent if isinstance(found, str) else None
    return snapshot if snapshot is not None and hub.is_complete(snapshot) else None


def streamed(model: Model, out: Path, revision: str | None) -> Found:
    """The headers from the Hub, and what brings the weight files one by one."""
    from . import remote

    # Inside the unfinished folder: what is left after a failure is in one place.
    source, supply = remote.open_hub(
        model.name, folder.partial_of(out) / folder.DOWNLOADS, revision
    )
    what = "headers from the Hub"
    return Found(source, what, supply.revision, supply=supply, streaming=supply.spare_bytes)


def _with_transport(found: Found, stream: bool) -> Found:
    """The bytes that the disk takes beside the output, for a model that is not here yet."""
    if not stream:
        return replace(found, download=found.source.nbytes, streaming=0)
    files: Counter[Path] = Counter()
    for entry in found.source.entries.values():
        files[entry.file] += entry.nbytes
    return replace(found, streaming=sum(sorted(files.values())[-2:]))
