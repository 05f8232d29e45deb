"""What is measured beside accuracy: support overlap, acceptance lengths and the ablations, as the report shows them.

Ablations are files of ``DIR/ablations``, written by ``make recipe-ablations``:

    warm_up.json       {"domains": {domain: {"teacher": name, "answers": {"before": "0110...", "without": ..., "with":
                       ..., "teacher": ...}}}}: answers of the student before, after MOPD alone, after warm-up and MOPD,
                       and of the teacher, to the same prompts; beside them "weights"
    staleness.json     {"settings": {...}, "runs": [{"lag": 0, "form": "corrected", "seed": 1, "recovery": 0.93,
                       "cosine": 0.98}, ...]}: forms are those of megatron_mopd.gradient_probe, cosine is that of the
                       gradient to the on-policy one, recovery is null where the form was not trained; each run has
                       "weights" too
    mtp_boosting.json  {"runs": [{"seed": 1, "before": ACCEPTANCE, "after": ACCEPTANCE}, ...]} with what before.json and
                       result.json of a boosting stage hold under ``acceptance``; each run has "weights" too

``weights`` say which run of the recipe they are of; see :mod:`megatron_mopd.recipe.ablations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_mopd import intervals
from megatron_mopd.recipe import cells
from megatron_mopd.recipe.cells import Tree
from megatron_mopd.recipe.outcomes import Outcomes
from megatron_mopd.recipe.schema import starts_from

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
    """``{domain: {"before": {student, teacher, decision, means}, ..., "after": the same}}``.

    Sides are None where they are not there. Between them stand, by name, the preflight stages that have no role, of
    teachers that were refreshed on the way, say.
    """
    roles = outcomes.roles
    named = (roles.preflight, roles.preflight_after)
    others = [s.name for s in outcomes.recipe.stages if s.type == "preflight" and s.name not in named]
    sides = {"before": roles.preflight} | {name: name for name in others} | {"after": roles.preflight_after}
    found = {side: _preflight(outcomes, stage) for side, stage in sides.items()}
    domains = dict.fromkeys(domain for rows in found.values() for domain in rows)
    return {domain: {side: rows.get(domain) for side, rows in found.items()} for domain in domains}


def _preflight(outcomes: Outcomes, stage: str | None) -> Tree:
    outcome = outcomes.of(stage)
    if outcome is None or stage is None:
        return {}
    student = starts_from(outcomes.recipe, outcomes.recipe.stage(stage, "report").initial or "")
    rows = {}
    for domain, teacher in outcomes.served(stage).items():
        entry = outcome.result["teachers"][teacher]
        if domain in entry["domains"]:
            means = {name: entry["domains"][domain][name] for name in OVERLAP}
            rows[domain] = {"student": student, "teacher": teacher, "decision": entry["decision"], **means}
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


def staleness(outcomes: Outcomes) -> Tree | None:
    """What was run, and one entry for each lag and form: recovery and cosine over seeds."""
    found = outcomes.ablations.get("staleness")
    if found is None:
        return None
    runs: Sequence[Mapping[str, Any]] = found["runs"]
    kinds = sorted({(run["lag"], run["form"]) for run in runs})
    return {"settings": found["settings"], "rows": [_over_seeds(runs, lag, form) for lag, form in kinds]}


def _over_seeds(runs: Sequence[Mapping[str, Any]], lag: int, form: str) -> Tree:
    own = [run for run in runs if (run["lag"], run["form"]) == (lag, form)]
    recovered = [run["recovery"] for run in own if run["recovery"] is not None]
    return {
        "lag": lag,
        "form": form,
        "seeds": [run["seed"] for run in own],
        "recovery": over(recovered) if recovered else None,
        "cosine": over([run["cosine"] for run in own]),
    }


def over(values: list[float]) -> Tree:
    """A mean over runs, with the runs."""
    return cells.mean(values) | {"values": values}
