"""How many GPU launches a computation takes, counted from its traced graph; nothing is evaluated.

A launch is one dispatch of a Metal kernel. The numbers are the same wherever they are counted, for
the graph is traced as on a Mac.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import dispatches, graph, layouts, stand_ins
from .graph import Array, Graph, Node
from .layouts import Layout, Operation

# MLX adds the types of a custom kernel's arrays and its template's arguments to the name.
ADDED = re.compile(r"_(u?int\d+(_t)?|b?float(16)?(_t)?|bfloat16_t|half|bool_?|\d+)(?=_|$).*")
KEPT = ""  # the memory of all constants, which their owners keep


@dataclass(frozen=True)
class Launch:
    """A node of a graph and how many launches it takes; many take none. name: for people."""

    name: str
    launches: int
    node: Node


def count(function: Callable[..., Any], *arguments: Any) -> Counter[str]:
    """Launches of `function(*arguments)` by operation; a compiled function or kernel by its name.

    arguments: trees of arrays, of which only shapes and types count. They are given up: an array
    that is updated and not read afterwards is written in place.
    Raises: ValueError for an operation whose launches are not known.
    """
    found: Counter[str] = Counter()
    for launch in counted(graph.traced(function, *arguments)):
        found[launch.name] += launch.launches
    return +found


def counted(traced: Graph) -> list[Launch]:
    """Every node of the graph with its launches, in the graph's order."""
    places = {array.name: _fresh(array) for array in traced.inputs}
    operations = [_operation(node, places) for node in traced.nodes]
    last = {x.buffer: i for i, op in enumerate(operations) for x in op.inputs}
    # What the caller gets is read after all else.
    kept = {KEPT, *(places[name].buffer for name in traced.results)}
    last |= dict.fromkeys(kept, len(operations))
    found = []
    for position, (node, op) in enumerate(zip(traced.nodes, operations, strict=True)):
        buffers = [x.buffer for x in op.inputs]
        free = [i for i, b in enumerate(buffers) if last[b] == position and buffers.count(b) == 1]
        name, _, known = _kind(node)
        launches = dispatches.launches(replace(op, given_up=frozenset(free)), known)
        found.append(Launch(name, launches, node))
    return found


def _operation(node: Node, places: dict[str, Layout]) -> Operation:
    """The node with the layouts of its inputs; those of its outputs are added to `places`."""
    inputs = tuple(_layout(array, places) for array in node.inputs)
    whole = Operation(_kind(node)[1], node.arguments, inputs, node.outputs[0].shape)
    for number, array in enumerate(node.outputs):
        # Each output of `depends` is its own input; those of other views are all of the first.
        source = inputs[number : number + 1] if whole.name == "Depends" else inputs
        op = replace(whole, inputs=source, output=array.shape)
        shared = layouts.view(op)
        if shared is None:
            places[array.name] = replace(_fresh(array), strides=layouts.strides(op))
        else:
            places[array.name] = replace(source[0], shape=array.shape, strides=shared)
    return whole


def _layout(array: Array, places: dict[str, Layout]) -> Layout:
    found = places.get(array.name)
    if found is not None and found.shape == array.shape:
        return found
    strides = (0,) * len(array.shape) if array.is_repeated else layouts.rows(array.shape)
    return replace(_fresh(array), strides=strides, buffer=KEPT)


def _fresh(array: Array) -> Layout:
    new = Layout(array.shape, layouts.rows(array.shape), array.dtype.size, array.name, 0)
    return replace(new, nbytes=new.size * new.itemsize)


def _kind(node: Node) -> tuple[str, str, int | None]:
    """Name for people, name of the rule, and launches where they are known already."""
    if node.kind != "CustomKernel":
        return node.kind, node.kind, None
    kernel = node.arguments[0]
    stood_for = stand_ins.parse(kernel)
    if stood_for is None:
        return ADDED.sub("", kernel.removeprefix("custom_kernel_")).rstrip("_"), node.kind, None
    name, launches = stood_for
    return (name, name, None) if launches is None else (f"compiled {name}", "Compiled", launches)
