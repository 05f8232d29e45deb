"""Where the boxes and lines of a recipe's graph go: layers from left to right, in inches, with no line behind a box.

A layer is the longest path to it. An edge over several layers has a lane of its own through each, which edges of one
kind from one stage share. Lanes and boxes of a layer are swept towards the mean of their neighbours (Sugiyama, Tagawa
and Toda 1981), then pushed apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

BOX = (1.68, 0.74)
"""Inches of a stage's box."""
GAP = 0.7
"""Inches between layers."""
LANE = 0.2
"""Inches between lines that pass a layer."""
_SWEEPS = 24

Edge = tuple[str, str, str]
"""Source, target and kind."""
Slot = tuple[str, str, int]
"""A place in a layer: a stage (its name, "", layer), or a lane (source, kind, layer)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Centres of boxes, and for every edge the points it passes, in inches; y grows upwards."""

    boxes: Mapping[str, tuple[float, float]]
    lines: Mapping[Edge, tuple[tuple[float, float], ...]]
    """From the right side of the source to the left side of the target; lanes are entered and left horizontally."""
    size: tuple[float, float]


def arrange(names: Sequence[str], edges: Sequence[Edge]) -> Layout:
    """The layout of ``names``, each after those that its edges come from, and ``edges`` between them."""
    layer = dict.fromkeys(names, 0)
    for name in names:
        layer[name] = max((layer[source] + 1 for source, target, _ in edges if target == name), default=0)
    paths = {edge: _path(edge, layer) for edge in edges}
    slots = {(name, "", layer[name]): None for name in names}
    slots |= {slot: None for path in paths.values() for slot in path}
    columns = [[slot for slot in slots if slot[2] == i] for i in range(max(layer.values()) + 1)]
    links = dict.fromkeys(link for path in paths.values() for link in pairwise(path))
    height = _heights(columns, links)
    x = {i: BOX[0] / 2 + i * (BOX[0] + GAP) for i in range(len(columns))}
    low = min(height.values())
    boxes = {name: (x[layer[name]], height[name, "", layer[name]] - low + BOX[1] / 2) for name in names}
    y = {slot: value - low + BOX[1] / 2 for slot, value in height.items()}
    ports = _ports(paths, y)
    lines = {edge: tuple(_points(path, x, y, *ports[edge])) for edge, path in paths.items()}
    top = max(y.values()) + BOX[1] / 2
    return Layout(boxes=boxes, lines=lines, size=(x[len(columns) - 1] + BOX[0] / 2, top))


def _path(edge: Edge, layer: Mapping[str, int]) -> tuple[Slot, ...]:
    source, target, kind = edge
    first, last = layer[source], layer[target]
    return ((source, "", first), *((source, kind, i) for i in range(first + 1, last)), (target, "", last))


def _heights(columns: Sequence[list[Slot]], links: Iterable[tuple[Slot, Slot]]) -> dict[Slot, float]:
    """Centres of all slots; each layer's are apart by what they need."""
    near: dict[Slot, list[Slot]] = {slot: [] for column in columns for slot in column}
    for a, b in links:
        near[a].append(b)
        near[b].append(a)
    y: dict[Slot, float] = {}
    for column in columns:
        for i, slot in enumerate(column):
            y[slot] = -i * (BOX[1] + 0.4)
    for sweep in range(_SWEEPS):
        for column in columns if sweep % 2 == 0 else list(reversed(columns)):
            wanted = {slot: sum(y[n] for n in near[slot]) / len(near[slot]) if near[slot] else 0.0 for slot in column}
            column.sort(key=lambda slot: -wanted[slot])
            _apart(column, wanted, y)
    return y


def _apart(column: Sequence[Slot], wanted: Mapping[Slot, float], y: dict[Slot, float]) -> None:
    """Put a layer's slots as near to ``wanted`` as their order and sizes allow, in the sense of least squares.

    Neighbours that are too close form a block that moves to the mean of what its members want.
    """
    offset, offsets = 0.0, []
    for i, slot in enumerate(column):
        if i:
            offset += (_size(column[i - 1]) + _size(slot)) / 2
        offsets.append(offset)
    blocks: list[tuple[float, int]] = []  # mean of wanted + offset, and members; from the top down
    for slot, below in zip(column, offsets, strict=True):
        mean, count = wanted[slot] + below, 1
        while blocks and blocks[-1][0] < mean:
            other, members = blocks.pop()
            mean, count = (mean * count + other * members) / (count + members), count + members
        blocks.append((mean, count))
    means = [mean for mean, count in blocks for _ in range(count)]
    for slot, below, mean in zip(column, offsets, means, strict=True):
        y[slot] = mean - below


def _size(slot: Slot) -> float:
    return LANE if slot[1] else BOX[1] + 0.3


def _ports(paths: Mapping[Edge, Sequence[Slot]], y: Mapping[Slot, float]) -> dict[Edge, tuple[float, float]]:
    """Heights at which each edge leaves its source and meets its target, spread over the sides of the boxes.

    Edges of one kind leave a box together.
    """
    out: dict[Edge, float] = {}
    into: dict[Edge, float] = {}
    for name in {name for edge in paths for name in edge[:2]}:
        leaving = [edge for edge in paths if edge[0] == name]
        kinds = sorted({e[2] for e in leaving}, key=lambda k: -max(y[paths[e][1]] for e in leaving if e[2] == k))
        for edge in leaving:
            out[edge] = y[paths[edge][0]] + _spread(kinds.index(edge[2]), len(kinds))
        meeting = sorted((e for e in paths if e[1] == name), key=lambda e: -y[paths[e][-2]])
        for i, edge in enumerate(meeting):
            into[edge] = y[paths[edge][-1]] + _spread(i, len(meeting))
    return {edge: (out[edge], into[edge]) for edge in paths}


def _spread(index: int, count: int) -> float:
    """Inches above a box's middle of its ``index``-th port from the top."""
    return 0.0 if count == 1 else (0.5 - index / (count - 1)) * 0.62 * BOX[1]


def _points(
    path: Sequence[Slot], x: Mapping[int, float], y: Mapping[Slot, float], start: float, end: float
) -> Iterable[tuple[float, float]]:
    yield x[path[0][2]] + BOX[0] / 2, start
    for slot in path[1:-1]:
        yield x[slot[2]] - BOX[0] / 2, y[slot]
        yield x[slot[2]] + BOX[0] / 2, y[slot]
    yield x[path[-1][2]] - BOX[0] / 2, end
