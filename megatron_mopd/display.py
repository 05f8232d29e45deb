"""What rank 0 shows of a running stage: logging through rich, one progress bar, a summary at the end."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from functools import cache
from time import perf_counter
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from megatron_mopd.report import duration

PLAIN_PERIOD = 10.0  # seconds between lines where there is no terminal
PLAIN_WIDTH = 140  # columns of tables where there is no terminal

# Metric -> (label, format), in the order shown.
STEP_METRICS: Mapping[str, tuple[str, str]] = {
    "loss": ("loss", ".4f"),
    "reverse_kl_k1": ("KL", ".3f"),
    "grad_norm": ("grad norm", ".3g"),
    "rollout/truncated_frac": ("cut short", ".0%"),
}
DOMAIN_METRICS: Mapping[str, tuple[str, str]] = {
    "accuracy": ("accuracy", ".1%"),
    "reverse_kl_k1": ("KL", ".3f"),
    "nll": ("nll", ".3f"),
}


@cache
def console() -> Console:
    """The one console that logging, progress and tables share, so that they do not tear each other's lines."""
    made = Console(highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        return Console(highlight=False, width=PLAIN_WIDTH)
    return made


def setup_logging(rank: int, level: int = logging.INFO) -> None:
    """This package's messages from ``level`` on, from rank 0; warnings of all ranks and libraries, with the rank."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "mopd", False)]:
        root.removeHandler(handler)
    handler: logging.Handler
    if rank == 0 and console().is_terminal:
        handler = RichHandler(console=console(), show_path=False, log_time_format="[%X]", rich_tracebacks=True)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        name = "" if rank == 0 else f" rank {rank}"
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{name} %(name)s: %(message)s", "%H:%M:%S"))
    handler.mopd = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    for package in ("megatron_mopd", "mopd_kernels"):
        logging.getLogger(package).setLevel(level if rank == 0 else max(level, logging.WARNING))


def note(rank: int, text: str) -> None:
    """One line on rank 0's console."""
    if rank == 0:
        console().print(text, markup=False, soft_wrap=True)


class StageProgress:
    """Progress of one stage, as a context manager; a live bar on a terminal, plain lines every few seconds elsewhere.

    ``update(step, metrics)`` takes the row that goes to ``metrics.jsonl``; ``steps`` is the step the stage ends with. A
    summary table follows when the stage ends without an error. With ``enabled`` False nothing is shown.
    """

    def __init__(self, title: str, steps: int, enabled: bool = True) -> None:
        self.title, self.steps, self.enabled = title, steps, enabled
        self._start = self._marked = self._printed = perf_counter()
        self._before_first: int | None = None  # the step a resumed stage starts from
        self._step = 0
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._speed = math.nan  # tokens per second
        self._tokens = 0.0
        self._bar: _Bar | None = None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step ``step`` is done."""
        if not self.enabled:
            return
        now = perf_counter()
        if self._before_first is None:
            self._before_first = step - 1
        tokens = metrics.get("rollout/tokens", 0.0)
        self._tokens += tokens
        if tokens and now > self._marked:
            self._speed = tokens / (now - self._marked)
        self._marked, self._step = now, step
        self._last |= metrics
        self._first = dict(metrics) | self._first
        if self._bar is not None:
            self._bar.show(step, self._line(), self._domains())
        elif now - self._printed >= PLAIN_PERIOD or step == self.steps or step == self._before_first + 1:
            self._printed = now
            note(0, f"{self.title} {step}/{self.steps}  {self._line()}  {self._domains_line()}".rstrip())

    def note(self, text: str) -> None:
        """One line above the bar."""
        note(0 if self.enabled else 1, text)

    def eta(self) -> float:
        """Seconds to the last step at the pace so far; NaN before the first step."""
        done = self._step - (self._before_first or 0)
        if self._before_first is None or done <= 0:
            return math.nan
        return (self._marked - self._start) / done * (self.steps - self._step)

    def __enter__(self) -> Self:
        self._start = self._marked = self._printed = perf_counter()
        if self.enabled and console().is_terminal:
            self._bar = _Bar(self.title, self.steps)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self.enabled and kind is None and self._last:
            console().print(self.summary())

    def summary(self) -> Table:
        """First and last value of what was shown, with steps, time and tokens in the caption."""
        spent = perf_counter() - self._start
        steps = self._step - (self._before_first or 0)
        caption = f"{steps} steps in {duration(spent)}" + (f", {self._tokens:,.0f} tokens" if self._tokens else "")
        table = Table(title=self.title, caption=caption, title_justify="left", caption_justify="left")
        for heading, align in (("", "left"), ("first", "right"), ("last", "right")):
            table.add_column(heading, justify=align)  # type: ignore[arg-type]
        for name, label, form in self._shown():
            table.add_row(label, format(self._first[name], form), format(self._last[name], form))
        return table

    def _shown(self) -> list[tuple[str, str, str]]:
        """``(metric, label, format)`` of what there is to show."""
        rows = [(name, *style) for name, style in STEP_METRICS.items() if name in self._last]
        for family, (label, form) in DOMAIN_METRICS.items():
            rows += [(f"{family}/{d}", f"{label} {d}", form) for d in _domains_of(family, self._last)]
        return rows

    def _line(self) -> str:
        parts = [
            f"{label} {self._last[name]:{form}}" for name, (label, form) in STEP_METRICS.items() if name in self._last
        ]
        if not math.isnan(self._speed):
            parts.append(f"{self._speed:,.0f} tokens/s")
        if self._step < self.steps and not math.isnan(self.eta()):
            parts.append(f"{duration(self.eta())} left")
        return "  ".join(parts)

    def _domains(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name in sorted({d for family in DOMAIN_METRICS for d in _domains_of(family, self._last)}):
            table.add_row(f"  {name}", *self._cells(name))
        return table

    def _cells(self, domain: str) -> list[str]:
        found = [(style, self._last.get(f"{family}/{domain}")) for family, style in DOMAIN_METRICS.items()]
        return [f"{label} {value:{form}}" for (label, form), value in found if value is not None]

    def _domains_line(self) -> str:
        accuracies = _domains_of("accuracy", self._last)
        if not accuracies:
            return ""
        return "accuracy " + ", ".join(f"{d} {self._last[f'accuracy/{d}']:.1%}" for d in accuracies)


class TransferProgress:
    """Progress of one long copy in bytes, as a context manager: a bar on a terminal, else a line every few seconds.

    Nothing is shown before the first ``update(done, total)``, nor with ``enabled`` False.
    """

    def __init__(self, title: str, enabled: bool = True) -> None:
        self.title, self.enabled = title, enabled
        self._bar: Progress | None = None
        self._start = self._printed = perf_counter()

    def update(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are behind us."""
        if not self.enabled:
            return
        if console().is_terminal:
            if self._bar is None:
                columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
                self._bar = Progress(TextColumn(self.title), BarColumn(), *columns, console=console(), transient=True)
                self._bar.start()
                self._bar.add_task(self.title, total=total)
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif perf_counter() - self._printed >= PLAIN_PERIOD:
            self._printed = perf_counter()
            speed = done / (self._printed - self._start)
            left = duration((total - done) / speed) if speed else "?"
            note(0, f"{self.title}  {done / 1e9:,.1f}/{total / 1e9:,.1f} GB  {speed / 1e9:.2f} GB/s  {left} left")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Bar(Progress):
    """A rich progress bar with a table of domains under it."""

    def __init__(self, title: str, steps: int) -> None:
        self._under: RenderableType | None = None
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[line]}"),
            console=console(),
            transient=True,
        )
        self._task = self.add_task(title, total=steps, line="")

    def show(self, step: int, line: str, under: RenderableType) -> None:
        self._under = under
        self.update(self._task, completed=step, line=line, refresh=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self._under is not None:
            yield self._under


def _domains_of(family: str, metrics: Mapping[str, float]) -> list[str]:
    names = [name.removeprefix(f"{family}/") for name in metrics if name.startswith(f"{family}/")]
    return sorted(name for name in names if "/" not in name)
