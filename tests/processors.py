"""Processors read from the settings files of the released folders, with changes."""

import json
from pathlib import Path
from typing import Any, TypeVar

from qwen35_mlx.image import ImageProcessor
from qwen35_mlx.video import VideoProcessor

P = TypeVar("P", ImageProcessor, VideoProcessor)

SHARED = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
FILES = {
    ImageProcessor: "preprocessor_config.json",
    VideoProcessor: "video_preprocessor_config.json",
}
RELEASED: dict[type, dict[str, Any]] = {
    ImageProcessor: {
        **SHARED,
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
    VideoProcessor: {
        **SHARED,
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        "video_processor_type": "Qwen3VLVideoProcessor",
    },
}


def settings(kind: type[P], folder: Path, **changed: Any) -> P:
    """What `kind` reads in `folder` from its released settings with some of them changed."""
    (folder / FILES[kind]).write_text(json.dumps({**RELEASED[kind], **changed}))
    return kind.read(folder)
