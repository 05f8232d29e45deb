"""What is measured beside accuracy: support overlap, acceptance lengths and the ablations, as the report shows them.

Ablations are files of ``DIR/ablations``, written by ``make recipe-ablations``:

    warm_up.json       {"domains": {domain: {"teacher": name, "answers": {"before": "0110...", "without": ..., "with":
                       ..., "teacher": ...}}}}: answers of the student before, after MOPD alone, after warm-up and MOPD,
                       and of the teacher, to the same prompts
    staleness.json     {"runs": [{"lag": 0, "corrected": true, "seed": 1, "recovery": 0.93, "cosine": 0.98}, ...]}:
                       corrected is whether Eq. 3 weighs the tokens, cosine that of the gradient to the on-policy one
    mtp_boosting.json  {"runs": [{"seed": 1, "before": ACCEPTANCE, "after": ACCEPTANCE}, ...]} with what before.json and
                       result.json of a boosting stage hold under ``acceptance``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_mopd import intervals
from megatron_mopd.recipe import cells
from megatron_mopd.recipe.cells import Tree
from megatron_mopd.recipe.outcomes import Outcomes

ARMS = ("before", "without", "with", "teacher")
OVERLAP = ("overlap", "teacher_mass", "student_mass", "implausible", "reverse_kl")
"""Means of a pre-flight that the report repeats; see :mod:`megatron_mopd.preflight.numbers`."""


def warm_up(outcomes: Outcomes) -> Tree | None:
    """Recovery with and without warm-up (report section 3.3.3, Table 4), by domain."""
    found = outcomes.ablations.get("warm_up")
    return None if found is None else {domain: _arms(entry) for domain, entry in found["domains"].items()}


def _arms(entry: Mapping[str, Any]) -> Tree:
    marks: dict[str, str] = {arm: entry["answers"][arm] for arm in ARMS}
    recovered = {arm: cells.recovery(marks["before"], marks[arm], marks["teacher"]) for arm in ("without", "with")}
    gain, bounds = None, None
    if recovered["with"]["value"] is not None:
        gain = recovered["with"]["value"] - recovered["without"]["value"]
        bounds = intervals.recovery_gain(*(marks[arm] for arm in ARMS))
    return {
        "teacher": entry["teacher"],
        "cells": {arm: cells.accuracy(marks[arm]) for arm in ARMS},
        "recovery": recovered,
        "gain": cells.valued(gain, bounds),
    }


def overlap(outcomes: Outcomes) -> Tree:
    """``{domain: {"before": {teacher, decision, means}, "after": the same}}``, each side None where it is not there."""
    sides = {"before": outcomes.roles.preflight, "after": outcomes.roles.preflight_after}
    found = {side: _preflight(outcomes, stage) for side, stage in sides.items()}
    domains = dict.fromkeys(domain for rows in found.values() for domain in rows)
    return {domain: {side: rows.get(domain) for side, rows in found.items()} for domain in domains}


def _preflight(outcomes: Outcomes, stage: str | None) -> Tree:
    outcome = outcomes.of(stage)
    if outcome is None or stage is None:
        return {}
    rows = {}
    for domain, teacher in outcomes.served(stage).items():
        entry = outcome.result["teachers"][teacher]
        if domain in entry["domains"]:
            means = {name: entry["domains"][domain][name] for name in OVERLAP}
            rows[domain] = {"teacher": teacher, "decision": entry["decision"], **means}
    return rows


def acceptance(outcomes: Outcomes) -> Tree | None:
    """``{draft: {mode: {before, after, gain, prompts}}}`` of the boosting stage, and ``seeds`` where it ran with some.

    ``before`` and ``after`` are accepted tokens per verification, ``gain`` the mean over prompts of their change, each
    with its interval over prompts; ``seeds`` is the change of the mean length over runs, with its interval over them.
    What no completion was long enough for has the value None.
    """
    outcome, runs = outcomes.of(outcomes.roles.boosted), outcomes.ablations.get("mtp_boosting", {}).get("runs", [])
    before = outcome.before.get("acceptance", {}) if outcome else {}
    tree: Tree = {}
    for draft, mode in _modes(before):
        assert outcome is not None
        tree.setdefault(draft, {})[mode] = _lengths(before[draft][mode], outcome.result["acceptance"][draft][mode])
    for draft, mode in _modes(runs[0]["before"] if runs else {}):
        pairs = [(run["before"][draft][mode]["length"], run["after"][draft][mode]["length"]) for run in runs]
        tree.setdefault(draft, {}).setdefault(mode, {})["seeds"] = over(_changes(pairs))
    return tree or None


def _modes(lengths: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(draft, mode) for draft, modes in lengths.items() for mode in modes]


def _lengths(before: Mapping[str, Any], later: Mapping[str, Any]) -> Tree:
    changes = _changes(zip(before["by_prompt"], later["by_prompt"], strict=True))
    sides = {"before": before["by_prompt"], "after": later["by_prompt"]}
    known = {side: [length for length in lengths if length is not None] for side, lengths in sides.items()}
    means = {side: cells.mean(lengths) for side, lengths in known.items()}
    return means | {"gain": cells.mean(changes), "prompts": len(changes)}


def _changes(pairs: Iterable[tuple[float | None, float | None]]) -> list[float]:
    """Of the pairs that were measured on both sides."""
    return [later - before for before, later in pairs if before is not None and later is not None]


def staleness(outcomes: Outcomes) -> list[Tree] | None:
    """One entry for each lag, with and without the correction of Eq. 3: recovery and cosine over seeds."""
    found = outcomes.ablations.get("staleness")
    if found is None:
        return None
    runs: Sequence[Mapping[str, Any]] = found["runs"]
    kinds = sorted({(run["lag"], not run["corrected"]) for run in runs})
    return [_over_seeds(runs, lag, not uncorrected) for lag, uncorrected in kinds]


def _over_seeds(runs: Sequence[Mapping[str, Any]], lag: int, corrected: bool) -> Tree:
    own = [run for run in runs if run["lag"] == lag and run["corrected"] is corrected]
    return {
        "lag": lag,
        "corrected": corrected,
        "seeds": [run["seed"] for run in own],
        **{name: over([run[name] for run in own]) for name in ("recovery", "cosine")},
    }


def over(values: list[float]) -> Tree:
    """A mean over runs, with the runs."""
    return cells.mean(values) | {"values": values}
