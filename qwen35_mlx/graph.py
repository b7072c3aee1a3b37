"""A function's graph as it would be evaluated, from a trace.

MLX's export has shapes, types and arguments, but of a graph in which equal operations on equal
inputs have become one; evaluation repeats them. Its drawing in DOT has them all, and nothing but
names. Both list operations in the same order, so one is laid beside the other.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from . import stand_ins
from .layouts import VIEWS

CONSTANT = "constant"  # the drawing does not tell one from another
IDENTITIES = ("Copy", "StopGradient")  # an export leaves them out
RESULT = "result."
SOURCE = re.compile(r'\{ rank=source; "([^"]+)"')
LINE = re.compile(r'\{ \d+ \[label ="([^" ]*)|"([^"]+)" -> \d+|\d+ -> "([^"]+)"')
# The drawing says what an operation does where an export says its class.
CLASSES = {
    "BitwiseBinary": ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift"),
    "Equal": ("NaNEqual",),
    "Log": ("Log2", "Log10"),
    "Reduce": ("And", "Or", "Sum", "Prod", "Min", "Max"),
    "Scan": ("CumSum", "CumProd", "CumMin", "CumMax", "CumLogaddexp"),
    "Sqrt": ("Rsqrt",),
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names}


@dataclass(frozen=True)
class Array:
    """An array of a graph. is_repeated: a constant that was broadcast."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    is_repeated: bool = False


@dataclass(frozen=True)
class Node:
    """An operation: its class in MLX, the arguments of that, what it reads and what it makes."""

    kind: str
    arguments: Sequence[Any]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


@dataclass(frozen=True)
class Graph:
    """nodes: in an order in which they can run. results: names of the arrays that are returned.

    paths: of the inputs in the arguments, by name.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Array, ...]
    results: frozenset[str]
    paths: Mapping[str, str]


def traced(function: Callable[..., Any], *arguments: Any) -> Graph:
    """The graph of `function(*arguments)` as on a Mac with Metal; nothing is evaluated.

    arguments: trees of arrays, of which only shapes and types count.
    Raises: ValueError for an operation that MLX cannot export.
    """
    leaves = stand_ins.leaves(arguments)
    drawing, records = io.StringIO(), list[dict[str, Any]]()

    def flat(*arrays: mx.array) -> list[mx.array]:
        # Copies share the array and not the object, which an update in place would change.
        supply = map(copy, arrays)
        results = function(*tree_map(lambda _: next(supply), arguments))
        made = [array for _, array in stand_ins.leaves([results])]
        # The arguments first: their names are the first that are drawn. There may be thousands.
        names = {f"{RESULT}{i}": array for i, array in enumerate(made)}
        mx.export_to_dot(drawing, *arrays, *made, **names)
        return made

    with stand_ins.tracing():
        mx.export_function(records.append, flat, *[array for _, array in leaves])
    text = drawing.getvalue()
    sources = SOURCE.findall(text)[: len(leaves)]
    inputs = tuple(
        Array(name, array.shape, array.dtype)
        for name, (_, array) in zip(sources, leaves, strict=True)
    )
    paths = {name: path for name, (path, _) in zip(sources, leaves, strict=True)}
    nodes, results = _aligned(_drawn(text), records, sources)
    return Graph(nodes, inputs, results, paths)


@dataclass
class _Drawn:
    """An operation in the drawing, with the names of its arrays there."""

    kind: str
    inputs: list[str]
    outputs: list[str]


def _drawn(text: str) -> list[_Drawn]:
    found: list[_Drawn] = []
    for label, read, made in LINE.findall(text):
        if label:
            found.append(_Drawn(CLASS_OF.get(label, label), [], []))
        elif read:
            found[-1].inputs.append(read)
        else:
            found[-1].outputs.append(made)
    return found


def _aligned(
    drawn: Sequence[_Drawn], records: Sequence[dict[str, Any]], sources: Sequence[str]
) -> tuple[tuple[Node, ...], frozenset[str]]:
    """Each operation of the drawing with shapes and arguments of its record or its equal's.

    sources: names of the arguments. Returns: also the names of the results.
    """
    inputs = next(r["inputs"] for r in records if r["type"] == "inputs")
    # Names of the export by names of the drawing; what is in neither depends on no argument.
    export = {name: other for name, (other, _, _) in zip(sources, inputs, strict=True)}
    waiting, fixed = _waiting(records, set(export.values()))
    earlier: dict[tuple[Any, ...], dict[str, Any]] = {}
    views = _Views()
    nodes = []
    for one in drawn:
        names = tuple(export.get(name, CONSTANT) for name in one.inputs)
        if set(names) <= {CONSTANT}:
            if one.kind in VIEWS:
                views.add(one)
            else:
                nodes.append(_node(one, fixed[one.kind], views))
            continue
        if one.kind in IDENTITIES:
            views.add(one)
            export[one.outputs[0]] = names[0]
            continue
        key = (one.kind, names)
        record = waiting.pop()[1] if waiting and waiting[-1][0] == key else earlier.get(key)
        if record is None:
            raise ValueError(f"the traced {one.kind} of {one.inputs} is not the drawn one")
        earlier[key] = record
        export |= zip(one.outputs, (name for name, _, _ in record["outputs"]), strict=True)
        nodes.append(_node(one, record, views))
    if waiting:
        raise ValueError(f"{len(waiting)} traced operations are not in the drawing")
    made = [x.name for node in nodes for x in node.outputs]
    everything = {*sources, *made, *views.of}
    results = {views.of.get(name, name) for name in everything if name.startswith(RESULT)}
    return tuple(nodes), frozenset(results & {*sources, *made})


def _waiting(
    records: Sequence[dict[str, Any]], known: set[str]
) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Records of operations with what the drawing says of them, the last one first.

    known: names of the arguments. And one record of each class that depends on none of them: many
    of those are equal, and their shapes change nothing.
    """
    found, fixed = [], {}
    for record in records:
        if record["type"] != "primitive":
            continue
        names = tuple(name if name in known else CONSTANT for name, _, _ in record["inputs"])
        if set(names) <= {CONSTANT}:
            fixed[record["name"]] = record
        else:
            known |= {name for name, _, _ in record["outputs"]}
            found.append(((record["name"], names), record))
    return found[::-1], fixed


class _Views:
    """Arrays that are others: constants in any shape, and what `stop_gradient` gives."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.repeated: set[str] = set()

    def add(self, one: _Drawn) -> None:
        source = one.inputs[0]
        self.of |= dict.fromkeys(one.outputs, self.of.get(source, source))
        if one.kind == "Broadcast" or source in self.repeated:
            self.repeated |= set(one.outputs)


def _node(one: _Drawn, record: dict[str, Any], views: _Views) -> Node:
    inputs = tuple(
        Array(views.of.get(name, name), shape, dtype, name in views.repeated)
        for name, (_, shape, dtype) in zip(one.inputs, record["inputs"], strict=True)
    )
    outputs = tuple(
        Array(name, shape, dtype)
        for name, (_, shape, dtype) in zip(one.outputs, record["outputs"], strict=True)
    )
    return Node(one.kind, record["arguments"], inputs, outputs)
