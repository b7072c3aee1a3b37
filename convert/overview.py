"""The plan as text: what a conversion reads, writes and needs, and how each matrix is stored."""

import os
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen35_mlx.errors import shown
from qwen35_mlx.terminal import gigabytes

from . import recipe
from .layout import Target
from .plan import Plan

WIDTH = 100
VECTORS = "vectors, convolution"
WHY_VECTORS = "never packed: few bytes, and each scales a whole channel"


@dataclass(frozen=True)
class Disk:
    """Bytes that one disk must take, by what they are, and what is free there."""

    folder: Path
    uses: Mapping[str, int]
    free: int

    @property
    def needed(self) -> int:
        return sum(self.uses.values())


@dataclass(frozen=True)
class Overview:
    """One conversion as far as it is known beforehand.

    what: where the figures come from, for people. memory: bytes a process may still use.
    spare: bytes of each disk that stay free.
    """

    name: str
    out: Path
    what: str
    plan: Plan
    disks: tuple[Disk, ...]
    memory: int
    spare: int

    @property
    def obstacles(self) -> list[str]:
        """Why this machine cannot do it; empty when it can."""
        found = [
            f"{gigabytes(disk.needed + self.spare - disk.free)} of disk are missing at "
            f"{shown(disk.folder)}"
            for disk in self.disks
            if disk.needed + self.spare > disk.free
        ]
        if self.plan.peak_memory > self.memory:
            missing = gigabytes(self.plan.peak_memory - self.memory)
            found.append(f"{missing} of memory are missing")
        return found


def disks(uses: Sequence[tuple[Path, str, int]]) -> tuple[Disk, ...]:
    """The disks that receive `uses`: (folder, which need not exist; what; bytes)."""
    found: dict[int, Disk] = {}
    for wanted, what, nbytes in uses:
        path = wanted.absolute()
        existing = next(p for p in (path, *path.parents) if os.path.exists(p))
        device = existing.stat().st_dev
        disk = found.get(device) or Disk(existing, {}, shutil.disk_usage(existing).free)
        found[device] = replace(disk, uses={**disk.uses, what: nbytes})
    return tuple(found.values())


def single(overview: Overview) -> str:
    """Everything about one conversion."""
    plan = overview.plan
    files = len(plan.files)
    rows = [
        ("source", f"{gigabytes(plan.source_bytes)} ({overview.what})"),
        ("output", f"{gigabytes(plan.output_bytes)} in {files} {_many(files, 'file')}"),
        ("bits per weight", f"{plan.bits_per_weight:.2f}"),
        ("peak memory", f"{gigabytes(plan.peak_memory)}; {gigabytes(overview.memory)} free"),
        *(("peak disk", _disk(disk)) for disk in overview.disks),
        ("this machine", "; ".join(overview.obstacles) or "can do it"),
    ]
    lines = [f"{overview.name} -> {shown(overview.out)}", *(f"  {k:16}{v}" for k, v in rows)]
    return "\n".join(lines) + "\n\n" + details([plan])


def several(overviews: Sequence[Overview]) -> str:
    """One row for each conversion, then what they have in common."""
    head = ("model", "source", "output", "bits/weight", "memory", "disk", "this machine")
    rows = [
        (
            overview.name,
            gigabytes(overview.plan.source_bytes),
            gigabytes(overview.plan.output_bytes),
            f"{overview.plan.bits_per_weight:.2f}",
            gigabytes(overview.plan.peak_memory),
            " + ".join(gigabytes(disk.needed) for disk in overview.disks),
            "; ".join(overview.obstacles) or "can do it",
        )
        for overview in overviews
    ]
    first = overviews[0]
    free = [f"{gigabytes(disk.free)} of disk at {shown(disk.folder)}" for disk in first.disks]
    said = f"Free: {gigabytes(first.memory)} of memory; {'; '.join(free)}."
    folder = f"Source: {first.what}. Output: folders in {shown(first.out.parent)}."
    table = _table(head, rows, right=range(1, 6))
    return f"{folder}\n{said}\n\n{table}\n\n" + details([o.plan for o in overviews])


def details(plans: Sequence[Plan]) -> str:
    """The precision map, what stays in BF16 against it, and what is left out."""
    parts = [precision_map(plans)]
    plain = Counter(item for plan in plans for item in _undivided(plan))
    if plain:
        parts.append("\nKept in BF16, because the group does not divide their width:")
        parts += [
            f"  {name} ({count} {_many(count, 'matrix', 'matrices')}, {columns:,} columns)"
            for (name, columns), count in sorted(plain.items())
        ]
    left = Counter((_class_of(name), why) for plan in plans for name, why in plan.left_out.items())
    if left:
        parts.append("\nLeft out:")
        parts += [
            f"  {name} ({count} {_many(count, 'tensor')}): {why}"
            for (name, why), count in sorted(left.items())
        ]
    return "\n".join(parts)


def precision_map(plans: Sequence[Plan]) -> str:
    """How each class of matrices is stored, its share of the weights, and why; of all plans.

    plans: of one set of options. A share that differs between them is given as its range.
    """
    options = plans[0].options
    shares: dict[tuple[str, str], list[float]] = {}
    for plan in plans:
        weights: Counter[tuple[str, str]] = Counter()
        tied = _is_tied(plan)
        for target in plan.targets:
            matrix = _is_matrix(target)
            row = recipe.rule_of(target.path, tied).matrices if matrix else VECTORS
            weights[row, _stored(target)] += target.nparameters
        for key, weight in weights.items():
            shares.setdefault(key, []).append(100 * weight / plan.nparameters)
    why = {rule.matrices: rule.why for rule in recipe.RULES} | {VECTORS: WHY_VECTORS}
    order = {name: place for place, name in enumerate(why)}
    rows = [
        (matrices, stored, _range(shares[matrices, stored]), why[matrices])
        for matrices, stored in sorted(shares, key=lambda row: order[row[0]])
    ]
    head = ("matrices", "stored as", "share", "why")
    title = f"How the weights are stored ({options.label}, recipe {options.recipe})"
    return f"{title}:\n\n{_table(head, rows, right=(2,))}"


def _is_tied(plan: Plan) -> bool:
    """The embedding of a tied model is its output head; then there is no other one."""
    return all(target.path != "lm_head" for target in plan.targets)


def _is_matrix(target: Target) -> bool:
    return len(target.shape) > 1 and "conv1d" not in target.name


def _stored(target: Target) -> str:
    f = target.packing
    if f is None:
        return "BF16" if _is_matrix(target) else "BF16, F32"
    return f"{f.bits} bits, group {f.group_size}" if f.mode == "affine" else f.mode


def _undivided(plan: Plan) -> Iterator[tuple[str, int]]:
    """Class and width of each matrix whose rule would pack it."""
    tied = _is_tied(plan)
    for target in plan.targets:
        if target.packing is None and _is_matrix(target):
            found = recipe.wanted(recipe.rule_of(target.path, tied), plan.options)
            if found is not None and target.columns % found.group_size:
                yield _class_of(target.path), target.columns


def _class_of(name: str) -> str:
    """`visual.blocks.*.mlp.linear_fc2` for `model.visual.blocks.7.mlp.linear_fc2`."""
    return re.sub(r"\.[0-9]+(?=\.)", ".*", name).removeprefix("model.")


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.1f}" for value in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low}-{high} %"


def _disk(disk: Disk) -> str:
    uses = " + ".join(f"{what} {gigabytes(count)}" for what, count in disk.uses.items())
    total = f"{gigabytes(disk.needed)} ({uses})" if len(disk.uses) > 1 else uses
    return f"{total}; {gigabytes(disk.free)} free at {shown(disk.folder)}"


def _many(count: int, one: str, more: str | None = None) -> str:
    return one if count == 1 else more or one + "s"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their contents; the last one is wrapped. right: columns of numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    indent = 2 + sum(widths) + 2 * len(widths)
    lines = []
    for row in [head, *rows]:
        cells = [
            f"{cell:>{width}}" if i in right else f"{cell:{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        begin = "  " + "".join(f"{cell}  " for cell in cells)
        wrapped = textwrap.wrap(row[-1], max(WIDTH - indent, 24)) or [""]
        lines += [begin + wrapped[0], *(" " * indent + line for line in wrapped[1:])]
    return "\n".join(lines)
