"""Rows of the kernel benchmarks as a table, a plot and lines of Markdown.

``python tools/bench/report.py kernels/results/cpu_log_ratio.json kernels/README.md`` puts the lines into the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

Row = dict[str, Any]


def show(rows: Sequence[Row]) -> None:
    """Prints a table with a line for each peer of each row."""
    first = rows[0]
    machine = first["gpu"] or f"{first['cpu']}, {first['threads']} threads"
    table = Table(
        title=f"{machine}, torch {first['versions']['torch']}; ratio: the peer over ours, median of the rounds"
    )
    for column in ("case", "shape", "who", "ms", "ratio", "workspace MiB", "error"):
        table.add_column(column, justify="left" if column in ("case", "shape", "who") else "right", no_wrap=True)
    for row in rows:
        table.add_section()
        limit = "" if row["limit_ms"] is None else f" ({row['fraction_of_limit']:.0%} of the limit)"
        table.add_row(row["case"], shape_of(row), "ours" + limit, *_numbers(row, "ours_ms", "1"))
        for name, peer in row["peers"].items():
            table.add_row("", "", name, *_numbers(peer, "ms", _ratio(peer)))
    rich.print(table)


def shape_of(row: Row) -> str:
    return " ".join(f"{name}={size}" for name, size in row["shape"].items())


def _numbers(numbers: Row, time: str, ratio: str) -> tuple[str, str, str, str]:
    if "failed" in numbers:
        return "", f"failed: {numbers['failed'][:60]}", "", ""
    if "unavailable" in numbers:
        quoted = f"{numbers['published_ms']} published" if "published_ms" in numbers else ""
        return quoted, "not installed", "", ""
    if "differing_bytes" in numbers:
        return "", f"{numbers['differing_bytes']} of {numbers['bytes']} bytes differ", "", ""
    milliseconds, workspace, error = (numbers.get(key) for key in (time, "workspace_bytes", "max_abs_err"))
    return (
        "" if milliseconds is None else f"{milliseconds:.3f}",
        ratio,
        "" if workspace is None else f"{workspace / 2**20:.1f}",
        "" if error is None else f"{error:.1e}",
    )


def _ratio(peer: Row) -> str:
    return f"{peer['ratio']:.2f}" if "ratio" in peer else ""


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """A line of a table for each peer that was measured: time, its quartiles over the rounds, workspace over ours."""
    for row in rows:
        for name, peer in row["peers"].items():
            if "ratio_quartiles" in peer:
                low, high = peer["ratio_quartiles"]
                memory = "" if peer["workspace_ratio"] is None else f"{peer['workspace_ratio']:.2f}"
                errors = ("" if e is None else f"{e:.0e}" for e in (row["max_abs_err"], peer["max_abs_err"]))
                cells = (row["case"], name, f"{peer['ratio']:.2f}", f"{low:.2f} to {high:.2f}", memory, *errors)
                yield f"| {' | '.join(cells)} |"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of the peers' times and workspaces over ours, on a logarithmic axis; ours is the line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row['case']}  {name}", row["case"], peer["ratio"], peer["workspace_ratio"])
        for row in rows
        for name, peer in row["peers"].items()
        if peer.get("workspace_ratio") is not None
    ]
    cases = list(dict.fromkeys(case for _, case, _, _ in bars))
    figure, panels = pyplot.subplots(1, 2, sharey=True, figsize=(11, 1.2 + 0.26 * len(bars)), layout="constrained")
    for panel, title, index in zip(panels, ("time", "workspace"), (2, 3), strict=True):
        values = [max(bar[index], 0.01) for bar in bars]
        colors = [f"C{cases.index(bar[1])}" for bar in bars]
        drawn = panel.barh(range(len(bars)), [value - 1 for value in values], left=1, color=colors)
        panel.bar_label(drawn, [f"{bar[index]:.2f}" for bar in bars], padding=3, fontsize=8)
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
        panel.margins(x=0.2, y=0.01)
        panel.set_title(f"{title} of the peer over ours")
    panels[0].set_yticks(range(len(bars)), [bar[0] for bar in bars])
    panels[0].invert_yaxis()
    machine = rows[0]["gpu"] or rows[0]["cpu"]
    figure.suptitle(f"{machine}, commit {rows[0]['commit'][:12]}: right of 1 ours needs less")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


HEADER = """\
| case | peer | time over ours | quartiles | workspace over ours | our error | its error |
|---|---|---:|---:|---:|---:|---:|
"""


def main(words: Sequence[str]) -> None:
    """Prints the lines for a file of rows; with a page as second argument, puts them under its header instead."""
    rows = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    lines = "".join(f"{line}\n" for line in markdown(rows))
    if len(words) == 1:
        sys.stdout.write(lines)
        return
    before, found, after = Path(words[1]).read_text(encoding="utf-8").partition(HEADER)
    if not found:
        raise SystemExit(f"{words[1]} has no table with the header\n{HEADER}")
    rest = after.splitlines(keepends=True)
    old = next((n for n, line in enumerate(rest) if not line.startswith("|")), len(rest))
    Path(words[1]).write_text(before + found + lines + "".join(rest[old:]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
