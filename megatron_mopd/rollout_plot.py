"""Rollouts as a picture, every token on the colour of its advantage."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron_mopd.palette import RGB, advantage_colour, advantage_scale, hexadecimal, readable_on, visible
from megatron_mopd.report import Example

WIDTH = 84  # character cells a line
CELL_INCHES = (0.092, 0.23)  # of one character cell
MAX_LINES = 12  # of one rollout
FONT = 9.0
LEGEND_CELLS = 41  # odd, so that zero has a cell of its own

Placed = tuple[int, int, str, RGB | None]  # line, first cell, text, ground


def rollouts(examples: Sequence[Example]) -> Figure:
    """One block an example: domain and prompt, then the tokens; a scale of the colours at the bottom."""
    scale = advantage_scale([a for example in examples for a in example.advantages])
    placed: list[Placed] = []
    line = 0
    for example in examples:
        for text in _heading(example):
            placed.append((line, 0, text, None))
            line += 1
        tokens, line = _lay_out(example, line, scale)
        placed += tokens
        line += 2
    lines = line + 1.3
    figure = Figure(figsize=(WIDTH * CELL_INCHES[0] + 0.4, (lines + 0.8) * CELL_INCHES[1]))
    axes = figure.add_axes((0.2 / figure.get_figwidth(), 0, 1 - 0.4 / figure.get_figwidth(), 1))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(lines, -0.8)
    for item in placed:
        _draw(axes, item)
    _legend(axes, line, scale)
    return figure


def _heading(example: Example) -> list[str]:
    note = f" ({example.note})" if example.note else ""
    return textwrap.wrap(f"{example.domain}{note}: {' '.join(example.prompt.split())}", WIDTH) or [example.domain]


def _lay_out(example: Example, first: int, scale: float) -> tuple[list[Placed], int]:
    """Cells of the tokens from line ``first`` on, and the last line used; an ellipsis follows MAX_LINES."""
    placed: list[Placed] = []
    line, column = first, 0
    for token, advantage in zip(example.tokens, example.advantages, strict=True):
        text, ground = visible(token), advantage_colour(advantage, scale)
        for part in [text[i : i + WIDTH] for i in range(0, len(text), WIDTH)]:
            if column + len(part) > WIDTH:
                line, column = line + 1, 0
            if line - first == MAX_LINES:
                return [*placed, (line, 0, "…", None)], line
            placed.append((line, column, part, ground))
            column += len(part)
    return placed, line


def _draw(axes: Axes, item: Placed) -> None:
    line, column, text, ground = item
    colour = "#444444" if ground is None else readable_on(ground)
    if ground is None:
        axes.text(0, line, text, va="center", color=colour, fontsize=FONT, parse_math=False)
        return
    box = Rectangle(
        (column, line - 0.45), len(text), 0.9, facecolor=hexadecimal(ground), edgecolor="#dddddd", linewidth=0.4
    )
    axes.add_patch(box)
    for i, character in enumerate(text):  # cell by cell: no font's own spacing may shift a token off its colour
        axes.text(
            column + i + 0.5,
            line,
            character,
            ha="center",
            va="center",
            color=colour,
            fontsize=FONT,
            family="DejaVu Sans Mono",
            parse_math=False,
        )


def _legend(axes: Axes, line: int, scale: float) -> None:
    for i in range(LEGEND_CELLS):
        value = scale * (2 * i / (LEGEND_CELLS - 1) - 1)
        colour = hexadecimal(advantage_colour(value, scale))
        axes.add_patch(Rectangle((0.5 * i, line - 0.35), 0.5, 0.7, facecolor=colour, linewidth=0))
    for position, value, align in ((0.0, -scale, "left"), (0.25, 0.0, "center"), (0.5, scale, "right")):
        text = f"{value:+.2g}".replace("-", "\N{MINUS SIGN}") if value else "0"
        axes.text(position * LEGEND_CELLS, line + 0.75, text, ha=align, va="center", fontsize=8)
    meaning = "advantage, nats: orange less, blue more likely under the teacher"
    axes.text(LEGEND_CELLS / 2 + 1.5, line, meaning, va="center", fontsize=FONT, color="#444444")
