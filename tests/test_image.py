"""Pictures: the reference's pixels, every kind of file, and one line for each mistake."""

import base64
import http.server
import io
import json
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from goldens.make_pixels import PICTURES, chosen, draw
from processors import RELEASED, settings
from qwen35_mlx import image as pictures
from qwen35_mlx import web
from qwen35_mlx.errors import InputError, ModelError, shown
from qwen35_mlx.image import ImageProcessor, open_image, patches, smart_resize

GOLDEN = np.load(Path(__file__).parent / "goldens" / "pixels.npz")

TOLERANCE = {
    "pixel": 1e-5,  # the promise; one level of 8 bits is 8e-3, so any different pixel fails
    "mean": 1e-5,  # of 1,536 such values
    "level": 3,  # of 255: JPEG and colour conversion do not give back what they were given
}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 4) + b"IDATxxxxxxxx"


def refused(source: Any, **options: Any) -> str:
    """The message `open_image` refuses `source` with, which must be one line that begins well."""
    with pytest.raises(InputError) as caught:
        open_image(source, "message 3, picture 2", **options)
    message = str(caught.value)
    assert message.startswith("message 3, picture 2: ") and "\n" not in message
    assert "; " in message and "expected" in message and len(message) < 500
    return message


# The reference's numbers


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_equal_the_reference(name: str) -> None:
    height, width, bounds, (mean, std) = PICTURES[name]
    processor = ImageProcessor(*bounds, mean=mean, std=std)
    media = patches(draw(list(PICTURES).index(name), height, width), processor)
    assert media.grid == tuple(GOLDEN[f"picture.{name}.grid"])
    assert media.patches.dtype == np.float32 and media.patches.flags.c_contiguous
    assert media.patches.shape == (np.prod(media.grid), 3 * 2 * 16 * 16)
    rows = media.patches[chosen(len(media.patches))]
    assert np.abs(rows - GOLDEN[f"picture.{name}.rows"]).max() <= TOLERANCE["pixel"]
    means = media.patches.mean(axis=1, dtype=np.float64)
    assert np.abs(means - GOLDEN[f"picture.{name}.means"]).max() <= TOLERANCE["mean"]
    assert media.timestamps == () and not media.is_video


def test_sizes_equal_the_reference() -> None:
    table = GOLDEN["image_sizes"].tolist()
    assert len(table) == 1500
    for height, width, low, high, *expected in table:
        assert smart_resize(height, width, 32, low, high) == tuple(expected)


def test_sizes_are_whole_blocks_within_bounds() -> None:
    for height, width, low, high, *_ in GOLDEN["image_sizes"].tolist():
        rows, columns = smart_resize(height, width, 32, low, high)
        assert rows % 32 == 0 and columns % 32 == 0 and rows * columns >= low
        # a side cannot become less than one block, so very thin pictures may stay above
        assert rows * columns <= high or 32 in (rows, columns)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(336, 400, (320, 384)), (368, 304, (384, 320)), (272, 752, (256, 768))],
)
def test_halves_round_to_even(height: int, width: int, expected: tuple[int, int]) -> None:
    assert smart_resize(height, width, 32, 65_536, 16_777_216) == expected


def test_patch_rows_run_in_blocks_of_the_merger() -> None:
    """Each patch is filled with its own number, so its place in the rows can be read off."""
    grid_rows, grid_columns = 4, 6
    number = np.arange(grid_rows * grid_columns).reshape(grid_rows, grid_columns)
    pixels = np.kron(number, np.ones((16, 16), int)).astype(np.uint8)
    media = patches(Image.fromarray(pixels).convert("RGB"), ImageProcessor(1_024, 2**20))
    assert media.grid == (1, grid_rows, grid_columns)
    found = np.rint((media.patches[:, 0] * 0.5 + 0.5) * 255).astype(int)
    assert found[:8].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]
    assert found[12:16].tolist() == [12, 13, 18, 19]


def test_row_values_run_channel_time_y_x() -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[3, 5] = (255, 51, 0)
    row = patches(Image.fromarray(pixels), ImageProcessor(1_024, 2**20)).patches[0]
    row = row.reshape(3, 2, 16, 16)
    assert row[0, :, 3, 5].tolist() == [1, 1]
    assert row[1, :, 3, 5] == pytest.approx([-0.6, -0.6])
    assert (row[2] == -1).all() and (row[0] == 1).sum() == 2


# Kinds of pictures


def test_every_source_gives_the_same_picture(tmp_path: Path) -> None:
    drawn = draw(1, 41, 67)
    data = encoded(drawn, "PNG")
    path = tmp_path / "ein Bild.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    percent = "data:image/png," + "".join(f"%{b:02x}" for b in data)
    for given in (path, str(path), data, url, percent, drawn, Image.open(path)):
        found = open_image(given, "picture")
        assert found.mode == "RGB" and np.array_equal(values(found), values(drawn))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG2000", "ICO"])
def test_lossless_formats_give_back_the_pixels(kind: str) -> None:
    drawn = draw(2, 48, 32).quantize(64).convert("RGB")
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    if kind == "ICO":
        options = {"sizes": [(32, 48)]}
    found = open_image(encoded(drawn, kind, **options), "picture")
    assert np.array_equal(values(found), values(drawn))


def test_lossy_formats_come_close() -> None:
    ramp = np.linspace(0, 255, 40 * 56).reshape(40, 56, 1).repeat(3, 2).astype(np.uint8)
    for kind in ("JPEG", "WEBP"):
        found = open_image(encoded(Image.fromarray(ramp), kind, quality=95), "picture")
        assert np.abs(values(found) - ramp).max() <= TOLERANCE["level"]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_the_colours_it_means(kind: str) -> None:
    inks = np.zeros((24, 40, 4), np.uint8)
    inks[:, :20, 1:3] = 255  # magenta and yellow: red
    inks[:, 20:, 3] = 255  # black
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    found = values(open_image(encoded(Image.fromarray(inks, "CMYK"), kind, **options), "picture"))
    assert np.abs(found[:, :16] - (255, 0, 0)).max() <= TOLERANCE["level"]
    assert np.abs(found[:, 24:]).max() <= TOLERANCE["level"]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "memory"])
def test_grey_of_16_bits_is_scaled_not_clipped(kind: str) -> None:
    grey = np.linspace(0, 65535, 17 * 29).reshape(17, 29).round().astype(np.uint16)
    drawn = Image.fromarray(grey)
    found = values(open_image(drawn if kind == "memory" else encoded(drawn, kind), "picture"))
    assert np.array_equal(found[..., 0], np.rint(grey / 257).astype(int))
    assert found[0, 0, 0] == 0 and found[-1, -1, 2] == 255


def test_dark_grey_of_16_bits_stays_dark() -> None:
    grey = np.full((9, 7), 200, np.uint16)
    for kind in ("PNG", "PPM"):
        assert values(open_image(encoded(Image.fromarray(grey), kind), "picture")).max() == 1


@pytest.mark.parametrize(("white", "kind"), [(1.0, "f"), (255.0, "f"), (255, "i"), (65535, "i")])
def test_wide_grey_is_read_by_its_range(white: float, kind: str) -> None:
    grey = np.array([[0, white / 5, white]] * 4).astype(np.float32 if kind == "f" else np.int32)
    found = values(open_image(Image.fromarray(grey), "picture"))
    assert found[1, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize("bad", [-1.0, 1e6, float("nan")])
def test_grey_without_a_known_range_is_refused(bad: float) -> None:
    grey = np.full((6, 5), bad, np.float32)
    assert "grey values" in refused(Image.fromarray(grey))


def test_palette_with_transparency_keeps_its_colours() -> None:
    drawn = draw(3, 21, 34).quantize(16)
    expected = values(drawn.convert("RGB"))
    for transparency in (3, bytes(range(0, 160, 10))):
        data = encoded(drawn, "PNG", transparency=transparency)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(values(open_image(data, "picture")), expected)


def test_alpha_is_dropped_not_blended() -> None:
    colours = np.full((10, 14, 4), (200, 100, 50, 0), np.uint8)
    found = values(open_image(encoded(Image.fromarray(colours), "PNG"), "picture"))
    assert (found == (200, 100, 50)).all()
    grey = Image.fromarray(np.full((10, 14, 2), (90, 0), np.uint8), "LA")
    assert (values(open_image(encoded(grey, "PNG"), "picture")) == 90).all()


def test_one_bit_becomes_black_and_white() -> None:
    bits = np.arange(12 * 19).reshape(12, 19) % 3 == 0
    found = values(open_image(encoded(Image.fromarray(bits), "PNG"), "picture"))
    assert np.array_equal(found[..., 1], bits * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_exif_rotation_is_undone_once(orientation: int, mode: str) -> None:
    upright = draw(4, 26, 40)
    if mode == "I;16":
        upright = Image.fromarray(np.asarray(upright.convert("L")).astype(np.uint16) * 257)
    turn = Image.Transpose
    # how the camera stores an upright scene under each value of the tag
    stored = {
        1: upright,
        2: upright.transpose(turn.FLIP_LEFT_RIGHT),
        3: upright.transpose(turn.ROTATE_180),
        4: upright.transpose(turn.FLIP_TOP_BOTTOM),
        5: upright.transpose(turn.TRANSPOSE),
        6: upright.transpose(turn.ROTATE_90),
        7: upright.transpose(turn.TRANSVERSE),
        8: upright.transpose(turn.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = open_image(encoded(stored, "PNG", exif=exif), "picture")
    expected = values(open_image(upright, "picture"))
    assert found.size == (40, 26) and np.array_equal(values(found), expected)
    assert np.array_equal(values(open_image(found, "picture")), expected)
    media = patches(found, ImageProcessor())
    assert np.array_equal(media.patches, patches(open_image(found, "p"), ImageProcessor()).patches)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (23, 31), colour) for colour in ("red", "lime", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (values(open_image(data, "picture")) == (255, 0, 0)).all()


def test_a_picture_given_by_the_caller_is_not_changed() -> None:
    given = Image.fromarray(np.full((8, 12, 4), 77, np.uint8))
    open_image(given, "picture")
    assert given.mode == "RGBA" and given.size == (12, 8)


# Mistakes


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    empty, text, fifo = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "fifo"
    empty.write_bytes(b"")
    text.write_text("Not a picture, whatever its name says.")
    os.mkfifo(fifo)  # must not be opened: reading would hang
    assert "no file" in refused(tmp_path / "missing.png")
    assert "a folder" in refused(str(tmp_path))
    assert "not a plain file" in refused(fifo)
    assert "0 bytes" in refused(empty) and "empty.png" in refused(empty)
    assert "0 bytes" in refused(b"")
    assert "b'Not a pi'" in refused(text)
    assert "a\\x00b\\nc.png" in refused("a\0b\nc.png")
    assert "no file" in refused("") or "a folder" in refused("")
    refused("x" * 5000)
    assert "int" in refused(5)


def test_a_file_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreadable(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(pictures, "open_stream", lambda *_: Unreadable())
    assert "Input/output error" in refused("a.png")


def test_a_path_keeps_its_end_and_an_address_its_start() -> None:
    name = "walk/IMG_1234.png"
    for length in (5, 102):  # 120 characters in all
        assert shown("/" + "x" * length + name) == "/" + "x" * length + name
    long = shown(Path("/" + "x" * 103 + name))
    assert long.startswith("...xxx") and long.endswith(name) and len(long) == 120
    assert shown("x" * 10_000 + "\n.png").endswith("xx\\n.png")
    for start in ("https://a.example/", "data:image/png;base64,", "DATA:,"):
        assert shown(start + "A" * 200).startswith(start + "A")
        assert shown(start + "A" * 200).endswith(f"A... ({len(start) + 200} characters)")
        assert shown(start + "A") == start + "A"


def test_heic_is_refused_with_the_way_out() -> None:
    for brand in (b"heic", b"heix", b"mif1"):
        data = b"\0\0\0\x24ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(64)
        assert "sips -s format jpeg" in refused(data)


def test_formats_that_start_other_programs_are_refused() -> None:
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_a_truncated_file_is_refused_wherever_it_ends(
    kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    data = encoded(draw(5, 43, 37), kind)
    refused(data[: len(data) // 2])
    for end in (1, 2, 5, 9, 12, 16, 21, 30, 40, 60, 100):
        refused(data[:end])
    assert not recwarn.list  # Pillow's remarks would reach stderr


def test_garbled_files_never_raise_anything_else(recwarn: pytest.WarningsRecorder) -> None:
    draws = np.random.PCG64(7)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        data = bytearray(encoded(draw(6, 24, 18), kind))
        for _ in range(40):
            place, value = (int(n) for n in draws.random_raw(2) >> np.uint64(33))
            broken = bytearray(data)
            broken[place % min(len(data), 200)] = value % 256
            try:
                assert open_image(bytes(broken), "picture").mode == "RGB"
            except InputError as error:
                assert "\n" not in str(error)
    assert not recwarn.list


def test_size_is_refused_before_anything_is_decoded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor does Pillow warn
        assert "200 megapixels; at most 134" in refused(png_header(20_000, 10_000))
        assert "megapixels" in refused(png_header(2**31 - 1, 2**31 - 1))
        # below the cap the header passes and the missing pixels are found
        assert "cannot be decoded" in refused(png_header(12_000, 9_000))


def test_size_cap_holds_for_pictures_already_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 30 * 20)
    assert open_image(Image.new("RGB", (30, 20)), "picture").size == (30, 20)
    assert "31 x 20" in refused(Image.new("RGB", (31, 20)))


def test_thin_and_empty_pictures_are_refused() -> None:
    assert "10000 x 1 pixels; sides at most 200 : 1" in refused(Image.new("RGB", (10_000, 1)))
    assert "1 x 201" in refused(Image.new("RGB", (1, 201)))
    assert open_image(Image.new("RGB", (1, 200)), "picture").size == (1, 200)
    assert "0 x 5" in refused(Image.new("RGB", (0, 5)))
    with pytest.raises(InputError, match="201 x 1 "):
        patches(Image.new("RGB", (201, 1)), ImageProcessor())


def test_bad_data_urls_are_refused_and_not_repeated() -> None:
    refused("data:image/png;base64")
    refused("data:image/png;base64,abc")
    message = refused("data:image/png;base64," + "A" * 100_001)
    assert len(message) < 300


# Addresses


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one picture, and things a server should not do."""

    picture = encoded(draw(8, 33, 47), "PNG")

    def do_GET(self) -> None:
        if self.path == "/moved.png":
            return self.redirect("/picture.png")
        if self.path == "/local":
            return self.redirect("file:///etc/hosts")
        if self.path == "/ftp":
            return self.redirect("ftp://127.0.0.1/picture.png")
        found = {"/picture.png": self.picture, "/page": b"<html>"}.get(self.path)
        self.send_response(200 if found or self.path == "/endless" else 404)
        self.end_headers()
        if found:
            self.wfile.write(found)
        elif self.path == "/endless":
            try:
                while True:
                    self.wfile.write(bytes(2**16))
            except OSError:
                pass

    def redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_addresses_are_opened_only_where_allowed(server: str) -> None:
    url = f"{server}/picture.png"
    assert url in refused(url)
    assert values(open_image(url, "picture", allow_url=True)).shape == (33, 47, 3)
    assert open_image(f"{server}/moved.png", "picture", allow_url=True).size == (47, 33)


def test_bad_addresses_are_refused(server: str) -> None:
    assert "404" in refused(f"{server}/missing", allow_url=True)
    assert "b'<html>'" in refused(f"{server}/page", allow_url=True)
    refused("http://127.0.0.1:1/x.png", allow_url=True)
    refused("http://", allow_url=True)
    refused("http://[", allow_url=True)
    for scheme in ("ftp", "file", "s3"):
        assert f"'{scheme}:'" in refused(f"{scheme}://host/x.png", allow_url=True)


@pytest.mark.parametrize("path", ["/local", "/ftp"])
def test_redirects_off_the_web_are_refused(server: str, path: str) -> None:
    refused(server + path, allow_url=True)


def test_downloads_are_capped(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MAX_DOWNLOAD", 2**20)
    assert "more than 1 MiB" in refused(f"{server}/endless", allow_url=True)
    monkeypatch.setattr(web, "MAX_DOWNLOAD", 2**40)
    monkeypatch.setattr(web, "DOWNLOAD_SECONDS", 0.2)
    assert "not finished after 0.2 s" in refused(f"{server}/endless", allow_url=True)


# Settings


def test_settings_default_to_the_released_ones(tmp_path: Path) -> None:
    assert ImageProcessor.read(tmp_path) == ImageProcessor() == settings(ImageProcessor, tmp_path)


def test_settings_are_read_in_every_spelling(tmp_path: Path) -> None:
    expected = ImageProcessor(min_pixels=1_024, max_pixels=90_000, mean=(0.1, 0.2, 0.3))
    changed = {"image_mean": [0.1, 0.2, 0.3], "do_resize": True, "resample": 3, "do_pad": None}
    for size in (
        {"size": {"shortest_edge": 1_024, "longest_edge": 90_000}},
        {"size": {"min_pixels": 1_024, "max_pixels": 90_000}},
        {"size": None, "min_pixels": 1_024, "max_pixels": 90_000},
    ):
        assert settings(ImageProcessor, tmp_path, **changed, **size) == expected
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"image_processor": {**RELEASED[ImageProcessor], "size": {"shortest_edge": 1_024}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert ImageProcessor.read(tmp_path) == ImageProcessor(min_pixels=1_024)


@pytest.mark.parametrize(
    "changed",
    [
        {"patch_size": 0},
        {"patch_size": 16.0},
        {"merge_size": True},
        {"temporal_patch_size": "2"},
        {"size": [1, 2]},
        {"size": {"shortest_edge": 9, "longest_edge": 8}},
        {"min_pixels": 5},
        {"max_pixels": 16777217},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": 0.5},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_std": [0.5, None, 0.5]},
        {"do_resize": False},
        {"do_normalize": False},
        {"resample": 2},
        {"rescale_factor": 1 / 127.5},
        {"do_center_crop": True},
        {"min_pixels": [5]},
        {"max_pixels": {"a": 5}, "size": None},
        {"size": {"shortest_edge": [65536]}},
        {"size": {"longest_edge": {}}},
        {"size": {"longest_edge": 2**41}},
        {"size": {"shortest_edge": 2**28, "longest_edge": 2**30}},
        {"size": {"longest_edge": 10**400}},
        {"patch_size": 1025},
        {"merge_size": 10**12},
        {"temporal_patch_size": 10**400},
        {"image_mean": [10**400, 0.5, 0.5]},
        {"image_mean": [float("nan"), 0.5, 0.5]},
        {"image_std": [0.5, 0.5, 1e300]},
        {"image_std": [0.5, 1e-300, 0.5]},
        {"rescale_factor": 10**400},
        {"rescale_factor": float("nan")},
        {"resample": [3]},
    ],
)
def test_settings_that_are_not_done_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        settings(ImageProcessor, tmp_path, **changed)
    assert "preprocessor_config.json: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff".encode("utf-8", "surrogateescape")])
def test_a_broken_settings_file_is_refused(tmp_path: Path, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "preprocessor_config.json").write_bytes(data)
    with pytest.raises(ModelError, match=r"preprocessor_config.json: .*expected"):
        ImageProcessor.read(tmp_path)
