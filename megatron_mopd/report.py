"""Whether a student recovered its teachers: the records, the numbers, the content of ``report.json`` and ``report.md``.

Recovery of a domain is (after - before) / (teacher - before) in accuracy, undefined where the teacher is no better than
the student was before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mopd.intervals import Accuracy, gain_interval, recovery


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Exact reverse KL of the student to one teacher, in nats per token, on held-out student rollouts of one domain."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One student rollout with the advantage of every token.

    Example: ``Example(domain="reverse", prompt="reverse abc", tokens=("c", "b", "a"), advantages=(0.1, -2.0, 0.3))``
    """

    domain: str
    prompt: str
    tokens: tuple[str, ...]
    advantages: tuple[float, ...]
    note: str = ""  # such as "step 1" or the verifier's verdict

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.advantages):
            raise ValueError(f"{len(self.tokens)} tokens with {len(self.advantages)} advantages: needs one for each")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything a report shows; the order of ``teacher_of`` is the order of the domains everywhere."""

    title: str
    teacher_of: Mapping[str, str]  # domain -> the teacher that scored it
    before: Mapping[str, Accuracy]  # student, by domain
    after: Mapping[str, Accuracy]
    teachers: Mapping[str, Mapping[str, Accuracy]]  # teacher -> domain -> accuracy, all pairs
    reverse_kl: Mapping[str, Mapping[str, Divergence]]  # teacher -> domain, at least the pairs of teacher_of
    parallel: Mapping[str, Any]
    versions: Mapping[str, str]
    wall_s: float
    steps: int | None = None  # between before and after; the histories' last where left out
    base: Mapping[str, Accuracy] | None = None  # the common ancestor, where it is not the student before
    accuracy_history: Mapping[str, Sequence[tuple[int, Accuracy]]] = field(default_factory=dict)  # (step, accuracy)
    kl_history: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # estimate on training rollouts
    advantages: Mapping[str, Sequence[float]] = field(default_factory=dict)  # domain -> samples in nats
    examples: Sequence[Example] = ()
    teacher_nvfp4: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of teacher_precision.measure

    def __post_init__(self) -> None:
        for domain, teacher in self.teacher_of.items():
            tables = [("before", self.before), ("after", self.after)]
            tables += [(f"teachers[{teacher!r}]", self.teachers.get(teacher, {}))]
            tables += [(f"reverse_kl[{teacher!r}]", self.reverse_kl.get(teacher, {}))]
            tables += [("base", self.base)] if self.base is not None else []
            for name, table in tables:
                if domain not in table:
                    raise ValueError(f"report: {name} lacks domain {domain!r}, which teacher_of names")

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.teacher_of)

    def recovery(self, domain: str) -> float | None:
        """Share of the way from the student before to its teacher; None where there is no way to go."""
        teacher = self.teachers[self.teacher_of[domain]][domain]
        return recovery(self.before[domain].rate, self.after[domain].rate, teacher.rate)

    def rows(self) -> dict[str, Mapping[str, Accuracy]]:
        """Every measured model with its accuracies, students first."""
        base = {"base": self.base} if self.base is not None else {}
        return base | {"student before": self.before, "student after": self.after} | dict(self.teachers)


def to_json(report: Report) -> dict[str, Any]:
    """The tree of ``report.json``: accuracies as fractions, reverse KL in nats per token, times in seconds."""
    return {
        "domains": {domain: _domain(report, domain) for domain in report.domains},
        "parallel": dict(report.parallel),
        "versions": dict(report.versions),
        "wall_s": report.wall_s,
        "title": report.title,
        "teacher_of": dict(report.teacher_of),
        "matrix": {name: {d: a.rate for d, a in row.items()} for name, row in report.rows().items()},
        "counts": {name: {d: [a.correct, a.total] for d, a in row.items()} for name, row in report.rows().items()},
        "intervals": {name: {d: list(a.interval) for d, a in row.items()} for name, row in report.rows().items()}
        | {"gain": {d: list(gain_interval(report.before[d], report.after[d])) for d in report.domains}},
        "reverse_kl": {
            teacher: {d: {"before": kl.before, "after": kl.after} for d, kl in row.items()}
            for teacher, row in report.reverse_kl.items()
        },
    } | ({"teacher_nvfp4": dict(report.teacher_nvfp4)} if report.teacher_nvfp4 else {})


def _domain(report: Report, domain: str) -> dict[str, Any]:
    teacher = report.teacher_of[domain]
    kl = report.reverse_kl[teacher][domain]
    return {
        "student_before": report.before[domain].rate,
        "student_after": report.after[domain].rate,
        "teacher": report.teachers[teacher][domain].rate,
        "recovery": report.recovery(domain),
        "samples": report.after[domain].total,
        "reverse_kl_before": kl.before,
        "reverse_kl_after": kl.after,
    }


def merged(teachers: int) -> str:
    """What was made of so many teachers, for a title."""
    return f"{'one teacher' if teachers == 1 else f'{teachers} teachers'} into one student"


def percent(value: float | None) -> str:
    """``94.2%``, or ``n/a``."""
    return "n/a" if value is None else f"{100 * value:.1f}%"


def with_interval(accuracy: Accuracy) -> str:
    """``94.2% [91.8, 95.9]``, the bounds in percent."""
    low, high = accuracy.interval
    return f"{percent(accuracy.rate)} [{100 * low:.1f}, {100 * high:.1f}]"


def to_markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """The text of ``report.md``; ``pictures`` maps a caption to a file name beside it."""
    recovered = [
        [
            domain,
            with_interval(report.before[domain]),
            with_interval(report.after[domain]),
            f"{with_interval(report.teachers[teacher][domain])} ({teacher})",
            f"**{percent(report.recovery(domain))}**",
            "{0.before:.4f} → {0.after:.4f}".format(report.reverse_kl[teacher][domain]),
            str(report.after[domain].total),
        ]
        for domain, teacher in report.teacher_of.items()
    ]
    headings = ["domain", "student before", "student after", "teacher", "recovery", "reverse KL (nats/token)", "tasks"]
    matrix = [
        [name, *(with_interval(row[d]) if d in row else "" for d in report.domains)]
        for name, row in report.rows().items()
    ]
    parts = [
        f"# {report.title}",
        "Greedy accuracy on held-out tasks with Wilson 95% intervals. Recovery is the share of the way from the student"
        " before to its teacher, in accuracy.",
        table(headings, recovered),
        "## Every model on every domain",
        table(["", *report.domains], matrix),
        *_teachers_in_nvfp4(report),
        *[f"## {caption}\n\n![{caption}]({name})" for caption, name in pictures.items()],
        "## The run",
        table(["", ""], [["wall time", duration(report.wall_s)], *([k, str(v)] for k, v in _settings(report))]),
    ]
    return "\n\n".join(parts) + "\n"


def _teachers_in_nvfp4(report: Report) -> list[str]:
    """What keeping teachers in NVFP4 cost and saved; nothing where none is."""
    if not report.teacher_nvfp4:
        return []
    headings = ["teacher", "in NVFP4", "log-probability error", "largest", "KL (nats/token)", "KL, kept hidden states"]
    headings += ["bits per number", "host memory", "device memory"]
    rows = [
        [
            teacher,
            ", ".join(row["parts"]),
            *(_digits(row[key]) for key in ("logprob_error_mean", "logprob_error_max", "kl", "hidden_kl")),
            "n/a" if row["bits_per_number"] is None else f"{row['bits_per_number']:.3f}",
            *("{before:,} → {after:,}".format(**row[key]) for key in ("host_bytes", "device_bytes")),
        ]
        for teacher, row in report.teacher_nvfp4.items()
    ]
    text = (
        "Errors are those of each teacher as it scores against the weights of its checkpoint, in nats over tokens of"
        " held-out rollouts; memory is that of its weights in bytes, over all ranks."
    )
    return ["## Teachers in NVFP4", text, table(headings, rows)]


def _digits(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2g}"


def duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 05 s`` or ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _settings(report: Report) -> list[tuple[str, Any]]:
    return [*report.parallel.items(), *report.versions.items()]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(headings) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in [headings, align, *rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
