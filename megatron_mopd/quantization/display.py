"""The summary of a quantized checkpoint as a table for the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.table import Table

from megatron_mopd.palette import domain_colours
from megatron_mopd.quantization.recipes import QUANTIZED
from megatron_mopd.quantization.report import Group, Summary

DPI = 160
_INK, _FAINT = "#222222", "#8a8a8a"


def table(summary: Summary, title: str) -> Table:
    """One row a group and one for all; errors are there once the checkpoint was written. 80 columns wide."""
    measured = any(group.error is not None for group in summary.groups)
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("kind", "format"):
        made.add_column(column, no_wrap=True)
    for column in ("tensors", "parameters", "bits", "MB", *(("error",) if measured else ())):
        made.add_column(column, justify="right", no_wrap=True)
    for group in summary.groups:
        made.add_row(
            group.what,
            group.format,
            f"{group.tensors:,}",
            f"{group.parameters:,}",
            f"{group.bits:.2f}",
            _megabytes(group.stored_bytes),
            *((_percent(group),) if measured else ()),
            style="bold" if group.format in QUANTIZED else "",
        )
    made.add_section()
    tensors = sum(group.tensors for group in summary.groups)
    size = _megabytes(summary.stored_bytes)
    made.add_row("all", "", f"{tensors:,}", f"{summary.parameters:,}", f"{summary.bits:.2f}", size)
    return made


def reasons(summary: Summary) -> list[str]:
    """A line a format of each group: what it is stored in, and why."""
    return [f"{group.what}, {group.format}: {group.reason}" for group in summary.groups]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; the bytes depend on the figure alone."""
    figure.savefig(path, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})


def figure(summary: Summary, title: str) -> Figure:
    """Left: where the parameters and the stored bytes are. Right: the error of each quantized kind over the layers."""
    made = Figure(figsize=(11, 4.2), layout="constrained")
    shares, errors = made.subplots(1, 2, width_ratios=(1, 1.25))
    groups = sorted(summary.groups, key=lambda group: group.parameters)
    colours = domain_colours([group.what for group in reversed(groups) if group.format in QUANTIZED])
    _shares(shares, summary, groups, colours)
    _errors(errors, [group for group in reversed(groups) if group.format in QUANTIZED], colours)
    made.suptitle(f"{title}: {summary.bits:.2f} bits per element", x=0.01, ha="left", fontsize=12)
    return made


def _shares(axes: Axes, summary: Summary, groups: list[Group], colours: dict[str, str]) -> None:
    places = range(len(groups))
    before = [group.parameters / summary.parameters for group in groups]
    after = [group.stored_bytes / summary.stored_bytes for group in groups]
    axes.barh([y + 0.2 for y in places], before, height=0.36, color="#d0d0d0")
    axes.barh([y - 0.2 for y in places], after, height=0.36, color=[colours.get(g.what, _FAINT) for g in groups])
    for y, group in zip(places, groups, strict=True):
        end = max(before[y], after[y])
        axes.text(end + 0.01, y, f"{group.bits:.1f} bits", va="center", fontsize=8, color=_INK)
    axes.set_yticks(list(places), [f"{group.what}  ({group.format})" for group in groups], fontsize=8)
    axes.set_xlim(0, 1.2 * max(*before, *after))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("share of parameters (grey) and of stored bytes", loc="left", fontsize=10)
    _tidy(axes)


def _errors(axes: Axes, groups: list[Group], colours: dict[str, str]) -> None:
    for group in groups:
        if group.error is None or not group.layers:
            continue
        name = f"{group.what} ({group.format}) {group.error:.2%}"
        axes.plot(
            list(group.layers), list(group.layers.values()), "o-", color=colours[group.what], markersize=4, label=name
        )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_title("relative error of the weights", loc="left", fontsize=10)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8)


def _percent(group: Group) -> str:
    assert group.error is not None
    return "0" if group.error == 0 else f"{group.error:.3%}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f}" if size < 1e9 else f"{size / 1e6:,.0f}"
