"""The pictures of a report, drawn without a display and without matplotlib's global state.

Each domain keeps one colour everywhere; lines are labelled where they end instead of in a legend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from megatron_mopd.intervals import Accuracy
from megatron_mopd.palette import domain_colours
from megatron_mopd.plot_parts import FAINT, INK, across, grid, label_ends, level, smooth, tidy
from megatron_mopd.report import Report
from megatron_mopd.rollout_plot import rollouts

DPI = 160


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
    figure, panels = grid(len(report.domains), height=3.1)
    for i, (domain, axes) in enumerate(zip(report.domains, panels, strict=True)):
        colour, teacher = colours[domain], report.teacher_of[domain]
        points = _with_ends(report, domain)
        steps, levels = [s for s, _ in points], [a.rate for _, a in points]
        low, high = zip(*(a.interval for _, a in points), strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, levels, color=colour, linewidth=2, marker="o", markersize=3.5, clip_on=False, zorder=3)
        goal, start = report.teachers[teacher][domain].rate, report.before[domain].rate
        level(axes, goal, f"teacher {teacher} {goal:.1%}", INK, (0, (4, 2)), side="left")
        near = abs(goal - start) < 0.1  # its label goes below its line, away from the teacher's
        level(axes, start, "student before", FAINT, (0, (1, 2)), side="right", above=not near)
        axes.set_title(f"{domain}  {levels[0]:.1%} → {levels[-1]:.1%}", color=colour, loc="left", fontsize=11)
        axes.set_ylim(0, 1.09)  # room for a teacher's label above 100%
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _steps_axis(axes, report)
        if i % across(len(panels)) == 0:
            axes.set_ylabel("held-out accuracy, greedy")
        tidy(axes)
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
        curve = [(s, v) for s, v in smooth(report.kl_history.get(domain, ())) if v >= floor]
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
    tidy(axes)
    label_ends(axes, ends)
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
        tidy(axes)
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


def _bins(values: np.ndarray, count: int = 80) -> np.ndarray:
    """Edges over all but the outermost values, zero in the middle of a bin."""
    low, high = (float(v) for v in np.quantile(values, [0.001, 0.999]))
    width = max(max(high, 0.0) - min(low, 0.0), 1e-3) / count
    first, last = math.floor(min(low, 0.0) / width), math.ceil(max(high, 0.0) / width)
    return width * (np.arange(first, last + 2) - 0.5)


def _steps_axis(axes: Axes, report: Report) -> None:
    if report.steps is None and not any(report.accuracy_history.values()) and not any(report.kl_history.values()):
        axes.set_xticks([0, 1], ["before", "after"])
        return
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
