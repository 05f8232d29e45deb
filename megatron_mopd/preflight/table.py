"""A pre-flight's result on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

STYLES = {"go": "green", "warm_up": "yellow", "refuse": "bold red"}
WORDS = {"go": "go", "warm_up": "warm up", "refuse": "refuse"}
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("overlap", "overlap", ".3f"),
    ("teacher_shared", "shared T", ".3f"),
    ("student_shared", "shared S", ".3f"),
    ("implausible", "implausible", ".1%"),
    ("disagreement", "repeat", ".1g"),
    ("teacher_mass", "mass T", ".3f"),
    ("student_mass", "mass S", ".3f"),
    ("reverse_kl", "KL", ".3f"),
    ("gap", "mean gap", "+.3f"),
    ("teacher_entropy", "entropy T", ".3f"),
    ("student_entropy", "entropy S", ".3f"),
)
"""Metric, heading and format of what is shown of a teacher in a domain."""


def parts(result: Mapping[str, Any], title: str) -> Iterator[RenderableType]:
    """A table of teachers and domains, then what conflicts and why a teacher may not go."""
    settings = f"top {result['top_k']}, temperature {result['sampling']['temperature']:g}, nats"
    table = Table(
        title=f"{title}: student {result['student'][:12]}",
        caption=settings,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("teacher", "domain", "decision"):  # first, since a narrow terminal cuts off the last
        table.add_column(heading, no_wrap=True)
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for name, teacher in result["teachers"].items():
        for domain, metrics in teacher["domains"].items():
            cells = [shown(metrics[metric], form) for metric, _, form in COLUMNS]
            decision = Text(WORDS[teacher["decision"]], style=STYLES[teacher["decision"]])
            table.add_row(name, domain, decision, *cells)
    yield table
    for name, teacher in result["teachers"].items():
        for reason in teacher["reasons"]:
            yield Text(f"{name}: {WORDS[teacher['decision']]}: {reason}", style=STYLES[teacher["decision"]])
    for entry in result["conflicts"]:
        one, other = entry["teachers"]
        verdict = "conflict" if entry["conflicting"] else "agree"
        text = f"{one} and {other} {verdict} in {entry['domain']}: Jensen-Shannon {shown(entry['jsd'], '.3f')} nats"
        yield Text(text, style="yellow" if entry["conflicting"] else "green")


def shown(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "\N{EN DASH}" if value is None else format(value, form)
