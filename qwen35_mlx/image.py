"""Pictures: opened safely, resized as the model was trained, cut into the rows of the vision tower.

`open_image` turns what a message may hold (a path, bytes, a `data:` URL, a Pillow picture) into an
upright RGB picture; `patches` resizes it and cuts it up. `video.py` shares the patch order, the
settings and the openers.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from .errors import InputError, one_line, shown
from .settings import read_settings, shared_settings
from .source import open_stream

MAX_PIXELS = 2**27  # 134 megapixels: above every 108-megapixel phone and 102-megapixel camera
MAX_ASPECT = 200  # longer side over shorter side; the reference refuses more

# Formats that Pillow decodes in process. Its full list is not offered: EPS, for one, starts
# Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")


@dataclass(frozen=True)
class Media:
    """One picture or one clip, ready for the vision tower.

    `patches` is `[N, C * tp * ps * ps]` float32 with N = t * gh * gw; rows run over (t, block row,
    block column, row in block, column in block), the values of a row over (channel, time, y, x).
    """

    patches: np.ndarray
    grid: tuple[int, int, int]  # t, gh, gw in patches
    timestamps: tuple[float, ...] = ()  # seconds, one for each temporal slice; empty for a picture

    @property
    def is_video(self) -> bool:
        """Whether this is a clip."""
        return bool(self.timestamps)


@dataclass(frozen=True)
class ImageProcessor:
    """How pictures become patches; the defaults are the family's."""

    min_pixels: int = 65_536  # areas after resizing
    max_pixels: int = 16_777_216
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def read(cls, folder: Path) -> "ImageProcessor":
        """The settings in a model folder; the family's where the folder has none.

        Raises: ModelError when a setting is malformed, contradicts another, or asks for what is not
        done here.
        """
        values, where = read_settings(folder, "preprocessor_config.json", "image_processor")
        return cls(**shared_settings(values, where, cls()))


def open_image(
    source: str | Path | bytes | Image.Image, where: str, allow_url: bool = False
) -> Image.Image:
    """One upright RGB picture, decoded.

    `source` is a path, the bytes of a file, a `data:` URL, a Pillow picture or, with `allow_url`,
    an http(s) address (at most `MAX_DOWNLOAD` bytes). `where` begins the messages. The size in the
    header is checked against `MAX_PIXELS` before anything is decoded. The first frame of an
    animation is taken. 16-bit grey is scaled to 8 bits; alpha is dropped, not blended, as the
    reference does; EXIF rotation is applied, which the reference leaves to the caller.

    Raises: InputError.
    """
    if isinstance(source, Image.Image):
        check_size(*source.size, where)
        return to_rgb(source, where)
    with open_stream(source, where, allow_url) as stream:
        image = identify(stream, where)
        if image is None:
            raise InputError(_not_a_picture(stream, where))
        check_size(*image.size, where)
        return to_rgb(image, where)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Pillow's remarks on damaged files off stderr: what matters is raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


@quiet()
def identify(stream: BinaryIO, where: str) -> Image.Image | None:
    """The picture in `stream`, its header read only; None when it is in none of `FORMATS`.

    Goes through Pillow's own table of openers instead of `Image.open`, whose size warning can be
    silenced only for the whole process; `check_size` takes its place.
    """
    Image.init()
    try:
        stream.seek(0)
        head = stream.read(64)
    except OSError as error:
        raise InputError(damaged(where, error)) from None
    if _is_heic(head):  # the reader of AVIF would claim some and fail
        return None
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        try:
            if factory is not None and accept is not None and accept(head[:16]) is True:
                stream.seek(0)
                return factory(stream, "")
        except Exception as error:  # Pillow's readers raise a dozen types on damaged headers
            raise InputError(damaged(where, error)) from None
    return None


def check_size(width: int, height: int, where: str) -> None:
    """Refuses pictures that are empty, too large to decode or too thin. Raises: InputError."""
    if min(width, height) < 1:
        raise InputError(
            f"{where}: {width} x {height} pixels; a picture with pixels was expected. Use another."
        )
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{where}: {width} x {height} is {width * height / 1e6:.0f} megapixels; at most "
            f"{MAX_PIXELS / 1e6:.0f} was expected. Make it smaller: the model sees 17 at most."
        )
    check_aspect(width, height, where)


def check_aspect(width: int, height: int, where: str) -> None:
    """Refuses pictures too thin to resize. Raises: InputError."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{where}: {width} x {height} pixels; sides at most {MAX_ASPECT} : 1 were expected. "
            "Crop it."
        )


@quiet()
def to_rgb(image: Image.Image, where: str) -> Image.Image:
    """`image` decoded, upright and RGB; the same object if it was that. Raises: InputError."""
    try:
        image.load()
        fills_16_bits = image.mode.startswith("I;16") or (
            image.mode == "I" and image.format in ("PNG", "PPM")
        )
        image = _upright(image)
        if image.mode == "RGB":
            return image
        if image.mode.startswith("I") or image.mode == "F":
            return _grey_to_8_bits(image, fills_16_bits, where).convert("RGB")
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # the same colours; going straight to RGB warns
        return image.convert("RGB")
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise a dozen types on damaged data
        raise InputError(damaged(where, error)) from None


def _upright(image: Image.Image) -> Image.Image:
    """Undoes the camera's rotation as noted in EXIF, and the note with it."""
    try:
        turned = image.getexif().get(0x0112, 1) in range(2, 9)
    except Exception:  # damaged EXIF beside a sound picture
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _grey_to_8_bits(image: Image.Image, fills_16_bits: bool, where: str) -> Image.Image:
    """Grey of 16 or 32 bits or of floats, scaled to 8 bits, where Pillow's `convert` would clip it.

    White is 65,535 where the mode or the format says so (the readers of PNG and PPM fill 16 bits
    into mode I); elsewhere the values tell: up to 1 for floats, up to 255, up to 65,535.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if fills_16_bits:
        white = 65535.0
    else:
        white = 1.0 if image.mode == "F" and high <= 1 else 255.0 if high <= 255 else 65535.0
    if not (low >= 0 and high <= white):  # also false for NaN
        raise InputError(
            f"{where}: grey values from {low:g} to {high:g}; 0 to 1, 0 to 255 or 0 to 65,535 were "
            "expected. Save it as an 8-bit picture."
        )
    scaled = np.multiply(values, np.float32(255 / white), dtype=np.float32)
    return Image.fromarray((scaled + np.float32(0.5)).astype(np.uint8))


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size to resize to: whole blocks of `factor` pixels, area in bounds, aspect nearly kept.

    Rounding to blocks is half to even. Returns: (height, width) in pixels. Raises: InputError above
    200 : 1.
    Source: transformers models/qwen2_vl/image_processing_pil_qwen2_vl.py, `smart_resize`.
    """
    check_aspect(width, height, "picture")
    return fit(height, width, factor, min_pixels, max_pixels)


def fit(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
    whole_frames: int = 1,
) -> tuple[int, int]:
    """Whole blocks near `height` and `width`, scaled when their volume is out of bounds.

    What is compared with the bounds is the volume in whole blocks and `whole_frames`; the scale
    comes from the source's own, `frames * height * width`. Both as in the reference; a picture has
    one frame.
    """
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    volume = whole_frames * rows * columns
    if volume > max_pixels:
        shrink = math.sqrt((frames * height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def patches(image: Image.Image, processor: ImageProcessor) -> Media:
    """The rows of one picture, `[gh * gw, C * tp * ps * ps]` float32, grid (1, gh, gw).

    Raises: InputError when the sides are above 200 : 1.
    Source: transformers models/qwen2_vl/image_processing_pil_qwen2_vl.py,
    `Qwen2VLImageProcessorPil`: bicubic on 8 bits through Pillow, then scaled and normalised, the
    picture repeated along time.
    """
    factor = processor.patch_size * processor.merge_size
    height, width = smart_resize(
        image.height, image.width, factor, processor.min_pixels, processor.max_pixels
    )
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = height // processor.patch_size, width // processor.patch_size
    out = np.empty((rows * columns, row_length(processor)), np.float32)
    cut(pixels[None], processor, out)
    return Media(out, (1, rows, columns))


def row_length(processor: ImageProcessor) -> int:
    """Values in one row of patches: channels * time * height * width."""
    return 3 * processor.temporal_patch_size * processor.patch_size**2


def cut(frames: np.ndarray, processor: ImageProcessor, out: np.ndarray) -> None:
    """Normalises one temporal slice and writes its rows into `out`.

    `out` is `[gh * gw, C * tp * ps * ps]` float32, `frames` is `[tp or 1, H, W, 3]` uint8; a single
    frame is repeated along time. There are 256 values for each channel, so they are looked up:
    exact, and no float copy of the frames is made.
    """
    size, merge = processor.patch_size, processor.merge_size
    given, height, width, channels = frames.shape
    rows, columns = height // (size * merge), width // (size * merge)
    blocks = frames.reshape(given, rows, merge, size, columns, merge, size, channels)
    blocks = blocks.transpose(1, 4, 2, 5, 7, 0, 3, 6)  # R C r c channel time y x
    target = out.reshape(rows, columns, merge, merge, channels, -1, size, size)
    # 8 bits to [0, 1] in f64, rounded to f32, then f32 throughout: the reference's order
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    for channel in range(channels):
        mean, std = np.float32(processor.mean[channel]), np.float32(processor.std[channel])
        target[:, :, :, :, channel] = ((levels - mean) / std)[blocks[:, :, :, :, channel]]


def _not_a_picture(stream: BinaryIO, where: str) -> str:
    stream.seek(0)
    head = stream.read(64)
    name = shown(getattr(stream, "name", "the data"))
    if not head:
        return f"{where}: {name}: 0 bytes; a picture was expected. Save or download it again."
    if _is_heic(head):
        return (
            f"{where}: {name}: a HEIC picture; {READABLE} was expected. "
            "Convert it: sips -s format jpeg IN.heic --out OUT.jpg"
        )
    return (
        f"{where}: {name}: begins with {head[:8]!r}; {READABLE} was expected. "
        "Convert it, or check that it is the file you mean."
    )


def _is_heic(head: bytes) -> bool:
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    return brand in HEIC_BRANDS or (brand in (b"mif1", b"msf1") and b"heic" in head)


def damaged(where: str, error: Exception) -> str:
    """The message about a file that breaks off, is garbled or cannot be read to its end."""
    return (
        f"{where}: the picture cannot be decoded ({one_line(error)}); a whole {READABLE} file was "
        "expected. Save or download it again."
    )
