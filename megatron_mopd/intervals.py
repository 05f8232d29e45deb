"""Accuracies, changes and recoveries with their 95% intervals; torch-free mathematics of the reports."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
T95 += (2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)
T95 += (2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484)
"""97.5% quantiles of Student's t with 1, 2, ... degrees of freedom."""
BEYOND = 0.025  # of a 95% interval, on either side
BOOTSTRAP_DRAWS = 10_000

Interval = tuple[float, float]


def wilson(correct: int, total: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), 95% by default.

    Raises ValueError unless ``0 <= correct <= total`` and ``total > 0``.
    """
    if not (0 <= correct <= total and total > 0):
        raise ValueError(f"correct = {correct} of total = {total}: needs 0 <= correct <= total and total > 0")
    rate, weight = correct / total, z * z / total
    centre = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / total + weight / (4 * total))
    # At the ends the exact bound is 0 or 1, which rounding misses.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Verified completions among all completions of one model on one domain."""

    correct: int
    total: int

    @property
    def rate(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> Interval:
        """Wilson's 95% interval of :attr:`rate`."""
        return wilson(self.correct, self.total)


def gain_interval(before: Accuracy, after: Accuracy) -> Interval:
    """95% interval of ``after.rate - before.rate`` from the two Wilson intervals (Newcombe 1998, method 10).

    The two are taken as independent samples; on the same prompts that errs on the wide side.
    """
    low_b, high_b = before.interval
    low_a, high_a = after.interval
    gain = after.rate - before.rate
    below = math.hypot(after.rate - low_a, high_b - before.rate)
    above = math.hypot(high_a - after.rate, before.rate - low_b)
    return gain - below, gain + above


def paired_interval(gained: int, lost: int, total: int, z: float = Z95) -> Interval:
    """95% interval of ``(gained - lost) / total``, the change of accuracy on ``total`` prompts both models answered.

    ``gained`` and ``lost`` count prompts that one alone got right. Half a prompt is added to each of the four cells
    (Agresti and Min 2005), so that no change seen is no certainty. Raises ValueError for counts that cannot be.
    """
    if not (gained >= 0 <= lost and 0 < total >= gained + lost):
        raise ValueError(f"gained = {gained}, lost = {lost} of total = {total}: needs counts that add up to the total")
    up, down, count = gained + 0.5, lost + 0.5, total + 2
    half = z * math.sqrt(up + down - (up - down) ** 2 / count) / count
    return (up - down) / count - half, (up - down) / count + half


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What changed hands between two models that answered the same prompts."""

    gained: int
    lost: int
    total: int

    @classmethod
    def of(cls, before: str, after: str) -> Change:
        """From two strings of one character a prompt, "1" for a right answer, in the same order."""
        if len(before) != len(after) or not before:
            raise ValueError(f"{len(before)} answers before and {len(after)} after: needs one of each for every prompt")
        pairs = list(zip(before, after, strict=True))
        return cls(gained=pairs.count(("0", "1")), lost=pairs.count(("1", "0")), total=len(pairs))

    @property
    def rate(self) -> float:
        """Accuracy after minus accuracy before."""
        return (self.gained - self.lost) / self.total

    @property
    def interval(self) -> Interval:
        """95%, see :func:`paired_interval`."""
        return paired_interval(self.gained, self.lost, self.total)


def recovery(before: float, after: float, teacher: float) -> float | None:
    """(after - before) / (teacher - before); None where the teacher is no better than before."""
    return (after - before) / (teacher - before) if teacher > before else None


def resampled(answers: Sequence[str], draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> np.ndarray:
    """Accuracies ``[draws, models]`` on prompts drawn with replacement, the same ones for every model.

    ``answers`` has one string a model, one character a prompt, "1" for right, all in the same order. Equal seeds give
    equal draws. Raises ValueError where the strings differ in length or are empty.
    """
    if not answers or len({len(marks) for marks in answers}) != 1 or not answers[0]:
        raise ValueError(f"answers to {[len(marks) for marks in answers]} prompts: every model needs the same, some")
    kinds = Counter(zip(*answers, strict=True))  # prompts that all models treat alike are exchangeable
    right = np.array([[mark == "1" for mark in kind] for kind in kinds], dtype=float)
    shares = np.array(list(kinds.values()), dtype=float) / len(answers[0])
    counts = np.random.default_rng(seed).multinomial(len(answers[0]), shares / shares.sum(), size=draws)
    return counts @ right / len(answers[0])


def recovery_interval(before: str, after: str, teacher: str, *, draws: int = BOOTSTRAP_DRAWS) -> Interval | None:
    """95% interval of :func:`recovery` on prompts all three answered: percentiles of a bootstrap over prompts.

    Resampling prompts keeps the three accuracies paired (Efron and Tibshirani 1993, chapter 13). None where the teacher
    is not better than before in more than one of 40 resamples: then the share of the way has no bounds.
    """
    start, end, goal = resampled((before, after, teacher), draws).T
    defined = goal > start
    if defined.mean() < 1 - BEYOND:
        return None
    return _percentiles((end - start)[defined] / (goal - start)[defined])


def recovery_gain(before: str, one: str, other: str, teacher: str, *, draws: int = BOOTSTRAP_DRAWS) -> Interval | None:
    """95% interval of how much more ``other`` recovers than ``one``, on the same prompts; see the function above."""
    start, first, second, goal = resampled((before, one, other, teacher), draws).T
    defined = goal > start
    if defined.mean() < 1 - BEYOND:
        return None
    return _percentiles((second - first)[defined] / (goal - start)[defined])


def mean_interval(values: Sequence[float]) -> Interval | None:
    """95% interval of a mean: Student's t below 30 values, the normal distribution's from there on; None for one."""
    if len(values) < 2:
        return None
    mean, spread = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    quantile = T95[len(values) - 2] if len(values) - 2 < len(T95) else Z95
    return mean - quantile * spread, mean + quantile * spread


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, (BEYOND, 1 - BEYOND))
    return float(low), float(high)
