"""A recipe's report on the terminal, in 100 columns: the table, the promises, and what else was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_mopd import display
from megatron_mopd.palette import domain_colours
from megatron_mopd.recipe import text
from megatron_mopd.recipe.cells import Tree
from megatron_mopd.report import duration, percent

STYLES = {"held": "bold green", "missed": "bold red", "not measured": "yellow"}


def show(tree: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the report; to the shared console when none is given."""
    console = console or display.console()
    for part in (recovery, promises, other_domains, warm_up, overlap, acceptance, quantized, staleness, stages):
        if (made := part(tree)) is not None:
            console.print(made)
    for line in tree["missing"]:
        console.print(Text(f"not in this report: {line}", style="yellow"))
    console.print(verdict(tree))


def verdict(tree: Mapping[str, Any]) -> Text:
    """How many promises were held, in a line."""
    statuses = [promise["status"] for promise in tree["promises"]]
    parts = [f"{statuses.count('held')} of {len(statuses)} promises held"]
    for status in ("missed", "not measured"):
        if names := [p["name"] for p in tree["promises"] if p["status"] == status]:
            parts.append(f"{status}: {', '.join(names)}")
    worst = "missed" if "missed" in statuses else "not measured" if "not measured" in statuses else "held"
    return Text("; ".join(parts), style=STYLES[worst])


def recovery(tree: Mapping[str, Any]) -> Table:
    """The paper's table, two lines a row; the change from before, which report.md has too, finds no room here."""
    titles = text.columns(tree)
    caption = f"greedy, {text.tasks(tree)} held-out tasks a domain · 95% intervals · {duration(tree['wall_s'])} in all"
    made = _table(tree["title"], ["domain", *titles.values(), "teacher", "recovery"], caption)
    colours = domain_colours(list(tree["distilled"]))
    for domain, row in tree["distilled"].items():
        made.add_row(
            Text(f"{domain}\n{row['teacher']}" + ("*" if row["refreshed"] else ""), style=colours[domain]),
            *(_accuracy(row["cells"][key]) for key in (*titles, "teacher")),
            _two(text.share(row["recovery"]), "bold"),
        )
    below = [caption]
    if any(row["refreshed"] for row in tree["distilled"].values()):
        below.append("* refreshed from an earlier student")
    made.caption = "\n".join([*below, *text.notes(tree, "distilled")])
    return made


def promises(tree: Mapping[str, Any]) -> Table:
    """One row a promise, its cases below it."""
    made = _table("Promises", ["", "", ""], header=False)
    for column in made.columns[1:]:
        column.justify = "left"
    for promise in tree["promises"]:
        lines = Text(promise["rule"])
        for case in promise["cases"]:
            lines.append(f"\n{case['what']}: {case['text']}", style="dim" if case["held"] else "bold red")
        if promise["absent"]:
            lines.append(f"\n{promise['absent']}", style="yellow")
        made.add_row(Text(promise["name"]), Text(promise["status"], style=STYLES[promise["status"]]), lines)
    return made


def other_domains(tree: Mapping[str, Any]) -> Table | None:
    """Changes of what was not distilled, in points."""
    if not tree["undistilled"]:
        return None
    later = [key for key in tree["students"] if key not in ("sft", "before")]
    titles = [f"{tree['students'][key]['title']}" for key in later]
    made = _table("Domains that were not distilled: change against before, points", ["domain", "before", *titles])
    for domain, row in tree["undistilled"].items():
        changes = [_two(text.points(row["changes"][key])) for key in later]
        made.add_row(Text(domain), _accuracy(row["cells"]["before"]), *changes)
    made.caption = "\n".join(text.notes(tree, "undistilled")) or None
    return made


def warm_up(tree: Mapping[str, Any]) -> Table | None:
    """Accuracy and recovery with and without, as in the report's Table 4."""
    if not tree["warm_up"]:
        return None
    made = _table("Warm-up", ["domain", "before", "without", "with", "teacher", "rec. without", "rec. with", "gain"])
    for domain, row in tree["warm_up"].items():
        made.add_row(
            Text(f"{domain}\n{row['teacher']}"),
            *(_accuracy(row["cells"][arm]) for arm in ("before", "without", "with", "teacher")),
            *(_two(text.share(row["recovery"][arm])) for arm in ("without", "with")),
            _two(text.valued(row["gain"], "+.1f", 100), "bold"),
        )
    return made


def overlap(tree: Mapping[str, Any]) -> Table | None:
    """Pre-flight before and after, a domain a row, with its teachers where they differ."""
    if not tree["overlap"]:
        return None
    headings = ["domain", "decision", "top-k overlap", "student mass", "implausible", "reverse KL"]
    made = _table("Support overlap, before → after", headings)
    for domain, sides in tree["overlap"].items():
        cells = [_arrow(sides, name, percent) for name in ("overlap", "student_mass", "implausible")]
        decision = _arrow(sides, "decision", lambda value: value.replace("_", " "))
        made.add_row(
            Text("\n".join([domain, *text.refreshed(sides)])),
            decision,
            *cells,
            _arrow(sides, "reverse_kl", lambda value: f"{value:.3f}"),
        )
    return made


def acceptance(tree: Mapping[str, Any]) -> Table | None:
    """Lengths before and after boosting."""
    if not tree["acceptance"]:
        return None
    made = _table("Accepted tokens per verification", ["draft", "before", "after", "gain", "gain over seeds"])
    for draft, modes in tree["acceptance"].items():
        for mode, row in modes.items():
            cells = [_two(text.valued(row[name], form)) if name in row else Text("") for name, form in _LENGTHS]
            made.add_row(Text(f"{draft}, {mode}".replace("_", " ")), *cells)
    return made


_LENGTHS = (("before", ".2f"), ("after", ".2f"), ("gain", "+.2f"), ("seeds", "+.2f"))


def quantized(tree: Mapping[str, Any]) -> Table | None:
    """What few bits cost, a domain a row."""
    found = tree["quantized"]
    if not found:
        return None
    size = f"{found['source_bytes']:,} bytes become {found['stored_bytes']:,}"
    title = f"NVFP4 ({found['recipe']}): {size}, {found['bits_per_element']:.3f} bits per parameter"
    made = _table(title, ["domain", found["source"], "NVFP4", "change, points"])
    for domain, change in found["changes"].items():
        cells = [Text(text.accuracy(found["cells"][domain][side])) for side in ("source", "quantized")]
        made.add_row(Text(domain), *cells, Text(text.points(change)))
    return made


def staleness(tree: Mapping[str, Any]) -> Table | None:
    """Means over seeds."""
    if not tree["staleness"]:
        return None
    made = _table(
        f"Staleness: {text.short_runs(tree['staleness']['settings'])}",
        ["lag", "form", "recovery, %", "cosine", "seeds"],
    )
    for row in tree["staleness"]["rows"]:
        made.add_row(*(Text(cell) for cell in text.stale(row)))
    return made


def stages(tree: Mapping[str, Any]) -> Table:
    """Time and memory."""
    made = _table("Stages", ["stage", "steps", "time", "evaluation", "memory"])
    for row in tree["stages"]:
        if row["state"] != "finished":
            made.add_row(Text(row["stage"], style="dim"), "", Text(row["state"], style="dim"), "", "")
            continue
        times = ["" if row[name] is None else duration(row[name]) for name in ("wall_s", "evaluation_s")]
        steps = "" if row["steps"] is None else str(row["steps"])
        made.add_row(Text(row["stage"]), steps, *times, text.memory(row))
    return made


def _table(title: str, headings: Sequence[str], caption: str | None = None, header: bool = True) -> Table:
    made = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=header,
    )
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="right" if place else "left", overflow="fold")
    return made


def _accuracy(cell: Tree | None) -> Text:
    """``94.2%`` over ``91.8–95.9``."""
    if cell is None:
        return Text("")
    return Text(percent(cell["rate"])).append(f"\n{100 * cell['low']:.1f}–{100 * cell['high']:.1f}", style="dim")


def _two(value: str, style: str = "") -> Text:
    """A value over its interval."""
    first, _, second = value.partition(" ")
    return Text(first, style=style).append(f"\n{second}", style="dim") if second else Text(first, style=style)


def _arrow(sides: Mapping[str, Any], name: str, form: Any) -> Text:
    """``before → after``, with a dash for what is not there."""
    values = [found and found[name] for found in (sides["before"], sides["after"])]
    return Text(" → ".join("–" if value is None else form(value) for value in values))
