"""The pictures of a report, drawn without a display and without matplotlib's global state.

Each domain keeps one colour everywhere; lines are labelled where they end instead of in a legend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from megatron_mopd.palette import domain_colours
from megatron_mopd.report import Accuracy, Report
from megatron_mopd.rollout_plot import rollouts

DPI = 160
INK, FAINT = "#222222", "#8a8a8a"
COLUMNS = 3  # panels beside each other


def figures(report: Report) -> Iterator[tuple[str, str, Figure]]:
    """``(caption, file name, figure)`` of each picture there is data for."""
    yield "Accuracy over steps", "accuracy.png", accuracy(report)
    yield "Reverse KL to the teachers", "reverse_kl.png", reverse_kl(report)
    if any(len(values) for values in report.advantages.values()):
        yield "Advantages", "advantages.png", advantages(report)
    if report.examples:
        yield "Rollouts by advantage", "rollouts.png", rollouts(report.examples)


def save(figure: Figure, path: Path | str) -> None:
    """Write a PNG; the bytes depend on the figure alone."""
    figure.savefig(path, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})


def accuracy(report: Report) -> Figure:
    """One panel a domain: the student over steps with its 95% band, its teacher and the student before as levels."""
    colours = domain_colours(report.domains)
    figure, panels = _grid(len(report.domains), height=3.1)
    for i, (domain, axes) in enumerate(zip(report.domains, panels, strict=True)):
        colour, teacher = colours[domain], report.teacher_of[domain]
        points = _with_ends(report, domain)
        steps, levels = [s for s, _ in points], [a.rate for _, a in points]
        low, high = zip(*(a.interval for _, a in points), strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, levels, color=colour, linewidth=2, marker="o", markersize=3.5, clip_on=False, zorder=3)
        goal, start = report.teachers[teacher][domain].rate, report.before[domain].rate
        _level(axes, goal, f"teacher {teacher} {goal:.1%}", INK, (0, (4, 2)), side="left")
        near = abs(goal - start) < 0.1  # its label goes below its line, away from the teacher's
        _level(axes, start, "student before", FAINT, (0, (1, 2)), side="right", above=not near)
        axes.set_title(f"{domain}  {levels[0]:.1%} → {levels[-1]:.1%}", color=colour, loc="left", fontsize=11)
        axes.set_ylim(0, 1.09)  # room for a teacher's label above 100%
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _steps_axis(axes, report)
        if i % COLUMNS == 0:
            axes.set_ylabel("held-out accuracy, greedy")
        _tidy(axes)
    return figure


def reverse_kl(report: Report) -> Figure:
    """Reverse KL to each domain's teacher: estimate over steps, exact on held-out rollouts before and after as dots."""
    colours = domain_colours(report.domains)
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    last, floor, measured = _last_step(report), _floor(report), any(report.kl_history.values())
    ends: list[tuple[float, str, str]] = []
    for domain, teacher in report.teacher_of.items():
        exact = report.reverse_kl[teacher][domain]
        curve = [(s, v) for s, v in _smooth(report.kl_history.get(domain, ())) if v >= floor]
        axes.plot([s for s, _ in curve], [v for _, v in curve], color=colours[domain], linewidth=1.6, alpha=0.9)
        pair = [max(exact.before, floor), max(exact.after, floor)]
        axes.plot([0, last], pair, "o", color=colours[domain], markersize=7, clip_on=False, zorder=4)
        if not measured:
            axes.plot([0, last], pair, color=colours[domain], alpha=0.5)
        ends.append((pair[1], f"{domain} → {teacher}  {exact.after:.3g}", colours[domain]))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(0, last)
    _steps_axis(axes, report)
    axes.set_ylabel("reverse KL to the teacher, nats per token")
    lines = "   lines: sampled estimate, training rollouts" if measured else ""
    axes.set_title(f"dots: exact, held-out student rollouts{lines}", loc="left", fontsize=9, color=INK)
    _tidy(axes)
    _label_ends(axes, ends)
    return figure


def advantages(report: Report) -> Figure:
    """One row a domain: how many tokens have which advantage, on a log scale, since most sit at zero."""
    colours = domain_colours(report.domains)
    shown = [d for d in report.domains if len(report.advantages.get(d, ()))]
    figure = Figure(figsize=(7.2, 0.9 + 1.25 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    pooled = np.concatenate([np.asarray(report.advantages[d], dtype=float) for d in shown])
    edges = _bins(pooled)
    for domain, axes in zip(shown, rows, strict=True):
        values = np.asarray(report.advantages[domain], dtype=float)
        weights = np.full(len(values), 1 / len(values))
        inside = np.clip(values, edges[0], edges[-1])
        axes.hist(inside, bins=list(edges), weights=weights, color=colours[domain], linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yscale("log")
        text = f"{domain}\nmean {values.mean():+.3f}\n{(values < -1).mean():.1%} below -1".replace(
            "-", "\N{MINUS SIGN}"
        )
        axes.text(0.015, 0.93, text, transform=axes.transAxes, va="top", color=colours[domain], fontsize=9)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        _tidy(axes)
    rows[len(shown) // 2].set_ylabel("share of tokens")
    rows[-1].set_xlabel("advantage, nats (outermost bins hold what lies beyond)")
    return figure


def _with_ends(report: Report, domain: str) -> list[tuple[int, Accuracy]]:
    """The history between the two full measurements, which stand at step 0 and at the last step."""
    last = _last_step(report)
    between = [(s, a) for s, a in report.accuracy_history.get(domain, ()) if 0 < s < last]
    return [(0, report.before[domain]), *between, (last, report.after[domain])]


def _last_step(report: Report) -> int:
    if report.steps is not None:
        return report.steps
    histories = [*report.accuracy_history.values(), *report.kl_history.values()]
    return max([step for history in histories for step, _ in history], default=1)


def _floor(report: Report) -> float:
    """Smallest value a log axis shows: a thousandth of the largest exact one; the k1 estimate can be negative."""
    largest = max(max(kl.before, kl.after) for row in report.reverse_kl.values() for kl in row.values())
    return max(1e-6, largest * 1e-3)


def _smooth(curve: Sequence[tuple[int, float]], points: int = 60) -> list[tuple[float, float]]:
    """Means of neighbouring steps, at most ``points`` of them, so that noise does not hide the trend."""
    width = max(1, math.ceil(len(curve) / points))
    parts = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [(float(np.mean([s for s, _ in part])), float(np.mean([v for _, v in part]))) for part in parts]


def _bins(values: np.ndarray, count: int = 80) -> np.ndarray:
    """Edges over all but the outermost values, zero in the middle of a bin."""
    low, high = (float(v) for v in np.quantile(values, [0.001, 0.999]))
    width = max(max(high, 0.0) - min(low, 0.0), 1e-3) / count
    first, last = math.floor(min(low, 0.0) / width), math.ceil(max(high, 0.0) / width)
    return width * (np.arange(first, last + 2) - 0.5)


def _level(
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


def _steps_axis(axes: Axes, report: Report) -> None:
    if report.steps is None and not any(report.accuracy_history.values()) and not any(report.kl_history.values()):
        axes.set_xticks([0, 1], ["before", "after"])
        return
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, COLUMNS)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(3.4 * columns, height * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel in panels:
        panel.tick_params(labelbottom=True)  # sharing hides the numbers of all but the last line, which may have gaps
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8.5, length=3, color=FAINT)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels right of the last points, moved apart where they would overlap."""
    low, high = (math.log(v) for v in axes.get_ylim())
    spots = sorted((((math.log(value) - low) / (high - low), text, colour) for value, text, colour in ends))
    heights = _apart([spot for spot, _, _ in spots], gap=0.075)
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


def _apart(spots: Sequence[float], gap: float) -> list[float]:
    """Ascending ``spots`` moved to at least ``gap`` from each other, below 1 as long as there is room."""
    heights: list[float] = []
    for spot in spots:
        heights.append(max(spot, heights[-1] + gap) if heights else spot)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights
