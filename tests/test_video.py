"""Clips: the reference's frames, sizes and times, every kind of source, mistakes on one line."""

import base64
import io
import json
import struct
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from goldens.make_pixels import CLIPS, chosen, draw, lengths
from processors import RELEASED, settings
from qwen35_mlx import image as pictures
from qwen35_mlx.errors import InputError, ModelError
from qwen35_mlx.image import ImageProcessor
from qwen35_mlx.video import Clip, VideoProcessor, clip_size, open_video, patches, sample

GOLDEN = np.load(Path(__file__).parent / "goldens" / "pixels.npz")

TOLERANCE = {
    "pixel": 1e-5,  # the promise; one level of 8 bits is 8e-3, so any different pixel fails
    "mean": 1e-5,  # of 1,536 such values
    "codec": 12,  # of 255: plain colours after H.264's YUV 4:2:0
}
# the smallest volume that is not scaled up, so that test clips stay small
SMALL = VideoProcessor(min_pixels=2_048)
COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black")
RGB = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
RGB += [(0, 255, 255), (255, 0, 255), (255, 255, 255), (0, 0, 0)]


def flat(count: int, size: tuple[int, int] = (64, 32)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[i % 8]) for i in range(count)]


def animation(kind: str, frames: list[Image.Image], durations: int | list[int]) -> bytes:
    stream = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    first, rest = frames[0], frames[1:]
    first.save(stream, kind, save_all=True, append_images=rest, duration=durations, **options)
    return stream.getvalue()


def colours(frames: Sequence[Image.Image]) -> list[str]:
    """The nearest named colour of the middle of each frame."""
    found = []
    for i in range(len(frames)):
        frame = frames[i]
        assert frame.mode == "RGB"
        middle = np.array(frame.getpixel((frame.width // 2, frame.height // 2)), int)
        distances = [np.abs(middle - rgb).max() for rgb in RGB]
        assert min(distances) <= TOLERANCE["codec"]
        found.append(COLOURS[int(np.argmin(distances))])
    return found


def refused(source: Any, **options: Any) -> str:
    """The message `source` is refused with, when opened or when its frames are asked for."""
    with pytest.raises(InputError) as caught:
        patches(open_video(source, "message 1, video 1", **options), SMALL)
    message = str(caught.value)
    assert message.startswith("message 1, video 1") and "\n" not in message
    assert "; " in message and "expected" in message and len(message) < 500
    return message


# The reference's numbers


@pytest.mark.parametrize("name", CLIPS)
def test_pixels_equal_the_reference(name: str) -> None:
    total, fps, height, width = CLIPS[name]
    seed = list(CLIPS).index(name) * 1000
    frames = [draw(seed + i, height, width) for i in range(total)]
    media = patches(Clip(frames, fps), VideoProcessor())
    assert media.grid == tuple(GOLDEN[f"clip.{name}.grid"]) and media.is_video
    assert media.patches.dtype == np.float32 and media.patches.flags.c_contiguous
    assert media.patches.shape == (np.prod(media.grid), 3 * 2 * 16 * 16)
    rows = media.patches[chosen(len(media.patches))]
    assert np.abs(rows - GOLDEN[f"clip.{name}.rows"]).max() <= TOLERANCE["pixel"]
    means = media.patches.mean(axis=1, dtype=np.float64)
    assert np.abs(means - GOLDEN[f"clip.{name}.means"]).max() <= TOLERANCE["mean"]
    assert media.timestamps == tuple(GOLDEN[f"clip.{name}.seconds"])


def test_sampled_frames_equal_the_reference() -> None:
    table = lengths()
    ends = np.cumsum(GOLDEN["counts"])[:-1]
    assert len(table) == 64 == len(ends) + 1
    for (total, fps), expected in zip(table, np.split(GOLDEN["sampled"], ends), strict=True):
        assert sample(total, fps, VideoProcessor()) == expected.tolist()


def test_times_equal_the_reference() -> None:
    ends = np.cumsum((GOLDEN["counts"] + 1) // 2)[:-1]
    small = VideoProcessor(min_pixels=1, max_pixels=2_048)
    for (total, fps), expected in zip(lengths(), np.split(GOLDEN["seconds"], ends), strict=True):
        if total < 1000:
            clip = Clip([Image.new("RGB", (32, 32))] * total, fps)
            assert patches(clip, small).timestamps == tuple(expected)


def test_sizes_equal_the_reference() -> None:
    table = GOLDEN["clip_sizes"].tolist()
    assert len(table) == 1500
    for frames, height, width, low, high, *expected in table:
        processor = VideoProcessor(min_pixels=low, max_pixels=high)
        assert clip_size(frames, height, width, processor, "video") == tuple(expected)


def test_five_frames_count_as_four_for_the_size() -> None:
    processor = VideoProcessor(min_pixels=1, max_pixels=4 * 64 * 96)
    assert clip_size(5, 64, 96, processor, "video") == (64, 96)
    assert clip_size(7, 64, 96, processor, "video") == (32, 64)


def test_one_frame_is_repeated() -> None:
    frame = draw(3, 64, 96)
    media = patches(Clip((frame,)), VideoProcessor(min_pixels=1))
    assert media.grid == (1, 4, 6) and media.timestamps == (0.0,)
    alone = pictures.patches(frame, ImageProcessor(min_pixels=1))
    assert np.array_equal(media.patches, alone.patches)


def test_an_odd_number_of_frames_repeats_the_last() -> None:
    frames = [draw(i, 32, 64) for i in range(5)]
    odd = patches(Clip(frames, 2.0), SMALL)
    even = patches(Clip([*frames, frames[-1]], 2.0), SMALL)
    assert odd.grid == even.grid == (3, 2, 4) and np.array_equal(odd.patches, even.patches)
    assert odd.timestamps == (0.25, 1.25, 2.0) and even.timestamps == (0.25, 1.25, 2.25)


def test_frames_are_resized_like_pictures() -> None:
    frames = [draw(i, 100, 150) for i in range(4)]
    processor = VideoProcessor(min_pixels=1, max_pixels=4 * 64 * 96)
    media = patches(Clip(frames, 2.0), processor)
    assert media.grid == (2, 4, 6)
    resized = [f.resize((96, 64), Image.Resampling.BICUBIC) for f in frames]
    same = patches(Clip(resized, 2.0), processor)
    assert np.array_equal(media.patches, same.patches)


def test_a_source_without_fps_counts_as_24() -> None:
    clip = open_video(flat(96), "video")
    assert clip.fps is None
    media = patches(clip, SMALL)
    assert media.grid[0] == 4 and media.timestamps[-1] == pytest.approx((81 + 95) / 2 / 24, abs=0.1)
    assert media.timestamps == patches(open_video(flat(96), "video", fps=24), SMALL).timestamps


# Animations, folders, lists


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_keep_their_frames_and_rate(kind: str, tmp_path: Path) -> None:
    data = animation(kind, flat(8), 80)
    path = tmp_path / "animation"
    path.write_bytes(data)
    url = "data:image/gif;base64," + base64.b64encode(data).decode()
    for source in (data, path, str(path), url):
        clip = open_video(source, "video")
        assert clip.fps == 12.5 and colours(clip.frames) == list(COLOURS)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_unequal_durations_keep_every_frame_in_its_time(kind: str) -> None:
    clip = open_video(animation(kind, flat(4), [300, 100, 50, 150]), "video")
    assert clip.fps == 20.0  # steps of 50 ms
    expected = ["red"] * 6 + ["lime"] * 2 + ["blue"] + ["yellow"] * 3
    assert colours(clip.frames) == expected
    media = patches(clip, SMALL)  # 0.6 s: the minimum of four frames, 0, 4, 7 and 11
    assert media.timestamps == (0.1, 0.45)


def test_an_animation_without_durations_runs_as_in_a_browser() -> None:
    clip = open_video(animation("GIF", flat(5), 0), "video")
    assert clip.fps == 10.0 and len(clip.frames) == 5


def test_fps_makes_an_animation_one_frame_after_the_other() -> None:
    clip = open_video(animation("GIF", flat(4), [300, 100, 50, 150]), "video", fps=8)
    assert clip.fps == 8 and colours(clip.frames) == list(COLOURS[:4])


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_frames_of_an_animation_are_composited(kind: str) -> None:
    """The second frame changes one corner only, so files hold just that corner."""
    first = Image.new("RGB", (64, 48), "red")
    second = first.copy()
    second.paste((0, 0, 255), (0, 0, 8, 8))
    third = second.copy()
    third.paste((0, 255, 0), (56, 40, 64, 48))
    frames = open_video(animation(kind, [first, second, third], 100), "video").frames
    for found, drawn in zip((frames[0], frames[1], frames[2]), (first, second, third), strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(drawn))
    assert np.array_equal(np.asarray(frames[0]), np.asarray(first))  # backwards too


def test_a_still_picture_is_a_clip_of_one_frame() -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        stream = io.BytesIO()
        Image.new("RGB", (64, 32), "red").save(stream, kind)
        media = patches(open_video(stream.getvalue(), "video"), SMALL)
        assert media.grid == (1, 2, 4) and media.timestamps == (0.0,)


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    names = ["f1.png", "f2.PNG", "f3.png", "f9.png", "f10.png", "f11.png", "f100.png"]
    for name, frame in reversed(list(zip(names, flat(7), strict=True))):
        frame.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "._f1.png").write_bytes(b"resource fork of macOS")
    for source in (tmp_path, str(tmp_path)):
        clip = open_video(source, "video", fps=3)
        assert clip.fps == 3 and colours(clip.frames) == list(COLOURS[:7])


def test_a_list_may_hold_whatever_is_a_picture(tmp_path: Path) -> None:
    drawn = flat(4)
    drawn[1].save(tmp_path / "1.png")
    stream = io.BytesIO()
    drawn[2].save(stream, "PNG")
    mixed = (drawn[0], tmp_path / "1.png", stream.getvalue(), drawn[3].convert("RGBA"))
    assert colours(open_video(mixed, "video").frames) == list(COLOURS[:4])


# Video files


def encode(frames: list[Image.Image], rate: Fraction, kind: str = "mp4") -> bytes:
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        video = container.add_stream("mpeg4" if kind == "mp4" else "libvpx", rate=rate)
        video.width, video.height = frames[0].size
        video.pix_fmt = "yuv420p"
        video.bit_rate = 4_000_000
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_image(frame)))
        container.mux(video.encode())
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_video_files_give_their_frames_and_rate(kind: str, tmp_path: Path) -> None:
    data = encode(flat(24, (96, 64)), Fraction(25, 2), kind)
    path = tmp_path / f"clip.{kind}"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        clip = open_video(source, "video")
        assert clip.fps == 12.5 and len(clip.frames) == 24
        assert colours(clip.frames) == list(COLOURS) * 3
        assert (
            colours([clip.frames[i] for i in (5, 23, 2, 2)]) == ["magenta", "black"] + ["blue"] * 2
        )
    media = patches(clip, SMALL)  # 1.92 s: four frames, 0, 8, 15 and 23
    assert media.grid == (2, 4, 6)
    assert media.timestamps == ((0 + 8 / 12.5) / 2, (15 / 12.5 + 23 / 12.5) / 2)
    red, black = media.patches[0].reshape(3, 2, 256), media.patches[-1].reshape(3, 2, 256)
    assert np.abs(red[0] - 1).max() < 0.1 and np.abs(red[1:] + 1).max() < 0.1
    assert np.abs(black + 1).max() < 0.1


def test_patches_of_a_file_equal_those_of_its_frames() -> None:
    clip = open_video(encode([draw(i, 64, 96) for i in range(30)], Fraction(15)), "video")
    frames = [clip.frames[i] for i in range(30)]
    media = patches(clip, SMALL)
    assert media.grid[0] == 2
    assert np.array_equal(media.patches, patches(Clip(frames, 15.0), SMALL).patches)
    assert np.array_equal(media.patches, patches(clip, SMALL).patches)  # and again


def test_a_phone_held_upright_gives_upright_frames() -> None:
    picture = Image.new("RGB", (96, 64), "red")
    picture.paste((0, 0, 255), (0, 0, 96, 16))  # blue on top, as stored
    data = bytearray(encode([picture] * 6, Fraction(24)))
    header = data.index(b"tkhd") + 4
    matrix = header + 40
    one = 1 << 16
    assert struct.unpack_from(">9i", data, matrix) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # clockwise
    frame = open_video(bytes(data), "video").frames[0]
    assert frame.size == (64, 96)
    top_right, left = np.array(frame.getpixel((60, 48))), np.array(frame.getpixel((10, 48)))
    assert top_right[2] > 200 > 50 > top_right[0] and left[0] > 200 > 50 > left[2]


def test_without_pyav_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(flat(4), Fraction(24))
    monkeypatch.setitem(sys.modules, "av", None)
    assert refused(data).endswith('pip install "av>=14"')
    assert colours(open_video(animation("GIF", flat(3), 100), "video").frames)  # needs nothing


def test_a_video_cut_short_is_refused_with_the_numbers(tmp_path: Path) -> None:
    import av

    data = encode([draw(i, 64, 96) for i in range(60)], Fraction(24))
    path = str(tmp_path / "fast.mp4")  # the index in front, so that the rest can be missing
    with (
        av.open(io.BytesIO(data), "r") as old,
        av.open(path, "w", options={"movflags": "faststart"}) as new,
    ):
        video = old.streams.video[0]
        copy = new.add_stream_from_template(video)
        for packet in old.demux(video):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
    whole = Path(path).read_bytes()
    assert len(open_video(whole, "video").frames) == 60
    message = refused(whole[: len(whole) // 2])
    assert "of 60 frames" in message and "the video ends after" in message
    half = open_video(whole[: len(whole) // 2], "video").frames
    with pytest.raises(InputError, match="of 60 frames"):  # also when asked for one by one
        [half[i] for i in range(60)]
    nearly = open_video(whole[:-1500], "video")  # the last frame or two
    assert patches(nearly, SMALL).grid[0] == 3


def test_play_lists_cannot_name_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(encode(flat(4), Fraction(24)))
    lists = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
        "list.mp4": f"ffconcat version 1.0\nfile '{secret}'\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        refused(tmp_path / name)


def test_sound_without_pictures_is_refused() -> None:
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=44100)
        silence = np.zeros((1, 4096), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    assert "no video" in refused(stream.getvalue())


def test_large_frames_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(flat(4), Fraction(24))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    assert "64 x 32" in refused(data)
    assert "64 x 32" in refused(animation("GIF", flat(3), 100))


# Mistakes


def test_sources_that_are_no_clips_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("Not a video, whatever its name says.")
    assert "no file" in refused(tmp_path / "missing.mp4")
    assert "holds no pictures" in refused(tmp_path)
    assert "0 bytes" in refused(tmp_path / "empty.mp4")
    assert "0 bytes" in refused(b"")
    refused(tmp_path / "text.mp4")
    assert "an empty list" in refused([])
    assert "int" in refused(7)
    assert "frame 1: int" in refused([Image.new("RGB", (64, 32)), 7])
    assert "http://127.0.0.1/a.mp4" in refused("http://127.0.0.1/a.mp4")


@pytest.mark.parametrize(
    "fps",
    [0, -1, float("inf"), float("nan"), "2", True, [2], 5e-324, 1e-300, 1e300, 10_001, 10**5000],
    ids=lambda fps: type(fps).__name__,
)
def test_an_fps_that_is_no_rate_is_refused(fps: Any) -> None:
    assert "fps is" in refused(flat(3), fps=fps)


@pytest.mark.parametrize("fps", [0.001, 10_000])
def test_the_slowest_and_the_fastest_rate_give_finite_times(fps: float) -> None:
    assert np.isfinite(patches(open_video(flat(3), "video", fps=fps), SMALL).timestamps).all()


def test_a_clip_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class BreaksOff(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if size is None or size < 0:  # the header can be read, the whole cannot
                raise OSError(5, "Input/output error")
            return super().read(size)

    data = animation("GIF", flat(2), 100)
    monkeypatch.setattr("qwen35_mlx.video.open_stream", lambda *_: BreaksOff(data))
    assert "Input/output error" in refused("a.gif")


def test_frames_of_different_sizes_are_refused() -> None:
    frames = [*flat(5), *flat(1, (64, 40))]
    assert "frame 5 is 64 x 40, the first 64 x 32" in refused(frames, fps=2)


def test_thin_frames_are_refused() -> None:
    assert "200 : 1" in refused(flat(2, (201, 1)))
    with pytest.raises(InputError, match="200 : 1"):
        clip_size(4, 1, 201, VideoProcessor(), "video")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_truncated_animation_is_refused_or_whole(kind: str) -> None:
    data = animation(kind, [draw(i, 32, 64) for i in range(4)], 100)
    for end in range(0, len(data), max(1, len(data) // 60)):
        try:
            clip = open_video(data[:end], "video")
            assert colours_readable(clip)
        except InputError as error:
            assert "\n" not in str(error)


def colours_readable(clip: Clip) -> bool:
    return all(clip.frames[i].size == (64, 32) for i in range(len(clip.frames)))


def test_a_clip_without_frames_is_a_broken_call() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        Clip(())


# Settings


def test_settings_default_to_the_released_ones(tmp_path: Path) -> None:
    assert VideoProcessor.read(tmp_path) == VideoProcessor() == settings(VideoProcessor, tmp_path)


def test_settings_are_read(tmp_path: Path) -> None:
    found = settings(VideoProcessor, tmp_path, fps=1, min_frames=2, max_frames=9, min_pixels=None)
    assert found == VideoProcessor(fps=1.0, min_frames=2, max_frames=9)
    hours = settings(
        VideoProcessor, tmp_path, size={"longest_edge": 469762048, "shortest_edge": 4096}
    )
    assert hours.max_pixels == 469762048
    (tmp_path / "video_preprocessor_config.json").unlink()
    nested = {
        "video_processor": {**RELEASED[VideoProcessor], "fps": 4},
        "image_processor": {"patch_size": 99},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert VideoProcessor.read(tmp_path) == VideoProcessor(fps=4.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"fps": 0},
        {"fps": "2"},
        {"fps": True},
        {"min_frames": 0},
        {"max_frames": 3},
        {"max_frames": 7.5},
        {"patch_size": -16},
        {"cap_pixels_per_frame": True},
        {"cap_pixels_per_frame": float("nan")},
        {"fps": 10**400},
        {"fps": float("nan")},
        {"fps": 5e-324},
        {"fps": 1e300},
        {"fps": [2]},
        {"max_frames": 10**12},
        {"min_frames": [4]},
        {"size": {"longest_edge": 10**13}},
    ],
)
def test_settings_that_are_not_done_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        settings(VideoProcessor, tmp_path, **changed)
    assert "video_preprocessor_config.json: " in str(caught.value)
    assert "\n" not in str(caught.value)
