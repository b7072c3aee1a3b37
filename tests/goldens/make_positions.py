"""Writes positions.npz: the positions transformers 5.23 gives to prompts with pictures and clips.

    python tests/goldens/make_positions.py           writes it (needs torch and transformers 5.23)
    python tests/goldens/make_positions.py --check   says whether the reference has moved

For each case the file holds `NAME.tokens` `[T]`, `NAME.grids` `[media, 4]` (is it a clip,
t, gh, gw), `NAME.positions` `[3, T]` and `NAME.delta`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("positions.npz")
IMAGE, VIDEO, START, END = 91, 92, 93, 94
MERGE = 2

# a number is that much text, (gh, gw) a picture, (t, gh, gw) a clip; grids are in patches
Piece = int | tuple[int, ...]
CASES: dict[str, list[Piece]] = {
    "text": [7],
    "one_token": [1],
    "picture": [5, (4, 6), 3],
    "wide_picture": [2, (2, 14), 4],
    "tall_picture": [2, (18, 2), 1],
    "one_block": [3, (2, 2), 2],
    "picture_first": [0, (6, 8), 5],
    "picture_last": [4, (8, 10), 0],
    "two_pictures": [5, (4, 6), 2, (10, 2), 6],
    "two_pictures_side_by_side": [1, (2, 4), 0, (6, 2), 1],
    "clip": [6, (3, 4, 8), 5],
    "clip_of_one_slice": [2, (1, 6, 2), 2],
    "two_clips": [3, (2, 2, 6), 4, (5, 8, 4), 1],
    "picture_then_clip": [2, (6, 4), 3, (4, 2, 10), 5],
    "clip_then_picture": [5, (3, 6, 4), 2, (4, 12), 3],
    "all_mixed": [1, (4, 4), 2, (2, 6, 2), 3, (2, 8), 1, (3, 4, 10), 2, (12, 6), 4],
}


def pieces(case: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[T]` and grids `[media, 4]` of a case; three tokens of time precede each slice."""
    tokens: list[int] = []
    grids: list[tuple[int, int, int, int]] = []
    for piece in case:
        if isinstance(piece, int):
            tokens += range(10, 10 + piece)
            continue
        clip = len(piece) == 3
        t, gh, gw = piece if len(piece) == 3 else (1, *piece)
        block = gh // MERGE * (gw // MERGE)
        for _ in range(t):
            tokens += [
                *([20, 21, 22] if clip else []),
                START,
                *[VIDEO if clip else IMAGE] * block,
                END,
            ]
        grids.append((int(clip), t, gh, gw))
    return np.array(tokens), np.array(grids, dtype=np.int64).reshape(-1, 4)


def reference(tokens: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, int]:
    """Positions and delta by `Qwen3_5Model.get_rope_index`, which needs no more of a model."""
    from types import SimpleNamespace

    import torch
    from transformers.models.qwen3_5 import modeling_qwen3_5

    owner: Any = modeling_qwen3_5.Qwen3_5Model
    vision = SimpleNamespace(spatial_merge_size=MERGE)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = lambda *args, **kwargs: owner.get_vision_position_ids(
        model, *args, **kwargs
    )
    ids = torch.tensor(tokens)[None]
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    given = [torch.tensor(grids[grids[:, 0] == clip, 1:]) for clip in (0, 1)]
    places, delta = owner.get_rope_index(
        model, ids, kinds, *(grid if len(grid) else None for grid in given)
    )
    return places[:, 0].numpy(), int(delta)


def main() -> None:
    made: dict[str, Any] = {}
    for name, case in CASES.items():
        tokens, grids = pieces(case)
        places, delta = reference(tokens, grids)
        made |= {f"{name}.tokens": tokens.astype(np.int16), f"{name}.grids": grids.astype(np.int16)}
        made |= {f"{name}.positions": places.astype(np.int16), f"{name}.delta": np.array(delta)}
    if "--check" not in sys.argv:
        np.savez_compressed(FILE, **made)
        return
    with np.load(FILE) as kept:
        moved = [key for key in made if key not in kept or not np.array_equal(made[key], kept[key])]
    sys.exit(f"the reference has moved: {', '.join(moved)}" if moved else 0)


if __name__ == "__main__":
    main()
