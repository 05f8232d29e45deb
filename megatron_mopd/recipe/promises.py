"""What a recipe's report promises, checked against its numbers and shown whatever comes out.

The bars are this project's own. Beside them stands what the Nemotron 3 Ultra report found, which sets none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_mopd.recipe.cells import Tree

RECOVERY = 0.85
"""Least recovery of a distilled domain. In the report's Table 5 it is 86% for GDPVal and 17% to 173% elsewhere."""
REGRESSION = -0.02
"""Change of accuracy below which no whole paired interval may lie, for a domain that was not distilled and for the
student in few bits."""
WARM_UP = 0.10
"""Least recovery that warm-up adds where support overlap is poor. In Table 4: 55 points for GDPVal, 57 for BrowseComp,
6 for HLE."""
ACCEPTANCE = 0.0
"""Gain of accepted tokens per verification that the interval must exceed."""
SEEDS = 3
"""Runs of boosting that its gain is to be judged over."""

Status = Literal["held", "missed", "not measured"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One measurement that a promise is about."""

    what: str
    text: str  # the numbers, as they are shown
    held: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """A rule and the cases it was checked on."""

    name: str
    rule: str
    cases: tuple[Case, ...]
    absent: str = ""  # why it could not be checked in full

    @property
    def status(self) -> Status:
        """Missed by one case alone; held only where all there is to check was checked."""
        if any(not case.held for case in self.cases):
            return "missed"
        return "not measured" if self.absent or not self.cases else "held"

    def to_json(self) -> Tree:
        return asdict(self) | {"status": self.status}


def check(tree: Mapping[str, Any]) -> list[Promise]:
    """The promises of a report in the order in which they are shown."""
    found = [_recovery(tree), _regressions(tree), _warm_up(tree), _quantized(tree), _acceptance(tree)]
    return found + ([_staleness(tree["staleness"]["rows"])] if tree["staleness"] else [])


def _recovery(tree: Mapping[str, Any]) -> Promise:
    last = tree["students"][tree["last"]]["title"]
    cases, open_domains = [], []
    for domain, row in tree["distilled"].items():
        found = row["recoveries"].get(tree["last"])
        if found is None:
            open_domains.append(domain)
        elif found["value"] is None:
            cases.append(Case(what=domain, text="its teacher is no better than the student before", held=False))
        else:
            cases.append(Case(what=domain, text=_share(found), held=found["value"] >= RECOVERY))
    return Promise(
        name="recovery",
        rule=f"recovery of at least {RECOVERY:.0%} in each distilled domain after {last}",
        cases=tuple(cases),
        absent=_listed(open_domains),
    )


def _regressions(tree: Mapping[str, Any]) -> Promise:
    cases, absent = [], []
    for domain, row in tree["undistilled"].items():
        for key, change in row["changes"].items():
            if key != tree["last"] and key.startswith(("mopd_", "warm_up_")):
                continue  # what is not the last iteration is no result
            what = f"{domain}, {tree['students'][key]['title']}"
            if change is None:
                absent.append(what)
            else:
                cases.append(Case(what=what, text=_points(change), held=change["high"] >= REGRESSION))
    return Promise(
        name="other domains",
        rule=f"no domain that was not distilled with its whole interval of change below {100 * REGRESSION:g} points",
        cases=tuple(cases),
        absent=_listed(absent) if tree["undistilled"] else "no such domain is measured",
    )


def _warm_up(tree: Mapping[str, Any]) -> Promise:
    cases = []
    for domain, row in (tree["warm_up"] or {}).items():
        gain = row["gain"]
        if gain["value"] is None:
            cases.append(Case(what=domain, text="its teacher is no better than the student before", held=False))
        else:
            text = f"{100 * gain['value']:+.1f} points {_bounds(gain, 100, '+.1f')}"
            cases.append(Case(what=domain, text=text, held=gain["value"] >= WARM_UP))
    return Promise(
        name="warm-up",
        rule=f"warm-up adds at least {100 * WARM_UP:g} points of recovery where support overlap is poor",
        cases=tuple(cases),
        absent="" if tree["warm_up"] else "needs ablations/warm_up.json",
    )


def _quantized(tree: Mapping[str, Any]) -> Promise:
    found = tree["quantized"]
    changes = {} if found is None else found["changes"]
    return Promise(
        name="quantization",
        rule=f"the student in few bits with no domain's whole interval of change below {100 * REGRESSION:g} points",
        cases=tuple(
            Case(what=domain, text=_points(change), held=change["high"] >= REGRESSION)
            for domain, change in changes.items()
            if change is not None
        ),
        absent=_listed([d for d, change in changes.items() if change is None]) if found else "no stage has stored it",
    )


def _acceptance(tree: Mapping[str, Any]) -> Promise:
    cases, few, short = [], [], []
    for draft, modes in (tree["acceptance"] or {}).items():
        for mode, row in modes.items():
            kind, gain = ("over seeds", row["seeds"]) if "seeds" in row else ("over prompts", row["gain"])
            what = f"{draft} {mode}".replace("_", " ")
            if len(row.get("seeds", {}).get("values", ())) < SEEDS:
                few.append(what)
            if gain["low"] is None:
                short.append(what)
            else:
                text = f"{gain['value']:+.3f} tokens {_bounds(gain, 1, '+.3f')} {kind}"
                cases.append(Case(what=what, text=text, held=gain["low"] > ACCEPTANCE))
    absent = (
        _listed(short, "too few completions are long enough"),
        _listed(few, f"fewer than {SEEDS} seeds (make recipe-ablations)"),
    )
    return Promise(
        name="acceptance",
        rule="boosting lengthens what speculative decoding accepts: interval of the gain above 0",
        cases=tuple(cases),
        absent="; ".join(filter(None, absent)) if tree["acceptance"] else "no boosted stage",
    )


def _staleness(rows: list[Tree]) -> Promise:
    """Corrected rollouts of any age recover as much as fresh ones, and at the largest age point closer to them than
    such as are learned from as if they were new."""
    fresh = next((row for row in rows if row["lag"] == 0), None)
    stale = [row for row in rows if row["lag"] > 0 and row["form"] == "corrected"]
    largest = max(row["lag"] for row in rows)
    oldest = {row["form"]: row["cosine"]["value"] for row in rows if row["lag"] == largest > 0}
    cases = []
    if fresh is not None:
        spread = max(fresh["recovery"]["values"]) - min(fresh["recovery"]["values"])
        for row in stale:
            fall = row["recovery"]["value"] - fresh["recovery"]["value"]
            text = f"{100 * fall:+.1f} points of recovery, spread of lag 0 over seeds {100 * spread:.1f}"
            cases.append(Case(what=f"lag {row['lag']}", text=text, held=fall >= -spread))
    both = {"corrected", "uncorrected"} <= oldest.keys()
    if both:
        ours, plain = oldest["corrected"], oldest["uncorrected"]
        text = f"{ours:.3f} corrected, {plain:.3f} uncorrected"
        cases.append(Case(what=f"cosine at lag {largest}", text=text, held=ours > plain))
    return Promise(
        name="asynchrony",
        rule="corrected rollouts of any age recover as lag 0 does but for its spread, with the higher cosine",
        cases=tuple(cases),
        absent="" if fresh is not None and both else "needs lag 0 and both forms at the largest lag",
    )


def _listed(names: Iterable[str], reason: str = "missing") -> str:
    text = ", ".join(names)
    return f"{reason}: {text}" if text else ""


def _share(found: Tree) -> str:
    return f"{100 * found['value']:.1f}% {_bounds(found)}"


def _points(change: Tree) -> str:
    """The change in points, and whether even its lower bound holds."""
    where = "" if change["low"] >= REGRESSION else f", lower bound below {100 * REGRESSION:g}"
    return f"{100 * change['rate']:+.1f} points {_bounds(change, 100, '+.1f')}{where}"


def _bounds(found: Tree, scale: float = 100, form: str = ".1f") -> str:
    if found["low"] is None:
        return "(no interval)"
    return f"[{scale * found['low']:{form}}, {scale * found['high']:{form}}]"
