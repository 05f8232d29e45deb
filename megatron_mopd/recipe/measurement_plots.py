"""Pictures of what is measured beside accuracy: overlap, warm-up, acceptance lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from megatron_mopd.palette import domain_colours
from megatron_mopd.plot_parts import FAINT, INK, grid, tidy
from megatron_mopd.recipe.cells import Tree
from megatron_mopd.recipe.text import refreshed, valued
from megatron_mopd.report import percent

SHOWN = {"overlap": "top-k overlap", "student_mass": "student mass shared", "implausible": "implausible prefixes"}


def figures(tree: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """``(caption, file name, figure)`` of each picture there is data for."""
    if tree["overlap"]:
        yield "Support overlap before and after", "overlap.png", overlap(tree)
    if tree["warm_up"]:
        yield "Warm-up, with and without", "warm_up.png", warm_up(tree)
    if _lines(tree):
        yield "Acceptance length before and after boosting", "acceptance.png", acceptance(tree)


def overlap(tree: Mapping[str, Any]) -> Figure:
    """One panel a measure, one line a domain: from before (hollow) to after (full)."""
    domains = list(tree["overlap"])
    colours = domain_colours(list(tree["distilled"]))
    figure = Figure(figsize=(3.4 * len(SHOWN), 1.15 + 0.36 * len(domains)), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN.items(), strict=True):
        for place, domain in enumerate(domains):
            height, sides = len(domains) - place, tree["overlap"][domain]
            ends = {side: sides[side] for side in ("before", "after")}
            values = {side: found[name] for side, found in ends.items() if found and found[name] is not None}
            colour = colours.get(domain, INK)
            if len(values) == 2:
                axes.annotate(
                    "",
                    (values["after"], height),
                    (values["before"], height),
                    arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.6, "shrinkA": 4, "shrinkB": 0},
                )
            for side, value in values.items():
                face = "white" if side == "before" else colour
                axes.plot(value, height, "o", color=face, markeredgecolor=colour, markersize=7, clip_on=False)
        labels = ["\n".join([domain, *refreshed(tree["overlap"][domain])]) for domain in domains]
        axes.set_yticks(range(len(domains), 0, -1), labels)
        axes.set_ylim(0.4, len(domains) + 0.6)
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        tidy(axes)
    figure.supxlabel("hollow: before, full: after the last iteration", fontsize=8.5, color=INK)
    return figure


def warm_up(tree: Mapping[str, Any]) -> Figure:
    """One panel a domain: accuracy before, without and with warm-up, of the teacher, and what each recovers."""
    colours = domain_colours(list(tree["distilled"]))
    titles = {"before": "before", "without": "without warm-up", "with": "with warm-up", "teacher": "teacher"}
    figure, panels = grid(len(tree["warm_up"]), height=2.3)
    figure.set_figwidth(max(5.2, figure.get_figwidth()))
    for (domain, row), axes in zip(tree["warm_up"].items(), panels, strict=True):
        colour = colours.get(domain, INK)
        for place, arm in enumerate(titles):
            cell, height = row["cells"][arm], len(titles) - place
            axes.barh(height, cell["rate"], height=0.62, color=colour, alpha=1.0 if arm == "with" else 0.45)
            axes.plot([cell["low"], cell["high"]], [height] * 2, color=INK, linewidth=1.2)
            text = percent(cell["rate"])
            if arm in row["recovery"]:
                text += f", recovers {percent(row['recovery'][arm]['value'])}"
            _beside(axes, cell["high"], height, text)
        axes.set_yticks(range(len(titles), 0, -1), list(titles.values()))
        axes.set_xlim(0, 1.75)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_title(f"{domain}, taught by {row['teacher']}", loc="left", fontsize=10, color=colour)
        axes.set_xlabel("held-out accuracy, greedy", fontsize=9)
        tidy(axes)
        axes.spines["bottom"].set_bounds(0, 1)
    return figure


def acceptance(tree: Mapping[str, Any]) -> Figure:
    """One pair of dots a draft and way of decoding, with 95% intervals over prompts."""
    lines = _lines(tree)
    (blue,) = domain_colours(["after"]).values()
    figure = Figure(figsize=(7.2, 1.2 + 0.42 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, (_, row) in enumerate(lines):
        height = len(lines) - place
        for side, shift, colour in (("before", 0.13, FAINT), ("after", -0.13, blue)):
            found = row[side]
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [height + shift] * 2, color=colour, linewidth=2.2)
            axes.plot(found["value"], height + shift, "o", color=colour, markersize=6)
        text = valued(row["gain"], "+.2f")
        right = max(row[side][name] or 1.0 for side in ("before", "after") for name in ("value", "high"))
        _beside(axes, right, height, text)
    axes.set_yticks(range(len(lines), 0, -1), [text for text, _ in lines])
    axes.set_ylim(0.4, len(lines) + 0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(1.0, low), high + 0.3 * (high - min(1.0, low)))
    axes.set_xlabel("accepted tokens per verification; grey: before, blue: after boosting, and the gain", fontsize=9)
    tidy(axes)
    return figure


def _lines(tree: Mapping[str, Any]) -> list[tuple[str, Tree]]:
    """Name and numbers of each draft and way of decoding that the boosting stage could measure."""
    return [
        (f"{draft}, {mode}".replace("_", " "), row)
        for draft, modes in (tree["acceptance"] or {}).items()
        for mode, row in modes.items()
        if "before" in row and row["gain"]["value"] is not None
    ]


def _beside(axes: Axes, value: float, height: float, text: str, colour: str = INK) -> None:
    axes.annotate(
        text, (value, height), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8, color=colour
    )
