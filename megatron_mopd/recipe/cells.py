"""Single numbers as they stand in the report's tree: a value with its 95% interval, or None where it is undefined."""

from __future__ import annotations

from typing import Any

from megatron_mopd import intervals
from megatron_mopd.intervals import Accuracy, Change, Interval
from megatron_mopd.recipe.outcomes import Outcome

Tree = dict[str, Any]


def accuracy(marks: str) -> Tree:
    """Of answers, one character a prompt, with Wilson's interval."""
    found = Accuracy(correct=marks.count("1"), total=len(marks))
    low, high = found.interval
    return {"rate": found.rate, "low": low, "high": high, "correct": found.correct, "total": found.total}


def recovery(before: str, later: str, teacher: str) -> Tree:
    """Of answers to the same prompts; see :func:`intervals.recovery_interval`."""
    start, end, goal = (marks.count("1") / len(marks) for marks in (before, later, teacher))
    value = intervals.recovery(start, end, goal)
    return valued(value, None if value is None else intervals.recovery_interval(before, later, teacher))


def valued(value: float | None, bounds: Interval | None) -> Tree:
    """A value and its interval."""
    low, high = (None, None) if bounds is None else bounds
    return {"value": value, "low": low, "high": high}


def mean(values: list[float]) -> Tree:
    """Of independent measurements, such as seeds or prompts; see :func:`intervals.mean_interval`. None of none."""
    return valued(sum(values) / len(values) if values else None, intervals.mean_interval(values))


def of_accuracy(outcome: Outcome | None, domain: str) -> Tree | None:
    """Of a stage; None where it is not finished or was not measured on the domain."""
    return None if outcome is None or domain not in outcome.answers else accuracy(outcome.answers[domain])


def of_change(before: Outcome | None, later: Outcome | None, domain: str) -> Tree | None:
    """Between two stages that answered the same prompts; None where one of them did not."""
    if before is None or later is None or domain not in before.answers or domain not in later.answers:
        return None
    change = Change.of(before.answers[domain], later.answers[domain])
    low, high = change.interval
    return {"rate": change.rate, "low": low, "high": high, "gained": change.gained, "lost": change.lost}


def of_recovery(before: Outcome | None, later: Outcome | None, teacher: Outcome | None, domain: str) -> Tree | None:
    """Of three stages; None where one of them is not there."""
    if before is None or later is None or teacher is None:
        return None
    marks = [outcome.answers.get(domain, "") for outcome in (before, later, teacher)]
    return recovery(*marks) if all(marks) else None
