"""A pre-flight's result as a picture: metrics of every teacher in every domain, and the gap along the rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from megatron_mopd.palette import readable_on
from megatron_mopd.plots import FAINT, INK, save
from megatron_mopd.preflight.table import COLUMNS, WORDS, shown

__all__ = ["preflight", "save"]

PANELS = 3  # beside each other
COLOURS = {"go": "#009e73", "warm_up": "#e69f00", "refuse": "#d55e00"}
INKS = {"go": "#00704f", "warm_up": "#9a6700", "refuse": "#b34700"}
"""The same, readable on white."""
_SCALE = LinearSegmentedColormap.from_list("bound", ["#d55e00", "#f7e3c4", "#ffffff", "#d9efe7", "#009e73"])
_BAND, _LINE = "#56b4e9", "#0072b2"

# metric -> the threshold it is held against, and its best value
_BOUNDS = {
    "overlap": ("min_overlap", 1.0),
    "teacher_shared": ("min_shared_mass", 1.0),
    "student_shared": ("min_shared_mass", 1.0),
    "implausible": ("max_implausible", 0.0),
    "disagreement": ("max_disagreement", 0.0),
}


def preflight(result: Mapping[str, Any]) -> Figure:
    """Above a heat map, a row for each teacher in each domain: green where a metric is better than its threshold,
    orange where worse, white at it and where none decides. Below, for the same rows, quantiles of log p_T - log p_S
    over the position in the completion."""
    rows = [(name, domain) for name, teacher in result["teachers"].items() for domain in teacher["domains"]]
    across = min(PANELS, len(rows))
    down = math.ceil(len(rows) / across)
    notes = _notes(result)
    heights = [0.42 * len(rows) + 0.9, 0.2 * len(notes) + 0.05, *[2.15] * down]
    figure = Figure(figsize=(11.6, sum(heights) + 0.7), layout="constrained")
    grid = figure.add_gridspec(2 + down, across, height_ratios=heights)
    _heat(figure.add_subplot(grid[0, :]), result, rows)
    _text(figure.add_subplot(grid[1, :]), notes)
    panels = [figure.add_subplot(grid[2 + i // across, i % across]) for i in range(len(rows))]
    shown_gaps = [result["teachers"][name]["domains"][domain]["gap_by_position"] for name, domain in rows]
    low, high = _limits(shown_gaps)
    for i, (axes, (name, domain), bins) in enumerate(zip(panels, rows, shown_gaps, strict=True)):
        _gap(axes, bins, low, high)
        colour = INKS[result["teachers"][name]["decision"]]
        axes.set_title(f"{name} → {domain}", loc="left", fontsize=10, color=colour)
        if i == 0:
            _legend(axes)
        if i % across == 0:
            axes.set_ylabel("log p$_T$ − log p$_S$, nats", fontsize=9)
        if i + across >= len(rows):
            axes.set_xlabel("position in the completion", fontsize=9)
    return figure


def _heat(axes: Axes, result: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> None:
    headings = [heading for _, heading, _ in COLUMNS]
    for y, (name, domain) in enumerate(rows):
        teacher = result["teachers"][name]
        for x, (metric, _, form) in enumerate(COLUMNS):
            value = teacher["domains"][domain][metric]
            _cell(
                axes,
                x,
                y,
                shown(value, form).replace("-", "\N{MINUS SIGN}"),
                _SCALE(_goodness(metric, value, result["thresholds"])),
            )
        decision = teacher["decision"]
        _cell(axes, len(COLUMNS), y, WORDS[decision], _rgba(COLOURS[decision]))
    axes.set_xlim(0, len(COLUMNS) + 1)
    axes.set_ylim(len(rows), 0)
    bounded = {m: result["thresholds"][setting] for m, (setting, _) in _BOUNDS.items()}
    labels = [
        f"{heading}\n{'≥' if _BOUNDS[metric][1] else '≤'} {bounded[metric]:g}" if metric in bounded else f"{heading}\n"
        for (metric, _, _), heading in zip(COLUMNS, headings, strict=True)
    ]
    axes.set_xticks([x + 0.5 for x in range(len(labels) + 1)], [*labels, "decision\n"], fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [f"{name} → {domain}" for name, domain in rows], fontsize=10)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"student {result['student'][:12]} on its own rollouts, T teacher, S student, top {result['top_k']}",
        loc="left",
        fontsize=9,
        color=FAINT,
    )


def _cell(axes: Axes, x: int, y: int, text: str, colour: tuple[float, float, float, float]) -> None:
    axes.add_patch(Rectangle((x + 0.03, y + 0.05), 0.94, 0.9, facecolor=colour, edgecolor="#dddddd", linewidth=0.5))
    red, green, blue = (round(255 * c) for c in colour[:3])
    ink = readable_on((red, green, blue))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9.5, color=ink, parse_math=False)


def _rgba(colour: str) -> tuple[float, float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue, 1.0


def _goodness(metric: str, value: float | None, thresholds: Mapping[str, float]) -> float:
    """0.5 at the threshold, 1 at the best value, 0 as far on the other side; 0 for no number."""
    if metric not in _BOUNDS:
        return 0.5 if value is not None else 0.0
    if value is None:
        return 0.0
    setting, best = _BOUNDS[metric]
    room = abs(best - thresholds[setting]) or 1.0
    better = (value - thresholds[setting]) * (1 if best else -1)
    return 0.5 + 0.5 * max(-1.0, min(1.0, better / room))


def _notes(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines of text and their colours: why a teacher may not go, and how those that share a domain differ."""
    lines = [
        (f"{name}: {WORDS[teacher['decision']]}: {reason}", INKS[teacher["decision"]])
        for name, teacher in result["teachers"].items()
        for reason in teacher["reasons"]
    ]
    for entry in result["conflicts"]:
        one, other = entry["teachers"]
        text = f"{one} and {other} in {entry['domain']}: Jensen-Shannon {shown(entry['jsd'], '.3f')} nats"
        limit = result["thresholds"]["max_conflict"]
        verdict, colour = ("conflict", INKS["warm_up"]) if entry["conflicting"] else ("agree", INKS["go"])
        lines.append((f"{text}, {verdict} (limit {limit:g})", colour))
    return lines


def _text(axes: Axes, lines: Sequence[tuple[str, str]]) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(lines), 1), 0)
    for y, (text, colour) in enumerate(lines):
        axes.text(0, y + 0.5, text, va="center", fontsize=9, color=colour, parse_math=False)


def _limits(panels: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[float, float]:
    """Of the gap's axis, shared by all panels."""
    ends = [b["quantiles"] for bins in panels for b in bins if b["quantiles"]]
    low = min((q["0.05"] for q in ends), default=-1.0)
    high = max((q["0.95"] for q in ends), default=1.0)
    margin = 0.06 * max(high - low, 0.1)
    return min(low, -0.05) - margin, max(high, 0.05) + margin


def _gap(axes: Axes, bins: Sequence[Mapping[str, Any]], low: float, high: float) -> None:
    """Every bin of positions as wide as the others."""
    axes.axhline(0, color=FAINT, linewidth=0.8)
    kept = [b for b in bins if b["quantiles"]]
    series = {q: [b["quantiles"][q] for b in kept] for q in ("0.05", "0.25", "0.5", "0.75", "0.95")}
    edges = list(range(len(kept) + 1))
    if kept:
        for one, other, alpha in (("0.05", "0.95", 0.3), ("0.25", "0.75", 0.55)):
            axes.stairs(series[other], edges, baseline=series[one], fill=True, color=_BAND, alpha=alpha, linewidth=0)
        axes.stairs(series["0.5"], edges, baseline=None, color=_LINE, linewidth=1.8)
        names = [str(b["first"]) if b["first"] == b["last"] else f"{b['first']}-{b['last']}" for b in kept]
        axes.set_xticks([e + 0.5 for e in edges[:-1]], names)
        axes.set_xlim(0, len(kept))
    axes.set_ylim(low, high)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    patches = [Patch(color=_BAND, alpha=0.3), Patch(color=_BAND, alpha=0.7), Line2D([], [], color=_LINE, linewidth=1.8)]
    axes.legend(patches, ["5-95%", "25-75%", "median"], fontsize=7.5, frameon=False, loc="lower right", ncols=3)
