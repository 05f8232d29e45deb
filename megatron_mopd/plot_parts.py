"""What all pictures share: ink, grids of panels, levels and labels that keep their distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#222222", "#8a8a8a"
COLUMNS = 3  # panels beside each other


def level(
    axes: Axes,
    value: float,
    text: str,
    colour: str,
    dashes: tuple[int, tuple[int, int]],
    side: Literal["left", "right"],
    above: bool = True,
) -> None:
    """A horizontal line with its label at one end."""
    axes.axhline(value, color=colour, linewidth=1.1, linestyle=dashes)
    axes.annotate(
        text,
        (0 if side == "left" else 1, value),
        xycoords=("axes fraction", "data"),
        xytext=(4 if side == "left" else -4, 2 if above else -2),
        textcoords="offset points",
        ha=side,
        va="bottom" if above else "top",
        color=colour,
        fontsize=8.5,
    )


def across(count: int) -> int:
    """Panels beside each other, of ``count`` in all; four stand in a square."""
    return 2 if count == 4 else min(count, COLUMNS)


def grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """``count`` panels of that many inches in height, which share their axes."""
    lines = math.ceil(count / across(count))
    figure = Figure(figsize=(3.4 * across(count), height * lines), layout="constrained")
    panels = list(figure.subplots(lines, across(count), sharex=True, sharey=True, squeeze=False).flat)
    for panel in panels:
        panel.tick_params(labelbottom=True)  # sharing hides the numbers of all but the last line, which may have gaps
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8.5, length=3, color=FAINT)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels right of the last points, moved apart where they would overlap."""
    low, high = (math.log(v) for v in axes.get_ylim())
    spots = sorted((((math.log(value) - low) / (high - low), text, colour) for value, text, colour in ends))
    heights = apart([spot for spot, _, _ in spots], gap=0.075)
    for height, (_, text, colour) in zip(heights, spots, strict=True):
        axes.annotate(
            text,
            (1, height),
            xycoords="axes fraction",
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9.5,
        )


def apart(spots: Sequence[float], gap: float) -> list[float]:
    """Ascending ``spots`` moved to at least ``gap`` from each other, below 1 as long as there is room."""
    heights: list[float] = []
    for spot in spots:
        heights.append(max(spot, heights[-1] + gap) if heights else spot)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights


def smooth(curve: Sequence[tuple[int, float]], points: int = 60) -> list[tuple[float, float]]:
    """Means of neighbouring steps, at most ``points`` of them, so that noise does not hide the trend."""
    width = max(1, math.ceil(len(curve) / points))
    parts = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [(float(np.mean([s for s, _ in part])), float(np.mean([v for _, v in part]))) for part in parts]
