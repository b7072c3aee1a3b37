"""Clips: frames from an animation, a folder, a list or a video file, sampled and cut into rows.

`open_video` only finds out how many frames there are and how fast they run; `patches` asks for the
sampled ones, in order, and resizes each as it comes, so a long clip is never held in memory.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError, ModelError, one_line, shown
from .files import brief
from .image import (
    ImageProcessor,
    Media,
    check_aspect,
    check_size,
    cut,
    damaged,
    fit,
    identify,
    open_image,
    quiet,
    row_length,
    to_rgb,
)
from .movie import Movie
from .settings import positive, read_settings, shared_settings
from .source import open_stream

SLOWEST, FASTEST = 1e-3, 1e4  # frames per second
RATE = "a number of frames per second from 0.001 to 10,000"
DEFAULT_FPS = 24.0  # of a source that does not say
PICTURE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2"]
)
ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")  # Pillow's names; one frame will do


@dataclass(frozen=True)
class VideoProcessor(ImageProcessor):
    """How clips become patches; areas are volumes (frames * height * width) here."""

    min_pixels: int = 4_096
    max_pixels: int = 25_165_824
    fps: float = 2.0  # frames sampled for each second of the source
    min_frames: int = 4
    max_frames: int = 768

    @classmethod
    def read(cls, folder: Path) -> "VideoProcessor":
        """The settings in a model folder; the family's where the folder has none.

        Raises: ModelError when a setting is malformed or contradicts another.
        """
        values, where = read_settings(folder, "video_preprocessor_config.json", "video_processor")
        found = shared_settings(values, where, cls())
        for name in ("min_frames", "max_frames"):
            value = values.get(name)
            found[name] = positive(getattr(cls, name) if value is None else value, name, where)
        if found["min_frames"] > found["max_frames"]:
            raise ModelError(
                f"{where}: min_frames {found['min_frames']} is above max_frames "
                f"{found['max_frames']}; the smaller first was expected. Swap them."
            )
        fps = cls.fps if values.get("fps") is None else values["fps"]
        if not _is_rate(fps):
            raise ModelError(f"{where}: fps is {brief(fps)}; {RATE} was expected. Use 2.")
        return cls(**found, fps=float(fps))


@dataclass(frozen=True)
class Clip:
    """RGB frames of one size at equal distances in time; `frames` may decode them when asked."""

    frames: Sequence[Image.Image]
    fps: float | None = None  # of the source; None when it does not say
    where: str = "video"  # begins the messages

    def __post_init__(self) -> None:
        if not len(self.frames):
            raise ValueError("a clip needs at least one frame")


def open_video(
    source: str | Path | bytes | Sequence[Any], where: str, fps: float | None = None
) -> Clip:
    """A clip from an animation, a video file, a folder of frames or a list of frames.

    `source` is the path, the bytes or the `data:` URL of a GIF, WebP, PNG or AVIF animation or of a
    video file (which needs PyAV), the path of a folder whose pictures are taken in natural order,
    or a list of what `open_image` takes. `fps` overrides the source's frames per second and makes
    an animation one frame after the other; without it an animation keeps its durations, unequal
    ones too.

    Raises: InputError.
    """
    if fps is not None and not _is_rate(fps):
        raise InputError(f"{where}: fps is {brief(fps)}; {RATE} was expected. Correct it.")
    if isinstance(source, str | Path) and _is_folder(source):
        return Clip(_Pictures(_frame_files(Path(source), where), where), fps, where)
    if isinstance(source, str | Path | bytes):
        return _open_file(source, where, fps)
    if not isinstance(source, Sequence) or not len(source):
        found = "an empty list" if isinstance(source, Sequence) else type(source).__name__
        raise InputError(
            f"{where}: {found}; a path or a list of pictures was expected. Pass one frame or more."
        )
    return Clip(_Pictures(source, where), fps, where)


def _is_rate(fps: Any) -> bool:
    number = isinstance(fps, int | float) and not isinstance(fps, bool)
    return number and SLOWEST <= fps <= FASTEST


def _is_folder(source: str | Path) -> bool:
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):  # a data: URL is too long for a name
        return False


def _frame_files(folder: Path, where: str) -> list[Path]:
    """The pictures of a folder; 2 comes before 10, hidden files do not count."""
    try:
        inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"{where}: {shown(folder)}: {one_line(error.strerror)}; a folder of frames was "
            "expected. Allow reading it."
        ) from None
    found = [path for path in inside if path.suffix.lower() in PICTURE_SUFFIXES]
    if not found:
        raise InputError(
            f"{where}: {shown(folder)} holds no pictures; a folder of frames was expected. "
            "Name the frames 1.png, 2.png, ..."
        )
    return sorted(found, key=_natural)


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name)  # text and digits take turns
    return [int(p) if i % 2 else p.casefold() for i, p in enumerate(parts)], path.name


def _open_file(source: str | Path | bytes, where: str, fps: float | None) -> Clip:
    with open_stream(source, where) as stream:
        image = identify(stream, where)
        if image is not None:
            check_size(*image.size, where)
            if image.format not in ANIMATIONS:
                return Clip((to_rgb(image, where),), fps, where)
            try:
                stream.seek(0)
                data = stream.read()
            except OSError as error:
                raise InputError(damaged(where, error)) from None
            animation = _Animation(data, where, fps)
            return Clip(animation, animation.fps, where)
        if not stream.seek(0, 2):
            raise InputError(f"{where}: 0 bytes; a clip was expected. Save or download it again.")
    movie = Movie(source, where)
    return Clip(movie, fps or movie.fps, where)


class _Pictures(Sequence[Image.Image]):
    """Frames that are pictures of their own, opened one at a time."""

    def __init__(self, sources: Sequence[Any], where: str) -> None:
        self.sources, self.where = sources, where

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        return open_image(self.sources[index], f"{self.where}, frame {index}")


class _Animation(Sequence[Image.Image]):
    """Frames of an animation on a regular time line, composited and decoded when asked for.

    The step of the time line is the greatest common divisor of the durations, so that every frame
    begins on it; equal durations give one step for each frame. With `fps` durations do not count.
    """

    def __init__(self, data: bytes, where: str, fps: float | None) -> None:
        self.data, self.where = data, where  # bytes, so that no file stays open
        self.image = self._start()
        durations = self._durations()
        step = math.gcd(*durations)
        # with `fps`, one step for each frame
        self.ends = list(accumulate(1 if fps else d // step for d in durations))
        self.fps = fps or 1000 / step

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        self._seek(bisect_right(self.ends, index))
        # a copy: the next seek draws over this frame
        return to_rgb(self.image.copy(), self.where)

    def _start(self) -> Image.Image:
        image = identify(BytesIO(self.data), self.where)
        if image is None:
            raise ValueError("an animation was expected")
        return image

    @quiet()
    def _seek(self, frame: int) -> None:
        try:
            self.image.seek(frame)
            self.image.load()
        except Exception as error:  # Pillow's readers raise a dozen types on damaged data
            raise InputError(
                f"{self.where}: frame {frame} cannot be decoded ({one_line(error)}); a whole "
                "animation was expected. Save or download it again."
            ) from None

    def _durations(self) -> list[int]:
        """Milliseconds each frame is shown; up to 10 means 100, as in every browser."""
        found = []
        for frame in range(self._count()):
            self._seek(frame)
            duration = round(self.image.info.get("duration", 0))
            found.append(duration if duration > 10 else 100)
        return found

    def _count(self) -> int:
        try:
            return max(1, getattr(self.image, "n_frames", 1))
        except Exception:  # damaged further on; reading the first frame tells more
            return 1


def clip_size(
    frames: int, height: int, width: int, processor: VideoProcessor, where: str
) -> tuple[int, int]:
    """The size all frames are resized to: (height, width) in whole blocks, volume in bounds.

    Sides below a block are scaled up first. Raises: InputError above 200 : 1.
    Source: transformers models/qwen3_vl/video_processing_qwen3_vl.py, `smart_resize`; the number of
    frames is rounded half to even there (5 frames count as 4), where vLLM and mlx-vlm round up.
    """
    factor = processor.patch_size * processor.merge_size
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_aspect(width, height, where)
    step = processor.temporal_patch_size
    frames = max(frames, step)  # one frame alone is repeated, the reference refuses it
    whole_frames = round(frames / step) * step
    return fit(
        height, width, factor, processor.min_pixels, processor.max_pixels, frames, whole_frames
    )


def sample(total: int, fps: float, processor: VideoProcessor) -> list[int]:
    """Indices of the frames the model sees: `processor.fps` a second, evenly from first to last.

    Source: transformers models/qwen3_vl/video_processing_qwen3_vl.py, `sample_frames`.
    """
    wanted = int(total / fps * processor.fps)
    count = min(max(wanted, processor.min_frames), processor.max_frames, total)
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


def patches(clip: Clip, processor: VideoProcessor) -> Media:
    """The rows of one clip, `[t * gh * gw, C * tp * ps * ps]` float32, and the time of each slice.

    An odd number of frames repeats the last; the time of a slice is the mean of its first and last
    frame's, in seconds. Raises: InputError when frames differ in size or cannot be decoded.
    Source: transformers models/qwen3_vl/{video_processing,processing}_qwen3_vl.py; the resizing is
    Pillow's bicubic there as for pictures, torchvision's in transformers (one level apart at most).
    """
    fps, step = clip.fps or DEFAULT_FPS, processor.temporal_patch_size
    indices = sample(len(clip.frames), fps, processor)
    first = clip.frames[indices[0]]
    height, width = clip_size(len(indices), first.height, first.width, processor, clip.where)
    indices += indices[-1:] * (-len(indices) % step)
    rows, columns = height // processor.patch_size, width // processor.patch_size
    slices = len(indices) // step
    out = np.empty((slices, rows * columns, row_length(processor)), np.float32)
    frames = np.empty((step, height, width, 3), np.uint8)
    for place, index in enumerate(indices):
        frame = clip.frames[index]
        if frame.size != first.size:
            raise InputError(
                f"{clip.where}: frame {index} is {frame.width} x {frame.height}, the first "
                f"{first.width} x {first.height}; frames of one size were expected. Resize them."
            )
        resized = frame.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        frames[place % step] = np.asarray(resized)
        if place % step == step - 1:
            cut(frames, processor, out[place // step])
    times = [index / fps for index in indices]
    middle = tuple((times[i] + times[i + step - 1]) / 2 for i in range(0, len(times), step))
    return Media(out.reshape(-1, out.shape[-1]), (slices, rows, columns), middle)
