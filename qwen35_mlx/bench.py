"""`qwen35-mlx bench --launches MODEL`: GPU launches per decoded token, by type of layer.

Nothing is read but headers, and nothing is computed. Exit codes as of `generate`.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from . import terminal
from .commands import Command

if TYPE_CHECKING:
    from .graph import Graph
    from .launches import Launch

LAYER = re.compile(r"\blayers\.(\d+)\.(mlp|post_attention_layernorm)?")
ENDS = "embedding, positions, head, sampling"
# What a weight's path tells about the place it is used in.
KINDS = (
    ("linear_attn", "gated delta net"),
    ("self_attn", "attention"),
    ("experts", "experts"),
    ("switch_mlp", "experts"),
    ("mlp", "feed-forward"),
)
Place = tuple[int, int]  # layer, then 0 for the mixer and 1 for the feed-forward block
LONGEST = 1 << 20  # tokens; the family's context ends at 1,010,000
CONTEXT = 512  # tokens; from 4,096 on (1,024 on Max and Ultra) attention takes a launch more


@dataclass(frozen=True)
class Part:
    """All layers of one kind, each with its norm and residual sum. last: what the last launches."""

    kind: str
    layers: int
    launches: int
    last: tuple["Launch", ...]

    @property
    def per_layer(self) -> float:
        return self.launches / self.layers


def by_part(graph: "Graph", launches: Iterable["Launch"]) -> list[Part]:
    """Launches by kind of layer, in the order of the model; what is in no layer comes last.

    graph: of a step whose weights have `layers.N.` in their paths as checkpoints have it. A node
    belongs to the last layer whose weights it depends on, or else to the one that uses it.
    """
    launches = list(launches)
    places = _places(graph)
    kinds = _kinds(graph)
    groups: dict[str, dict[Any, list[Launch]]] = {}
    for launch, place in zip(launches, places, strict=True):
        layers = groups.setdefault(kinds.get(place, ENDS), {})
        layers.setdefault(place if place in kinds else None, []).append(launch)
    parts = []
    for kind, layers in sorted(groups.items(), key=lambda item: item[0] == ENDS):
        total = sum(launch.launches for layer in layers.values() for launch in layer)
        last = list(layers.values())[-1]  # the first may lack the sum before its norm
        parts.append(Part(kind, len(layers), total, tuple(x for x in last if x.launches)))
    return parts


def _place(path: str) -> Place | None:
    """Of a weight; what is before the layers has number -1. None: it is no weight."""
    if "weights." not in path:
        return None
    found = LAYER.search(path)
    if found:
        return int(found[1]), int(found[2] is not None)
    return (-1, 0) if "embed" in path else (1 << 20, 0)


def _kinds(graph: "Graph") -> dict[Place | None, str]:
    kinds: dict[Place | None, str] = {}
    for path in graph.paths.values():
        found = next((kind for word, kind in KINDS if f".{word}" in path), None)
        if found and LAYER.search(path):
            place = _place(path)
            # A block of experts also has a shared one, and its router.
            if kinds.get(place) != "experts":
                kinds[place] = found
    return kinds


def _places(graph: "Graph") -> list[Place | None]:
    """Of every node; None where several layers use what depends on none."""
    of = {name: place for name, path in graph.paths.items() if (place := _place(path))}
    for node in graph.nodes:
        place = max((of[x.name] for x in node.inputs if x.name in of), default=None)
        if place is not None:
            of |= {x.name: place for x in node.outputs}
    users: dict[str, set[Place | None]] = {}
    places: list[Place | None] = []
    for node in reversed(graph.nodes):
        place = of.get(node.outputs[0].name)
        if place is None:
            found = set().union(*(users.get(x.name, set()) for x in node.outputs))
            place = found.pop() if len(found) == 1 else None
        for x in node.inputs:
            users.setdefault(x.name, set()).add(place)
        places.append(place)
    return places[::-1]


# -- the command -----------------------------------------------------------------------------------


@click.command(cls=Command, examples=("--launches 4b", "--launches 397b --verbose"))
@click.argument("model")
@click.option("--launches", is_flag=True, help="Count GPU launches per token; needs no GPU.")
@click.option("-b", "--bits", type=int, metavar="N", help="Of a size: 3, 4 (default), 5, 6, 8, 16.")
@click.option(
    "--recipe", metavar="NAME", help="Of a size: careful (up to 4 bits the default) or uniform."
)
@click.option(
    "--context",
    type=click.IntRange(1, LONGEST),
    default=CONTEXT,
    metavar="N",
    help=f"Tokens read before, {CONTEXT} unless said.",
)
@click.option("--sampled", is_flag=True, help="Draw as the model card advises; else the likeliest.")
@click.option("--reference", is_flag=True, help="Without this project's own kernels.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Also the operations of the last layer of each kind."
)
@click.option("--order", is_flag=True, help="Also each launch of the last layers, with shapes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def command(**given: Any) -> int:
    """What MODEL costs beside its arithmetic: launches of GPU kernels per decoded token.

    They are counted from the traced graph as a Mac would run it, with every kernel of this project
    in use (on a Mac `doctor` decides which are). No weights are read, so any size works anywhere.
    MODEL is a size such as 4b, a Hub id or a local folder.
    """
    if not given.pop("launches"):
        raise click.UsageError("nothing to measure; expected --launches.")
    show = {key: given.pop(key) for key in ("verbose", "order", "as_json")}
    title, parts = measured(**given)
    if show["as_json"]:
        print(json.dumps(_as_json(title, parts)))
        return 0
    print(terminal.neutral(_table(title, parts)))
    for part in parts if show["verbose"] else ():
        print(f"\n{part.kind}:\n  {_commonest(part.last)}")
    for part in parts if show["order"] else ():
        print(f"\n{part.kind}, the last:")
        print("\n".join(f"  {_line(launch)}" for launch in part.last))
    return 0


def main(argv: list[str] | None = None, prog: str = "python -m qwen35_mlx.bench") -> None:
    """Run the command and exit the process; `argv` without the program's name."""
    sys.exit(terminal.guarded(command, sys.argv[1:] if argv is None else argv, prog))


def measured(
    model: str,
    bits: int | None = None,
    recipe: str | None = None,
    context: int = CONTEXT,
    sampled: bool = False,
    reference: bool = False,
) -> tuple[str, list[Part]]:
    """What was counted, in words, and the launches of a decoded token.

    To be called in a process that has not imported the model yet: kernels decide at import whether
    they run on a GPU.
    Raises: ModelError when `model` stands for nothing or cannot be run; ConversionError for bits or
    a recipe that there are not.
    """
    from . import stand_ins

    with stand_ins.as_on_metal():
        from . import decode_step, family, graph, launches, subject
        from .kernels import library

        if not decode_step.is_on_metal():
            raise ValueError(
                "the model was imported before; count launches in a process of its own"
            )
        title, config, formats = subject.of(model, bits, recipe)
        text = config.text
        size = family.identify(text.hidden_size, text.num_hidden_layers, text.num_experts)
        sampling = family.recommended(size if sampled else None, thinking=True)
        kernels = not reference
        step, given = decode_step.decode(config, formats, context, sampling, kernels)
        try:
            traced = graph.traced(step, given)
        finally:
            library.use(())  # `decode` took all of them into use
        found = by_part(traced, launches.counted(traced))
    return f"{title}, after {context:,} tokens", found


def _table(title: str, parts: Sequence[Part]) -> str:
    width = max(len(part.kind) for part in parts)
    lines = [
        f"GPU launches per decoded token: {title}",
        "",
        f"{'':{width}}  launches  layers  {'total':>6}",
    ]
    for part in parts:
        each = f"{part.per_layer:.2f}".removesuffix("0").removesuffix(".0")
        layers = "" if part.kind == ENDS else part.layers
        lines.append(f"{part.kind:{width}}  {each:>8}  {layers:>6}  {part.launches:>6,}")
    total = sum(part.launches for part in parts)
    return "\n".join([*lines, f"{'per token':{width}}  {'':8}  {'':6}  {total:>6,}"])


def _as_json(title: str, parts: Sequence[Part]) -> dict[str, Any]:
    return {
        "counted": title,
        "launches_per_token": sum(part.launches for part in parts),
        "parts": [
            {
                "kind": part.kind,
                "layers": part.layers,
                "launches": part.launches,
                "operations_of_the_last": dict(_by_name(part.last).most_common()),
            }
            for part in parts
        ],
    }


def _by_name(launches: Iterable["Launch"]) -> Counter[str]:
    found: Counter[str] = Counter()
    for launch in launches:
        found[launch.name] += launch.launches
    return found


def _commonest(launches: Iterable["Launch"]) -> str:
    return ", ".join(f"{count} {name}" for name, count in _by_name(launches).most_common())


def _line(launch: "Launch") -> str:
    """One launch: inputs, name, output."""
    more = f" ({launch.launches} launches)" if launch.launches > 1 else ""
    inputs = " ".join(str(list(x.shape)).replace(" ", "") for x in launch.node.inputs)
    output = launch.node.outputs[0]
    shape = str(list(output.shape)).replace(" ", "")
    return f"{launch.name}{more}: {inputs} -> {shape} {str(output.dtype).rpartition('.')[2]}"


if __name__ == "__main__":
    main()
