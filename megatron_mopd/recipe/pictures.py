"""The pictures of a recipe's report, in the style of :mod:`megatron_mopd.plots`: one colour a domain everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from megatron_mopd.intervals import Accuracy
from megatron_mopd.palette import domain_colours
from megatron_mopd.plot_parts import FAINT, INK, across, grid, label_ends, level, smooth, tidy
from megatron_mopd.recipe import measurement_plots
from megatron_mopd.recipe.cells import Tree
from megatron_mopd.recipe.text import columns, memory
from megatron_mopd.report import Example, duration, percent
from megatron_mopd.rollout_plot import rollouts

MINUTE = 60.0


def figures(tree: Mapping[str, Any], examples: Sequence[Example]) -> Iterator[tuple[str, str, Figure]]:
    """``(caption, file name, figure)`` of each picture there is data for."""
    if any(row["cells"][key] for row in tree["distilled"].values() for key in tree["students"]):
        yield "Recovery", "recovery.png", recovery(tree)
    if tree["curves"]["accuracy"]:
        yield "Accuracy over the steps of all iterations", "curves.png", curves(tree)
    if tree["reverse_kl"]:
        yield "Reverse KL over the steps of all iterations", "reverse_kl.png", reverse_kl(tree)
    if any(change for row in tree["undistilled"].values() for change in row["changes"].values()):
        yield "Domains that were not distilled", "other_domains.png", other_domains(tree)
    yield from measurement_plots.figures(tree)
    if examples:
        yield "Rollouts by advantage", "rollouts.png", rollouts(examples)
    if any(row["state"] == "finished" for row in tree["stages"]):
        yield "Time of each stage", "time.png", time(tree)


def recovery(tree: Mapping[str, Any]) -> Figure:
    """One panel a distilled domain: every student and the teachers as dots with their 95% intervals."""
    colours = domain_colours(list(tree["distilled"]))
    refreshed = any(row["refreshed"] for row in tree["distilled"].values())
    names = columns(tree) | ({"first_teacher": "first teacher"} if refreshed else {}) | {"teacher": "teacher"}
    figure, panels = grid(len(tree["distilled"]), height=0.75 + 0.34 * len(names))
    for i, ((domain, row), axes) in enumerate(zip(tree["distilled"].items(), panels, strict=True)):
        for height, key in enumerate(reversed(names), start=1):
            cell = row["cells"][key]
            if cell is not None and (key != "first_teacher" or row["refreshed"]):
                hollow = "teacher" in key
                _dot(axes, height, cell, INK if hollow else colours[domain], hollow)
        axes.set_yticks(range(len(names), 0, -1), list(names.values()))
        axes.set_ylim(0.4, len(names) + 0.6)
        if (start := row["cells"]["before"]) is not None:
            axes.axvline(start["rate"], color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
        found = row["recovery"]
        text = f"{domain}  recovery {percent(found['value'])}" if found else domain
        bounds = "" if not found or found["low"] is None else f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
        axes.set_title(text + bounds, color=colours[domain], loc="left", fontsize=10)
        axes.set_xlim(-0.02, 1.16)  # room for a number beside a dot at 100%
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if i + across(len(panels)) >= len(panels):
            axes.set_xlabel("held-out accuracy, greedy", fontsize=9)
        tidy(axes)
        axes.spines["bottom"].set_bounds(0, 1)
    return figure


def _dot(axes: Axes, height: float, cell: Tree, colour: str, hollow: bool) -> None:
    """A rate with its interval and its number, which stands to the right of both."""
    axes.plot([cell["low"], cell["high"]], [height, height], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot([cell["rate"]], [height], "o", color="white" if hollow else colour, markeredgecolor=colour, markersize=6)
    axes.annotate(
        percent(cell["rate"]),
        (cell["high"], height),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def curves(tree: Mapping[str, Any]) -> Figure:
    """One panel a distilled domain: held-out accuracy over the steps of all iterations, teachers as levels."""
    colours, iterations = domain_colours(list(tree["distilled"])), tree["curves"]["iterations"]
    shown = [domain for domain in tree["distilled"] if domain in tree["curves"]["accuracy"]]
    figure, panels = grid(len(shown), height=3.0)
    for i, (domain, axes) in enumerate(zip(shown, panels, strict=True)):
        row, colour = tree["distilled"][domain], colours[domain]
        points = [(step, Accuracy(correct=c, total=t)) for step, c, t in tree["curves"]["accuracy"][domain]]
        steps, rates = [step for step, _ in points], [a.rate for _, a in points]
        low, high = zip(*(a.interval for _, a in points), strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, rates, color=colour, linewidth=1.8, marker="o", markersize=3, zorder=3)
        _iterations(axes, iterations)
        goal, start = row["cells"]["teacher"], row["cells"]["before"]
        if goal is not None:
            text = f"teacher {row['teacher']} {goal['rate']:.1%}"
            level(axes, goal["rate"], text, INK, (0, (4, 2)), side="left")
        if start is not None:
            near = goal is not None and abs(goal["rate"] - start["rate"]) < 0.1
            level(axes, start["rate"], "before", FAINT, (0, (1, 2)), side="right", above=not near)
        axes.set_title(f"{domain}  {rates[0]:.1%} → {rates[-1]:.1%}", color=colour, loc="left", fontsize=10)
        axes.set_ylim(0, 1.09)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step", fontsize=9)
        if i % across(len(panels)) == 0:
            axes.set_ylabel("held-out accuracy, greedy", fontsize=9)
        tidy(axes)
    return figure


def reverse_kl(tree: Mapping[str, Any]) -> Figure:
    """Reverse KL to the teachers over the steps of all iterations: the estimate on training rollouts as lines, exact
    on held-out rollouts before and after each iteration as dots."""
    colours, found = domain_colours(list(tree["distilled"])), tree["curves"]
    exact = [one for row in tree["reverse_kl"].values() for one in row.values()]
    floor = max(1e-6, 1e-3 * max([one[side] for one in exact for side in ("before", "after")], default=1.0))
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    ends: list[tuple[float, str, str]] = []
    for domain, row in tree["distilled"].items():
        colour, last = colours[domain], None
        for border in found["iterations"]:
            steps = [(s, v) for s, v in found["reverse_kl_k1"].get(domain, []) if border["from"] < s <= border["to"]]
            curve = [(step, value) for step, value in smooth(steps) if value >= floor]
            axes.plot([s for s, _ in curve], [v for _, v in curve], color=colour, linewidth=1.6, alpha=0.9)
            if one := tree["reverse_kl"].get(border["stage"], {}).get(domain):
                last = max(one["after"], floor)
                pair = [max(one["before"], floor), last]
                axes.plot([border["from"], border["to"]], pair, "o", color=colour, markersize=6, clip_on=False)
        if last is not None:
            ends.append((last, f"{domain} → {row['teacher']}  {last:.3g}", colour))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(0, found["iterations"][-1]["to"])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _iterations(axes, found["iterations"])
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("reverse KL to the teacher, nats per token", fontsize=9)
    text = "dots: exact, held-out student rollouts   lines: sampled estimate, training rollouts"
    axes.set_title(text, loc="left", fontsize=9, color=INK)
    tidy(axes)
    label_ends(axes, ends)
    return figure


def _iterations(axes: Axes, borders: Sequence[Tree]) -> None:
    """Where one iteration ends and the next begins, and their names."""
    for border in borders:
        if border["from"]:
            axes.axvline(border["from"], color=FAINT, linewidth=0.9)
        place = ((border["from"] + border["to"]) / 2, 0.02)
        across_data_up_axes = axes.get_xaxis_transform()
        axes.text(
            *place, border["stage"], transform=across_data_up_axes, ha="center", va="bottom", fontsize=8, color=FAINT
        )


def other_domains(tree: Mapping[str, Any]) -> Figure:
    """Each domain's change against before, with paired intervals, for every later student."""
    later = [key for key in tree["students"] if key not in ("sft", "before")]
    colours = domain_colours([*tree["distilled"], *tree["undistilled"]])
    lines = [
        (f"{domain}, {tree['students'][key]['title']}", row["changes"][key], colours[domain])
        for domain, row in tree["undistilled"].items()
        for key in later
        if row["changes"][key] is not None
    ]
    figure = Figure(figsize=(7.2, 1.1 + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, (_, change, colour) in enumerate(lines):
        height = len(lines) - place
        axes.plot([100 * change["low"], 100 * change["high"]], [height] * 2, color=colour, linewidth=2.2)
        axes.plot([100 * change["rate"]], [height], "o", color=colour, markersize=6)
    axes.set_yticks(range(len(lines), 0, -1), [text for text, _, _ in lines])
    axes.set_ylim(0.4, len(lines) + 0.6)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.axvline(100 * tree["bars"]["regression"], color=FAINT, linewidth=1.1, linestyle=(0, (4, 2)))
    last = tree["students"][tree["last"]]["title"]
    rule = f"from {last} on no whole interval may lie left of the dashed line"
    axes.set_xlabel(f"change against before, points; {rule}", fontsize=9)
    tidy(axes)
    return figure


def time(tree: Mapping[str, Any]) -> Figure:
    """One bar a stage: minutes of evaluation apart from the rest, and the peak of memory beside it."""
    rows = [row for row in tree["stages"] if row["state"] == "finished" and row["wall_s"]]
    figure = Figure(figsize=(7.2, 1.1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    (colour,) = domain_colours(["time"]).values()
    for place, row in enumerate(rows):
        height, whole, evaluated = len(rows) - place, row["wall_s"] / MINUTE, row["evaluation_s"] / MINUTE
        axes.barh(height, whole - evaluated, height=0.66, color=colour, linewidth=0)
        axes.barh(height, evaluated, left=whole - evaluated, height=0.66, color=colour, alpha=0.35, linewidth=0)
        text = ", ".join(filter(None, [duration(row["wall_s"]), memory(row)]))
        axes.annotate(
            text, (whole, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    axes.set_yticks(range(len(rows), 0, -1), [row["stage"] for row in rows])
    axes.set_ylim(0.4, len(rows) + 0.6)
    room = 1.6 if any(row["device_memory_bytes"] for row in rows) else 1.28  # for the words beside the longest bar
    axes.set_xlim(0, room * max(row["wall_s"] for row in rows) / MINUTE)
    axes.set_xlabel("minutes (pale: evaluation), and the largest process's peak of memory", fontsize=9)
    axes.set_title(f"{duration(tree['wall_s'])} in all", loc="left", fontsize=10, color=INK)
    tidy(axes)
    return figure
