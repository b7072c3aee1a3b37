"""Video files (mp4, mov, mkv, webm, ...) through PyAV, the optional extra `video`."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from .errors import InputError, one_line
from .image import check_size
from .source import open_stream

# Containers FFmpeg may open. Without the list it also takes play lists and concat scripts, which
# name other files and addresses.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,m4v,ivf,gif"


class Movie(Sequence[Image.Image]):
    """Frames of a video file. Decoded in order; only those asked for become pictures.

    Sampled frames lie closer together than key frames in all but the longest clips, so nothing is
    gained by seeking. Asking for an earlier frame starts from the beginning.
    """

    def __init__(self, source: str | Path | bytes, where: str) -> None:
        self.source, self.where = source, where
        self.decoded: Generator[Any, None, None] | None = None
        self.at = -1  # the last frame decoded
        self.picture: Image.Image | None = None
        with open_stream(source, where) as stream, _opened(stream, where) as container:
            video = container.streams.video[0]
            check_size(video.width, video.height, where)
            rate = video.average_rate or video.guessed_rate
            self.fps = float(rate) if rate else None
            # containers that keep no count (WebM, streams) are walked through without decoding
            self.total: int = video.frames or _count(container.demux(video))
        if not self.total:
            raise InputError(_no_frames(where))

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: Any) -> Any:
        if self.decoded is None or index < self.at:
            self.decoded, self.at = self._decode(), -1
        if index > self.at:
            self._advance(self.decoded, index)
        if index == self.total - 1:
            self.decoded.close()  # and with it the file
        return self.picture

    def _advance(self, decoded: Generator[Any, None, None], index: int) -> None:
        frame = None
        while self.at < index and (found := next(decoded, None)) is not None:
            frame, self.at = found, self.at + 1
        missing = max(0, index - self.at)
        # containers count a few frames that are not shown; more means the file is cut short
        if missing > max(2, self.total // 20):
            raise InputError(
                f"{self.where}: the video ends after {self.at + 1} of {self.total} frames; a "
                "whole file was expected. Save or download it again."
            )
        if frame is not None:
            picture = frame.to_image()
            turn = getattr(frame, "rotation", 0)  # counter-clockwise, as Pillow's
            self.picture = picture.rotate(turn, expand=True) if turn % 90 == 0 else picture
        if self.picture is None:
            raise InputError(_no_frames(self.where))

    def _decode(self) -> Generator[Any, None, None]:
        import av

        with (
            open_stream(self.source, self.where) as stream,
            _opened(stream, self.where) as container,
        ):
            video = container.streams.video[0]
            video.thread_type = "AUTO"
            with suppress(av.error.FFmpegError, OSError):  # _advance says how far it came
                yield from container.decode(video)


def _opened(stream: BinaryIO, where: str) -> Any:
    """A PyAV container around `stream`, which must have a video in it."""
    try:
        import av
    except ImportError:
        raise InputError(
            f"{where}: a video file, and PyAV is not installed; an animation or a folder of frames "
            'was expected without it. Install it: pip install "av>=14"'
        ) from None
    stream.seek(0)
    try:
        container = av.open(stream, options={"format_whitelist": CONTAINERS})
    except (av.error.FFmpegError, OSError, ValueError) as error:
        found = one_line(getattr(error, "strerror", None) or error)
        raise InputError(
            f"{where}: {found}; a video file (mp4, mov, mkv, webm, ...), a GIF or a WebP "
            "animation was expected. Convert it to mp4, or check that it is the file you mean."
        ) from None
    videos = container.streams.video
    if not videos or videos[0].codec_context is None:  # None: a codec FFmpeg does not know
        container.close()
        raise InputError(_no_frames(where))
    return container


def _count(packets: Iterator[Any]) -> int:
    """Packets with something in them, up to where the file breaks off."""
    import av

    total = 0
    with suppress(av.error.FFmpegError, OSError):
        for packet in packets:
            total += packet.size > 0
    return total


def _no_frames(where: str) -> str:
    return f"{where}: no video to decode in it; frames were expected. Convert it to mp4 (H.264)."
