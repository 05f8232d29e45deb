"""The picture of a recipe's graph: stages as boxes, one style of line for each way in which one came of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Curve

from megatron_mopd import plots
from megatron_mopd.files import atomically
from megatron_mopd.plot_parts import FAINT, INK
from megatron_mopd.recipe.graph import Graph
from megatron_mopd.recipe.graph_layout import BOX, arrange

_MARGIN, _LEGEND = 0.18, 0.42  # inches around the boxes, and under them
_TEXT = 29  # characters of small print in a box
# Kind -> (what the legend says, colour, width in points, dashes).
_LINES: Mapping[str, tuple[str, str, float, Any]] = {
    "initial": ("hands on its weights", INK, 2.0, "-"),
    "teacher": ("scores rollouts", "#0072b2", 1.5, (0, (5, 2))),
    "traces": ("writes traces", "#d55e00", 1.5, (0, (6, 2, 1.2, 2))),
    "quantized": ("is stored as", "#009e73", 2.0, (0, (1.2, 1.2))),
    "measured": ("is measured", FAINT, 0.9, "-"),
    "decides": ("decides whether it runs", FAINT, 1.1, (0, (1, 2))),
}
_GROUNDS = {"train": "#ffffff", "preflight": "#eeeeee", "quantize": "#e0f2ec", "external": "#fdf3e1"}
_TAUGHT = "#e3eff8"


def save(graph: Graph, path: Path) -> None:
    """Draw a graph of :mod:`megatron_mopd.recipe.graph` as a PNG; the bytes depend on the graph alone."""
    atomically(path, lambda file: plots.save(figure(graph), file))


def figure(graph: Graph) -> Figure:
    """The picture, with a legend of the kinds of edges there are."""
    edges = [(edge["source"], edge["target"], edge["kind"]) for edge in graph["edges"]]
    layout = arrange([node["name"] for node in graph["nodes"]], edges)
    width = max(layout.size[0], 6.5) + 2 * _MARGIN
    height = layout.size[1] + 2 * _MARGIN + _LEGEND
    made = Figure(figsize=(width, height))
    axes = made.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-_MARGIN, width - _MARGIN)
    axes.set_ylim(-_MARGIN - _LEGEND, layout.size[1] + _MARGIN)
    for edge, points in sorted(layout.lines.items(), key=lambda item: -list(_LINES).index(item[0][2])):
        _line(axes, points, edge[2])
    taught = {target for _, target, kind in edges if kind in ("teacher", "traces")}
    for node in graph["nodes"]:
        _box(axes, node, layout.boxes[node["name"]], node["name"] in taught)
    kinds = [kind for kind in _LINES if any(edge[2] == kind for edge in edges)]
    handles = [
        Line2D([], [], color=colour, linewidth=points, linestyle=dashes, label=label)
        for label, colour, points, dashes in (_LINES[kind] for kind in kinds)
    ]
    if handles:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 0), "ncols": 6 if width > 12 else 3}
        axes.legend(handles=handles, frameon=False, fontsize=8.5, handlelength=3.2, labelcolor=INK, **place)
    return made


def _line(axes: Axes, points: Sequence[tuple[float, float]], kind: str) -> None:
    _, colour, width, dashes = _LINES[kind]
    vertices, codes = [points[0]], [Curve.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (x0 + x1) / 2
        vertices += [(middle, y0), (middle, y1), (x1, y1)]
        codes += [Curve.CURVE4] * 3
    curve = Curve(vertices, codes)
    axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=colour, linewidth=width, linestyle=dashes, zorder=1))
    x, y = points[-1]
    length, half = 0.1, 0.045
    head = Polygon([(x, y), (x - length, y + half), (x - length, y - half)], color=colour, linewidth=0, zorder=2)
    axes.add_patch(head)


def _box(axes: Axes, node: Mapping[str, Any], centre: tuple[float, float], taught: bool) -> None:
    x, y = centre
    skipped = node["state"] == "skipped"
    corner = (x - BOX[0] / 2, y - BOX[1] / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner,
            *BOX,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=_TAUGHT if taught else _GROUNDS[node["type"]],
            edgecolor=FAINT if skipped else INK,
            linewidth=1.1,
            linestyle=(0, (3, 2)) if skipped else "-",
            zorder=3,
        )
    )
    colour = FAINT if skipped else INK
    lines = [node["what"], _domains(node["domains"]) or node["note"], _end(node)]
    small = [_short(text) for text in lines if text]
    top = y + BOX[1] / 2
    size = 9.5 if len(node["name"]) <= 20 else 7.5
    axes.text(
        x,
        top - 0.14,
        _short(node["name"]),
        color=colour,
        fontsize=size,
        weight="bold",
        ha="center",
        va="center",
        zorder=4,
    )
    room = (BOX[1] - 0.27) / max(3, len(small))
    for i, text in enumerate(small):
        height = top - 0.25 - (i + 0.5) * room
        axes.text(x, height, text, color=colour, fontsize=7.2, ha="center", va="center", zorder=4)


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


def _domains(domains: Sequence[str]) -> str:
    text = ", ".join(domains)
    return text if len(text) <= _TEXT else f"{len(domains)} domains"


def _end(node: Mapping[str, Any]) -> str:
    if node["checkpoint_id"] is not None:
        return f"weights {node['checkpoint_id'][:12]}"
    return "" if node["state"] == "finished" else str(node["state"])
