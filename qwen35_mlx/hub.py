"""Where a model comes from: a local folder, a size name or a Hub id. The one place that downloads.

Nothing here prints: the command says what was chosen before it calls `download`.
"""

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from . import config, family, shards
from .errors import ModelError, Qwen35Error, one_line
from .files import home
from .template import Template

# What a model folder holds; never code, pickles or GGUF. Sub-folders hold other formats.
SMALL = ("*.json", "*.jinja", "*.txt")
ALLOW = ("*.safetensors", *SMALL)
IGNORE = ("*/*",)
SPARE = 1 << 30  # a full disk breaks more than this program
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Choice:
    """What a name stands for. Either `folder` is there already, or `repo` has to be downloaded."""

    name: str  # as given
    why: str  # one phrase for people
    folder: Path | None = None
    repo: str | None = None
    total_bytes: int = 0  # all files of `repo`
    bytes: int = 0  # of them, still to be fetched
    free: int = 0  # on the disk of `cache`
    cache: Path | None = None  # folder that receives the download


@dataclass(frozen=True)
class Listing:
    """The files of a model on the Hub that we would fetch, at one commit."""

    revision: str  # of the commit
    sizes: dict[str, int]  # bytes by name
    digests: dict[str, str]  # sha256 by name, of the large ones


def resolve(name: str) -> Choice:
    """Decide which model folder `name` means; asks the Hub only when nothing complete is here.

    A size name ("4b") is the newest complete conversion under `models()`, else mlx-community's
    4-bit folder. A Hub id ("org/name") is that repository, from the cache when it is complete.

    Raises: ModelError when the name stands for nothing, or the Hub does not give it.
    """
    # os.path answers False where Path raises: names too long, unknown users, no permission.
    path = Path(os.path.expanduser(name))
    size = family.find(name)
    if name and os.path.isfile(path / "config.json"):
        return Choice(name, "local folder", folder=path)
    if size is not None:
        if (made := conversion(size)) is not None:
            return Choice(name, f"newest local conversion of {size.name}", folder=made)
        instead = f"Try {size.hf_id}, the original weights."
        return _hub(name, size.mlx_id, f"the 4-bit folder of {size.name}", instead)
    if name and os.path.isdir(path):
        return Choice(name, "local folder", folder=path)
    if os.path.isfile(path):
        raise ModelError(f"{name}: is a file; expected a model folder. Give the folder it lies in.")
    if HUB_ID.fullmatch(name) and ".." not in name and "--" not in name:
        return _hub(name, name, "named on the Hub")
    sizes = ", ".join(known.name.lower() for known in family.SIZES)
    raise ModelError(
        f"{name}: no such folder; expected a model folder, a Hub id such as Qwen/Qwen3.5-4B, "
        f"or a size ({sizes}). Check the spelling."
    )


def download(choice: Choice, progress: Callable[[int, int], None] | None = None) -> Path:
    """Fetch `choice` into the Hugging Face cache unless it is here; an interrupted one goes on.

    progress: called with bytes done and bytes to fetch, several times a second.
    Returns: the model folder.
    Raises: ModelError when the disk cannot take it, the folder is not Qwen3.5, or the Hub fails.
    """
    if choice.folder is not None:
        return choice.folder
    if choice.repo is None or choice.cache is None:
        raise ValueError("a Choice has a folder, or a repo and a cache")
    if choice.bytes + SPARE > choice.free:
        raise ModelError(
            f"{choice.repo}: needs {choice.bytes / 1e9:,.1f} GB and {SPARE / 1e9:.1f} GB to spare; "
            f"{choice.free / 1e9:,.1f} GB are free in {choice.cache}. "
            "Free some, or point HF_HOME at a larger disk."
        )
    # Another family is refused before its weights are fetched.
    config.read(_fetch(choice.repo, choice.cache, ("config.json",)))
    with _watched(choice, progress):
        # The weights come last: an interrupted download never has them all and lacks something.
        _fetch(choice.repo, choice.cache, SMALL)
        return _fetch(choice.repo, choice.cache, ALLOW)


def models() -> Path:
    """Folder of the conversions made on this machine: `$QWEN35_HOME/models`."""
    return home() / "models"


def conversion(size: family.Size) -> Path | None:
    """The newest complete conversion of a size on this machine."""
    return next((folder for folder in _conversions() if _is_size(folder, size)), None)


def is_complete(folder: Path) -> bool:
    """Whether configuration, tokenizer, chat template and every weight file are here and whole."""
    if not all(os.path.isfile(folder / name) for name in ("config.json", "tokenizer.json")):
        return False
    try:
        Template.read(folder)
        return bool(shards.entries(folder))
    except ModelError:
        return False


def listing(
    repo: str, revision: str | None = None, instead: str = "Check the spelling."
) -> Listing:
    """What the Hub says `repo` holds at `revision`, a branch, tag or commit; None: its main branch.

    instead: advice for a repository that is not there.
    Raises: ModelError when the Hub does not say, or it is no model folder.
    """
    from huggingface_hub import HfApi

    with explained(repo, instead):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = {
        entry.rfilename: entry
        for entry in info.siblings or []
        if any(fnmatch(entry.rfilename, pattern) for pattern in ALLOW)
        and not any(fnmatch(entry.rfilename, pattern) for pattern in IGNORE)
    }
    if "config.json" not in files or not any(f.endswith(".safetensors") for f in files):
        raise ModelError(
            f"{repo}: holds no config.json with safetensors beside it; expected a Qwen3.5 model "
            "folder. GGUF and other formats are not read: give another repository."
        )
    sizes = {name: entry.size or 0 for name, entry in files.items()}
    digests = {name: entry.lfs.sha256 for name, entry in files.items() if entry.lfs}
    return Listing(str(info.sha), sizes, digests)


def small_files(repo: str, revision: str) -> Path:
    """The snapshot folder of that commit in the cache, with every file but the weights in it.

    Raises: ModelError when the Hub does not give them.
    """
    from huggingface_hub import constants

    return _fetch(repo, Path(constants.HF_HUB_CACHE), (*SMALL, "LICENSE"), revision)


def _conversions() -> list[Path]:
    """Complete folders under `models()`, newest first."""
    try:
        folders = [folder for folder in models().iterdir() if is_complete(folder)]
    except OSError:  # usually: nothing was converted yet
        return []
    return sorted(folders, key=lambda f: (f / "config.json").stat().st_mtime, reverse=True)


def _is_size(folder: Path, size: family.Size) -> bool:
    try:
        text = config.read(folder).text
    except ModelError:
        return False
    found = family.identify(text.hidden_size, text.num_hidden_layers, text.num_experts)
    return found is not None and found.name == size.name


def _hub(name: str, repo: str, why: str, instead: str = "Check the spelling.") -> Choice:
    """The cached snapshot when it is complete, else what the Hub lists and how much is missing."""
    # Only the constants: importing the client takes most of a second.
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    store = _store(cache, repo)
    try:
        snapshot = store / "snapshots" / (store / "refs" / "main").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        snapshot = store
    if is_complete(snapshot):
        return Choice(name, f"{why}, from the Hugging Face cache", folder=snapshot, repo=repo)
    listed = listing(repo, instead=instead)
    files = listed.sizes
    missing = sum(files.values()) - _present(store, listed.revision, files)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return Choice(
        name,
        why,
        repo=repo,
        total_bytes=sum(files.values()),
        bytes=max(missing, 0),
        free=shutil.disk_usage(existing).free,
        cache=cache,
    )


def _fetch(repo: str, cache: Path, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """The snapshot folder of `repo`, with every file that matches in it."""
    from huggingface_hub import snapshot_download

    with explained(repo):
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            allow_patterns=list(patterns),
            ignore_patterns=list(IGNORE),
            tqdm_class=_silent(),
        )
    return Path(folder)


def _present(store: Path, revision: str, files: dict[str, int]) -> int:
    """Bytes of `files` that are here: finished ones, and the beginnings of interrupted ones."""
    finished = sum(
        size for f, size in files.items() if (store / "snapshots" / revision / f).exists()
    )
    return min(finished + _bytes(store / "blobs", "*.incomplete"), sum(files.values()))


@contextmanager
def _watched(choice: Choice, progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Report how much of `choice` has arrived on the disk while the Hub's client fetches it.

    The client's own bars differ between its releases and its transports; the files do not.
    """
    if progress is None or choice.repo is None or choice.cache is None:
        yield
        return
    blobs = _store(choice.cache, choice.repo) / "blobs"
    begin, over = _bytes(blobs, "*"), threading.Event()

    def poll() -> None:
        while not over.wait(POLL_SECONDS):
            progress(min(max(_bytes(blobs, "*") - begin, 0), choice.bytes), choice.bytes)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    progress(choice.bytes, choice.bytes)


def _silent() -> Any:
    """A bar of the Hub client's own kind that shows nothing, on a terminal too."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):  # type: ignore[misc, valid-type, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent


@contextmanager
def explained(repo: str, instead: str = "Check the spelling.") -> Iterator[None]:
    """Whatever the Hub's client raises, as one ModelError with advice."""
    try:
        yield
    except (Qwen35Error, TypeError, AttributeError, NameError):
        raise  # ours: said already, or a broken call, which is no fault of the network
    except Exception as error:
        raise ModelError(_explanation(repo, error, instead)) from error


def _explanation(repo: str, error: Exception, instead: str) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo}: is gated on {hub}; expected access. Accept its terms at {hub}/{repo}, "
            "then run `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repo}: has no such revision on {hub}; expected a branch, a tag or all 40 characters "
            "of a commit. Check --revision."
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return (
            f"{repo}: not found on {hub}, or private; expected a repository you may read. "
            f"{instead} For a private one run `hf auth login`."
        )
    if status in (401, 403):
        return (
            f"{repo}: {hub} refuses access ({status}); expected a valid token. "
            "Run `hf auth login` or check HF_TOKEN."
        )
    if status is not None:
        return f"{repo}: {hub} answered {status}; expected 200. Try again later."
    if constants.HF_HUB_OFFLINE or isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{repo}: not complete in the Hugging Face cache, and HF_HUB_OFFLINE is set; expected "
            "the network or the files. Unset it, or give a local folder."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{repo}: the disk is full; expected room in {constants.HF_HUB_CACHE}. Free some."
    return (
        f"{repo}: cannot be fetched from {hub} ({type(error).__name__}: {one_line(error)}). "
        "Check the network and try again, or give a local folder."
    )


def _store(cache: Path, repo: str) -> Path:
    """Folder of one repository in the Hugging Face cache; its layout is documented and stable."""
    return cache / f"models--{repo.replace('/', '--')}"


def _bytes(folder: Path, pattern: str) -> int:
    """Bytes of the files that match; a file may vanish (be renamed) while we look."""
    total = 0
    for path in folder.glob(pattern):
        with suppress(OSError):
            total += path.stat().st_size
    return total
