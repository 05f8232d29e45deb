"""A report on the terminal: recovery table, matrix of models and domains, rollouts coloured by advantage."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from megatron_mopd import display, palette
from megatron_mopd.intervals import Accuracy, Interval, gain_interval
from megatron_mopd.report import Example, Report, duration, percent


def show(report: Report, console: Console | None = None) -> None:
    """Print the whole report; to the shared console when none is given."""
    console = console or display.console()
    for table in (recovery_table, matrix_table):
        unbounded = console.options.update(max_width=10_000)
        fits = console.measure(table(report, wide=True), options=unbounded).maximum <= console.width
        console.print(table(report, wide=fits))
    if report.examples:
        scale = palette.advantage_scale([a for example in report.examples for a in example.advantages])
        console.print(legend(scale))
        for example in report.examples:
            console.print(rollout_text(example, scale))


def recovery_table(report: Report, wide: bool = True) -> Table:
    """One row per domain: before, after and teacher with 95% intervals, recovery, reverse KL to the domain's teacher.

    About 130 columns with the gain; without it, in two lines a row and less than 80 columns, where not ``wide``.
    """
    tasks = sorted({a.total for a in report.after.values()})
    size = f"{tasks[0]:,}" if len(tasks) == 1 else f"{tasks[0]:,} to {tasks[-1]:,}"
    table = Table(
        title="Recovery = (after - before) / (teacher - before)",
        title_justify="left",
        caption=f"{report.title} · {size} held-out tasks a domain, greedy · Wilson 95% · {duration(report.wall_s)}",
        caption_justify="left",
        box=box.HEAVY_HEAD if wide else box.SIMPLE_HEAD,
        padding=(0, 1) if wide else (0, 1, 0, 0),
    )
    join = " " if wide else "\n"
    table.add_column("domain", no_wrap=True)
    for heading in (
        "student before",
        "student after",
        *(["gain"] if wide else []),
        "teacher",
        "recovery",
        "reverse KL",
    ):
        table.add_column(heading.replace(" ", join, 1), justify="right", no_wrap=True)
    colours = palette.domain_colours(report.domains)
    for domain, teacher in report.teacher_of.items():
        before, after, kl = report.before[domain], report.after[domain], report.reverse_kl[teacher][domain]
        gain = f"{100 * (after.rate - before.rate):+.1f} {_bounds(gain_interval(before, after), '+.1f')}"
        table.add_row(
            Text(domain, style=f"bold {colours[domain]}"),
            _cell(before, join),
            _cell(after, join),
            *([gain] if wide else []),
            _cell(report.teachers[teacher][domain], join),
            Text(percent(report.recovery(domain)), style="bold"),
            f"{kl.before:.3f}{join}→ {kl.after:.3f}",
        )
    return table


def matrix_table(report: Report, wide: bool = True) -> Table:
    """Every measured model on every domain; a teacher's own domains in bold."""
    table = Table(
        title="Every model on every domain",
        title_justify="left",
        box=box.HEAVY_HEAD if wide else box.SIMPLE_HEAD,
        padding=(0, 1) if wide else (0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for domain in report.domains:
        table.add_column(domain, justify="right", no_wrap=wide)
    for name, row in report.rows().items():
        cells = []
        for domain in report.domains:
            own = name in report.teachers and report.teacher_of[domain] == name
            text = _cell(row[domain], " " if wide else "\n") if domain in row else ""
            cells.append(f"[bold]{text}[/bold]" if own else text)
        table.add_row(Text(name), *cells)
    return table


def rollout_text(example: Example, scale: float) -> Text:
    """The rollout with each token on the colour of its advantage; tokens within 5% of zero stay uncoloured."""
    text = Text(f"{example.domain} ", style="bold")
    if example.note:
        text.append(f"({example.note}) ", style="dim")
    text.append(" ".join(example.prompt.split()) + " → ", style="dim")
    for token, advantage in zip(example.tokens, example.advantages, strict=True):
        text.append(palette.visible(token), style=_token_style(advantage, scale))
    return text


def legend(scale: float, steps: int = 9) -> Text:
    """What the colours of :func:`rollout_text` mean."""
    text = Text("advantage, nats  ")
    values: Sequence[float] = [scale * (2 * i / (steps - 1) - 1) for i in range(steps)]
    for i, value in enumerate(values):
        label = f"{value:+.1f}" if i in (0, steps - 1) else " 0 " if i == steps // 2 else "   "
        text.append(label, style=_token_style(value, scale))
    return text.append("  less or more likely under the teacher", style="dim")


def _token_style(advantage: float, scale: float) -> Style | str:
    if abs(advantage) < 0.05 * scale:
        return ""
    ground = palette.advantage_colour(advantage, scale)
    return Style(color=palette.readable_on(ground), bgcolor=palette.hexadecimal(ground))


def _cell(accuracy: Accuracy, join: str) -> str:
    return percent(accuracy.rate) + join + _bounds(accuracy.interval, ".1f")


def _bounds(interval: Interval, form: str) -> str:
    """The bounds in percent, dimmed; the bracket is escaped because rich reads it as markup."""
    return f"[dim]\\[{100 * interval[0]:{form}}, {100 * interval[1]:{form}}][/dim]"
