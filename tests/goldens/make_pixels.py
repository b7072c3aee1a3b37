"""Writes pixels.npz: what transformers 5.23 makes of drawn pictures and clips.

    python tests/goldens/make_pixels.py           writes it (needs torch and transformers 5.23)
    python tests/goldens/make_pixels.py --check   says whether the reference has moved

Pictures are drawn with integers, so none is stored; tests draw them again with `draw`. For each
case the file holds the grid, `ROWS` whole rows and the mean of every row. `image_sizes`,
`clip_sizes`, `sampled` and `seconds` are tables of the reference's arithmetic.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FILE = Path(__file__).with_name("pixels.npz")
ROWS = 6
DEFAULT = (65_536, 16_777_216)
CLIP_DEFAULT = (4_096, 25_165_824)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
UNEQUAL = ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))  # a swapped channel would show

# name: height, width, (min_pixels, max_pixels), (mean, std)
PICTURES = {
    "whole_blocks": (288, 416, DEFAULT, HALF),
    "landscape": (301, 777, DEFAULT, HALF),
    "portrait": (911, 263, DEFAULT, HALF),
    "half_even_down": (336, 400, DEFAULT, HALF),  # 10.5 and 12.5 blocks
    "half_even_up": (368, 304, DEFAULT, HALF),  # 11.5 and 9.5 blocks
    "half_even_mixed": (272, 752, DEFAULT, HALF),  # 8.5 and 23.5 blocks
    "one_pixel": (1, 1, DEFAULT, HALF),
    "tiny": (7, 5, DEFAULT, HALF),
    "below_a_block": (15, 200, DEFAULT, HALF),
    "thin": (5, 1000, DEFAULT, HALF),  # 200 : 1, the limit
    "tall": (1999, 10, DEFAULT, HALF),
    "just_below_min": (255, 250, DEFAULT, HALF),
    "small_photo": (120, 160, DEFAULT, HALF),
    "large_photo": (1080, 1350, DEFAULT, HALF),
    "shrunk": (700, 900, (4_096, 262_144), HALF),
    "shrunk_hard": (1500, 1100, (1_024, 20_000), HALF),
    "shrunk_thin": (40, 3000, (1_024, 30_000), HALF),
    "to_one_block": (600, 500, (1_024, 1_024), HALF),
    "grown": (90, 210, (500_000, 900_000), HALF),
    "grown_tiny": (3, 2, (300_000, 900_000), HALF),
    "narrow_bounds": (333, 444, (100_352, 102_400), HALF),
    "unequal_channels": (410, 290, DEFAULT, UNEQUAL),
}
# name: frames in the source, its fps, height, width; sides are whole blocks, so none is resized
CLIPS = {
    "even": (8, 2.0, 64, 96),
    "odd": (7, 2.0, 96, 64),
    "sampled": (37, 12.5, 64, 128),
    "two_frames": (2, 30.0, 128, 32),
    "three_frames": (3, 24.0, 32, 160),
    "ntsc": (130, 30000 / 1001, 96, 96),
}


def draw(seed: int, height: int, width: int) -> Image.Image:
    """A picture of ramps, edges, fine stripes and noise, `height` x `width` RGB; integers only."""
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    red = (x * 5 + y * 2 + seed * 31) // 3
    green = np.where((x // 23 + y // 17 + seed) % 2, 230, 20) + 0 * x
    blue = (x * y // 7 + seed * 11) % 256 // 2 + 127 * ((x + y) % 3 == 0)
    raw = np.random.PCG64(seed).random_raw(height * width).reshape(height, width)
    noise = (raw >> np.uint64(40)).astype(np.int64) % 24
    pixels = np.stack([red + 0 * y, green + noise, blue + noise], axis=-1)
    return Image.fromarray((pixels % 256).astype(np.uint8))


def chosen(rows: int) -> np.ndarray:
    """The rows of a case that are kept whole, first and last among them."""
    return np.unique(np.linspace(0, rows - 1, ROWS).round().astype(int))


def numbers(seed: int) -> Iterator[int]:
    """Endless whole numbers that every machine draws alike."""
    stream = np.random.PCG64(seed)
    while True:
        yield int(stream.random_raw()) >> 33


def picture_sizes(count: int = 1500) -> list[tuple[int, int, int, int]]:
    """(height, width, min_pixels, max_pixels), many at the halves between two blocks."""
    draws = numbers(1)
    found: list[tuple[int, int, int, int]] = []
    bounds = (DEFAULT, (1_024, 1_024), (4_096, 262_144), (300_000, 900_000), (65_536, 1_000_000))
    while len(found) < count:
        height, width = (next(draws) % 10 ** (1 + next(draws) % 4) + 1 for _ in range(2))
        if next(draws) % 3 == 0:
            height, width = (height % 40 * 2 + 1) * 16, (width % 40 * 2 + 1) * 16
        if max(height, width) <= 200 * min(height, width):
            found.append((height, width, *bounds[next(draws) % len(bounds)]))
    return found


def clip_sizes(count: int = 1500) -> list[tuple[int, ...]]:
    """(frames, height, width, min_pixels, max_pixels)."""
    draws = numbers(2)
    found: list[tuple[int, ...]] = []
    bounds = (CLIP_DEFAULT, (131_072, 786_432), (4_096, 300_000), (2_000_000, 9_000_000))
    while len(found) < count:
        frames = next(draws) % (8, 40, 768)[next(draws) % 3] + 2
        height, width = (next(draws) % 10 ** (1 + next(draws) % 4) + 1 for _ in range(2))
        if next(draws) % 3 == 0:
            height, width = (height % 40 * 2 + 1) * 16, (width % 40 * 2 + 1) * 16
        if max(height, width) <= 150 * min(height, width):
            found.append((frames, height, width, *bounds[next(draws) % len(bounds)]))
    return found


def lengths() -> list[tuple[int, float]]:
    """(frames in the source, its fps); the last two meet the limit of 768."""
    draws = numbers(3)
    rates = (24.0, 30000 / 1001, 25.0, 10.0, 60.0, 1.0, 2.0, 12.5, 100 / 7)
    found = [(next(draws) % 300 + 1, rates[i % len(rates)]) for i in range(60)]
    return [*found, (1, 24.0), (5, 0.5), (11_525, 30.0), (200_000, 24.0)]


def make() -> dict[str, np.ndarray]:
    """All arrays of the file, from transformers."""
    return {**_pictures(), **_clips(), **_tables()}


def _keep(name: str, pixels: np.ndarray, grid: Any) -> dict[str, np.ndarray]:
    pixels = np.asarray(pixels, np.float32)
    return {
        f"{name}.grid": np.asarray(grid).reshape(3),
        f"{name}.rows": pixels[chosen(len(pixels))],
        f"{name}.means": pixels.mean(axis=1, dtype=np.float64).astype(np.float32),
    }


def _pictures() -> dict[str, np.ndarray]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    found: dict[str, np.ndarray] = {}
    for seed, (name, (height, width, bounds, (mean, std))) in enumerate(PICTURES.items()):
        processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": bounds[0], "longest_edge": bounds[1]},
            patch_size=16,
            temporal_patch_size=2,
            merge_size=2,
            image_mean=list(mean),
            image_std=list(std),
        )
        made = processor(images=[draw(seed, height, width)], return_tensors="np")
        found |= _keep(f"picture.{name}", made["pixel_values"], made["image_grid_thw"])
    return found


def _reference_clip() -> Any:
    """The reference's clip processor without its constructor, which asks for torchvision."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return object.__new__(Qwen3VLVideoProcessor)


def _sampled(total: int, fps: float) -> tuple[list[int], list[float]]:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    indices = _reference_clip().sample_frames(metadata).tolist()
    reference: Any = object.__new__(Qwen3VLProcessor)
    # the method appends to the list that it is given
    seconds = reference._calculate_timestamps(list(indices), fps, 2)
    return indices, seconds


def _clips() -> dict[str, np.ndarray]:
    import torch

    found: dict[str, np.ndarray] = {}
    for seed, (name, (total, fps, height, width)) in enumerate(CLIPS.items()):
        indices, seconds = _sampled(total, fps)
        frames = [np.asarray(draw(seed * 1000 + i, height, width)) for i in indices]
        video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None].float()
        # the normalisation that torchvision fuses: mean and deviation in units of 1/255
        video = (video - 127.5) / 127.5
        pixels, *grid = _reference_clip().patchify(
            video, patch_size=16, merge_size=2, temporal_patch_size=2
        )
        found |= _keep(f"clip.{name}", pixels[0].numpy(), grid)
        found[f"clip.{name}.seconds"] = np.array(seconds)
    return found


def _tables() -> dict[str, np.ndarray]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as clip_resize

    pictures = [(*row, *smart_resize(row[0], row[1], 32, *row[2:])) for row in picture_sizes()]
    clips = [
        (frames, height, width, low, high, *clip_resize(frames, height, width, 2, 32, low, high))
        for frames, height, width, low, high in clip_sizes()
    ]
    samples = [_sampled(*row) for row in lengths()]
    return {
        "image_sizes": np.array(pictures, np.int32),
        "clip_sizes": np.array(clips, np.int32),
        "counts": np.array([len(indices) for indices, _ in samples], np.int32),
        "sampled": np.array([i for indices, _ in samples for i in indices], np.int32),
        "seconds": np.array([s for _, seconds in samples for s in seconds]),
    }


def main() -> int:
    """Writes or checks the file; 1 when it has moved."""
    made = make()
    if "--check" not in sys.argv[1:]:
        arrays: Any = made
        np.savez_compressed(FILE, **arrays)
        print(f"{FILE}: {len(made)} arrays, {FILE.stat().st_size} bytes")
        return 0
    stored = np.load(FILE)
    moved = sorted(
        name
        for name in made.keys() | set(stored.files)
        if name not in made
        or name not in stored.files
        or made[name].shape != stored[name].shape
        or np.abs(made[name].astype(np.float64) - stored[name]).max(initial=0) > 1e-6
    )
    print(f"{FILE.name}: moved: {', '.join(moved)}" if moved else f"{FILE.name}: as stored")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
