"""The little world of the demonstration model: pictures, clips and what may be asked about them.

A picture is 96x96 pixels, a 3x3 grid of 32 pixel cells: one cell is one merged vision token.
Everything is drawn from a numpy generator, so a seed fixes every example. What is held out is
decided by the text that describes it: the sha256 of that text, modulo 16, is 0. Training never
draws such an example (see `is_held_out`).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

SIDE, CELL, FPS = 96, 32, 2.0
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 130, 30),
}
PLACES = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
COUNTS = ("None", "One", "Two", "Three", "Four")
GREY = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
NOTHING = "Nothing."

PICTURE_PROMPTS = (
    *("What is in the picture?", "What is in this picture?", "What is in the image?"),
    *("What is this?", "What do you see?", "Describe the picture.", "Describe this image."),
    *("What's in the picture?", "What can you see in this image?", "Describe this picture."),
)
CLIP_PROMPTS = (
    *(
        "What moves?",
        "What is moving?",
        "What happens?",
        "Describe the clip.",
        "Describe the video.",
    ),
    *("What happens in the clip?", "What happens in the video?", "What moves in the video?"),
    *("What happens in this video?", "What is this?", "What do you see?"),
)
SYSTEMS = ("You are a helpful assistant.", "You are a tiny model.", "Answer briefly.", "Be exact.")


@dataclass(frozen=True)
class Item:
    """One question with the one right answer; `call` is set when the answer is a tool call."""

    task: str
    key: str
    messages: list[dict]
    answer: str = ""
    reasoning: str = ""
    tools: list[dict] | None = None
    call: dict | None = None
    images: list[Image.Image] = field(default_factory=list)


@dataclass(frozen=True)
class Thing:
    """A coloured shape in one of the nine cells."""

    color: str
    shape: str
    cell: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def with_article(self) -> str:
        return ("an " if self.color == "orange" else "a ") + self.name


def is_held_out(key: str) -> bool:
    """True for one description in sixteen; these are never drawn for training."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 16 == 0


def place(cell: int) -> str:
    return ("in" if PLACES[cell] == "center" else "at") + f" the {PLACES[cell]}"


def join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def describe(things: list[Thing]) -> str:
    """The one right description: row by row, left to right."""
    if not things:
        return NOTHING
    ordered = sorted(things, key=lambda t: t.cell)
    return sentence(join([f"{t.with_article} {place(t.cell)}" for t in ordered]))


def scan(things: list[Thing]) -> str:
    """The reasoning for a picture: one line for each thing."""
    lines = [f"{PLACES[t.cell]}: {t.name}" for t in sorted(things, key=lambda t: t.cell)]
    return "\n".join(lines) or "all places: nothing"


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, rng: np.random.Generator) -> None:
    x, y = (c * CELL + CELL // 2 + rng.integers(-2, 3) for c in (thing.cell % 3, thing.cell // 3))
    r = int(rng.integers(9, 13))
    fill = tuple(int(np.clip(c + rng.integers(-12, 13), 0, 255)) for c in COLORS[thing.color])
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif thing.shape == "diamond":
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)
    else:
        arm = r // 3
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def draw_scene(things: list[Thing], rng: np.random.Generator) -> Image.Image:
    """A 96x96 picture on a light ground; size, place and colour of each thing vary a little."""
    ground = tuple(int(c) for c in rng.integers(236, 256, 3))
    image = Image.new("RGB", (SIDE, SIDE), ground)
    draw = ImageDraw.Draw(image)
    for thing in things:
        draw_thing(draw, thing, rng)
    return image


def random_things(rng: np.random.Generator, count: int) -> list[Thing]:
    colors = list(COLORS)
    return [
        Thing(colors[rng.integers(len(colors))], SHAPES[rng.integers(len(SHAPES))], int(cell))
        for cell in sorted(rng.choice(9, count, replace=False))
    ]


def random_scene(rng: np.random.Generator, held_out: bool = False) -> list[Thing]:
    """One to four things whose description is (or is not) held out."""
    while True:
        things = random_things(rng, int(rng.choice(4, p=(0.1, 0.25, 0.3, 0.35))) + 1)
        if is_held_out(describe(things)) == held_out:
            return things


def loosen(text: str, rng: np.random.Generator) -> str:
    """People do not type exactly: sometimes lower case, sometimes without the last mark."""
    if rng.random() < 0.1:
        text = text.lower()
    return text.rstrip("?.!") if rng.random() < 0.1 else text


def pick(options: tuple[str, ...], rng: np.random.Generator, exact: bool) -> str:
    """The canonical prompt in three cases of ten (always when `exact`), else any paraphrase."""
    if exact or rng.random() < 0.3:
        return options[0]
    return loosen(options[rng.integers(len(options))], rng)


def user_turn(media: dict | None, text: str, rng: np.random.Generator | None = None) -> dict:
    if media is None:
        return {"role": "user", "content": text}
    content = [media, {"type": "text", "text": text}]
    if rng is not None and rng.random() < 0.2:
        content.reverse()
    return {"role": "user", "content": content}


def system_turns(rng: np.random.Generator) -> list[dict]:
    if rng.random() < 0.9:
        return []
    return [{"role": "system", "content": SYSTEMS[rng.integers(len(SYSTEMS))]}]


def picture_turn(image: Image.Image, text: str, rng: np.random.Generator | None = None) -> dict:
    return user_turn({"type": "image", "image": image}, text, rng)


def scene_item(rng: np.random.Generator, held_out: bool = False) -> Item:
    """A picture to describe. One in sixteen training pictures is an even grey or white: nothing."""
    empty = not held_out and rng.random() < 0.06
    things = [] if empty else random_scene(rng, held_out)
    image = draw_scene(things, rng)
    if empty and rng.random() < 0.7:
        image = Image.new("RGB", (SIDE, SIDE), (int(rng.choice([128, rng.integers(256)])),) * 3)
    text = pick(PICTURE_PROMPTS, rng, held_out)
    history = [] if held_out else system_turns(rng)
    turn = picture_turn(image, text, None if held_out else rng)
    answer = describe(things)
    return Item("scene", answer, [*history, turn], answer, scan(things), images=[image])


def question(things: list[Thing], rng: np.random.Generator) -> tuple[str, str, str]:
    """A question on a picture: (question, answer, reasoning)."""
    kind = rng.integers(4)
    if kind == 0:
        answer = COUNTS[len(things)] + "."
        return "How many objects are there?", answer, scan(things)
    if kind == 1 and things:
        thing = things[rng.integers(len(things))]
        if [t.name for t in things].count(thing.name) == 1:
            where = sentence(place(thing.cell))
            return f"Where is the {thing.name}?", where, f"{PLACES[thing.cell]}: {thing.name}"
    cell = int(rng.integers(9))
    if things and rng.random() < 0.6:
        cell = things[rng.integers(len(things))].cell
    found = next((t for t in things if t.cell == cell), None)
    answer = sentence(found.with_article) if found else NOTHING
    reasoning = f"{PLACES[cell]}: {found.name if found else 'nothing'}"
    return f"What is {place(cell)}?", answer, reasoning


def question_item(rng: np.random.Generator) -> Item:
    """A conversation on one training picture: perhaps a description first, then a question.

    In one of six, a second picture follows, and the newest is the one that is meant.
    """
    things = random_scene(rng)
    image = draw_scene(things, rng)
    text, answer, reasoning = question(things, rng)
    if rng.random() < 0.4:
        turn = picture_turn(image, loosen(text, rng), rng)
        return Item("question", answer, [turn], answer, reasoning, images=[image])
    turns = [
        picture_turn(image, pick(PICTURE_PROMPTS, rng, False), rng),
        {"role": "assistant", "content": describe(things)},
    ]
    images = [image]
    if rng.random() < 0.25:
        things = random_scene(rng)
        images.append(draw_scene(things, rng))
        text, answer, reasoning = pick(PICTURE_PROMPTS, rng, False), describe(things), scan(things)
        turns.append(picture_turn(images[-1], text, rng))
    else:
        turns.append({"role": "user", "content": loosen(text, rng)})
    return Item("question", answer, turns, answer, reasoning, images=images)


def straight_path(rng: np.random.Generator) -> list[int]:
    """The two or three cells of a straight way over the grid."""
    while True:
        x, y, dx, dy = (int(v) for v in rng.integers((0, 0, -1, -1), (3, 3, 2, 2)))
        if (dx, dy) == (0, 0):
            continue
        cells = []
        while 0 <= x < 3 and 0 <= y < 3:
            cells.append(y * 3 + x)
            x, y = x + dx, y + dy
        if len(cells) > 1:
            return cells[: int(rng.integers(2, len(cells) + 1))]


@dataclass(frozen=True)
class Motion:
    """One thing that walks along `path`, and others that stand still."""

    mover: Thing
    path: tuple[int, ...]
    others: tuple[Thing, ...]

    @property
    def answer(self) -> str:
        start, end = PLACES[self.path[0]], PLACES[self.path[-1]]
        return f"The {self.mover.name} moves from the {start} to the {end}."

    def at(self, cell: int) -> list[Thing]:
        return [Thing(self.mover.color, self.mover.shape, cell), *self.others]

    @property
    def key(self) -> str:
        return f"{describe(self.at(self.path[0]))} {self.answer}"

    @property
    def reasoning(self) -> str:
        first, last = (scan(self.at(self.path[i])).replace("\n", ", ") for i in (0, -1))
        return f"start: {first}\nend: {last}"


def random_motion(rng: np.random.Generator, held_out: bool = False) -> Motion:
    """A clip's story; the stills of a training clip are no held-out pictures either."""
    while True:
        path = straight_path(rng)
        free = [c for c in range(9) if c not in path]
        things = random_things(rng, int(rng.integers(1, 4)))
        if len({t.name for t in things}) < len(things):
            continue
        cells = rng.permutation(free)
        others = tuple(
            Thing(t.color, t.shape, int(c)) for t, c in zip(things[1:], cells, strict=False)
        )
        motion = Motion(things[0], tuple(path), others)
        stills = any(is_held_out(describe(motion.at(cell))) for cell in path)
        if is_held_out(motion.key) == held_out and (held_out or not stills):
            return motion


def draw_clip(motion: Motion, rng: np.random.Generator) -> list[Image.Image]:
    """Four, six or eight frames. The thing changes cells between pairs of frames, as the vision
    tower reads two frames as one; within a pair the picture only trembles by a pixel."""
    pairs = int(rng.integers(2, 5))
    steps = len(motion.path) - 1
    if steps == 1:
        change = int(rng.integers(1, pairs))
        cells = [motion.path[int(i >= change)] for i in range(pairs)]
    else:
        cells = [motion.path[round(i * steps / (pairs - 1))] for i in range(pairs)]
    look = int(rng.integers(2**31))
    # the same generator state for each still keeps sizes and colours as they are
    stills = {c: draw_scene(motion.at(c), np.random.default_rng(look)) for c in set(cells)}
    return [tremble(stills[cell], rng) for cell in cells for _ in range(2)]


def tremble(frame: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shift by at most one pixel."""
    dx, dy = (int(v) for v in rng.integers(-1, 2, 2))
    pixels = np.pad(np.asarray(frame), ((1, 1), (1, 1), (0, 0)), mode="edge")
    return Image.fromarray(pixels[1 + dy : 1 + dy + SIDE, 1 + dx : 1 + dx + SIDE])


def clip_item(rng: np.random.Generator, held_out: bool = False) -> Item:
    motion = random_motion(rng, held_out)
    frames = draw_clip(motion, rng)
    media = {"type": "video", "video": frames, "fps": FPS}
    text = pick(CLIP_PROMPTS, rng, held_out)
    turn = user_turn(media, text, None if held_out else rng)
    history = [] if held_out else system_turns(rng)
    return Item(
        "clip", motion.key, [*history, turn], motion.answer, motion.reasoning, images=frames
    )


def distinct(make: Callable[[np.random.Generator], Item], n: int, seed: int) -> list[Item]:
    """`n` items of different keys."""
    rng = np.random.default_rng(seed)
    items: dict[str, Item] = {}
    while len(items) < n:
        item = make(rng)
        items.setdefault(item.key, item)
    return list(items.values())


def held_out_scenes(n: int, seed: int) -> list[Item]:
    """Pictures of one to four things that training never saw, asked for in the canonical words."""
    return distinct(partial(scene_item, held_out=True), n, seed)


def held_out_clips(n: int, seed: int) -> list[Item]:
    """Clips that training never saw."""
    return distinct(partial(clip_item, held_out=True), n, seed)


def held_out_tool_requests(n: int, seed: int) -> list[Item]:
    """Tool calls whose name and arguments together training never saw."""
    from requests_world import request_item

    return distinct(partial(request_item, held_out=True), n, seed)
