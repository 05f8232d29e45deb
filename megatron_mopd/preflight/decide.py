"""From the numbers of a pre-flight to a decision on each teacher, and decisions read back from disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_mopd.preflight_config import Preflight
from megatron_mopd.settings import ConfigurationError

FILE = "preflight.json"
Decision = Literal["go", "warm_up", "refuse"]
ORDER: tuple[Decision, ...] = ("go", "warm_up", "refuse")
"""From best to worst."""

# metric, the setting that bounds it, whether it must be at least that (or at most), what it is called in a reason
_WARM_UP = (
    ("overlap", "min_overlap", True, "overlap of the likeliest tokens"),
    ("teacher_shared", "min_shared_mass", True, "shared part of the teacher's mass on its likeliest tokens"),
    ("student_shared", "min_shared_mass", True, "shared part of the student's mass on its likeliest tokens"),
    ("implausible", "max_implausible", False, "share of implausible prefixes"),
)


def decide(domains: Mapping[str, Mapping[str, Any]], settings: Preflight) -> tuple[Decision, list[str]]:
    """What to do about a teacher with these metrics in its domains, and why: the worst of the domains' decisions.

    refuse: numbers that mean nothing, since some are none or two scorings differ; warm_up: support too poor to learn
    from on the student's own prefixes; go: neither.
    """
    found = [(decision, f"{d}: {why}") for d, metrics in domains.items() for decision, why in _of(metrics, settings)]
    worst = ORDER[max((ORDER.index(decision) for decision, _ in found), default=0)]
    return worst, [why for decision, why in found if decision == worst]


def _of(metrics: Mapping[str, Any], settings: Preflight) -> Iterator[tuple[Decision, str]]:
    if metrics["not_finite"]:
        yield "refuse", f"{metrics['not_finite']} of {metrics['tokens']} tokens have no finite log-probability"
        return
    disagreement, limit = metrics["disagreement"], settings.max_disagreement
    if disagreement is None or disagreement > limit:
        shown = "no number" if disagreement is None else f"{disagreement:.3g} nats"
        yield "refuse", f"disagreement of repeated scoring {shown}, above preflight.max_disagreement = {limit:g}"
    for metric, setting, at_least, name in _WARM_UP:
        value, bound = metrics[metric], getattr(settings, setting)
        if value is None:
            yield "refuse", f"{name} is no number"
        elif value < bound if at_least else value > bound:
            side = "below" if at_least else "above"
            yield "warm_up", f"{name} {value:.3f}, {side} preflight.{setting} = {bound:g}"


def decisions(path: Path) -> dict[str, Decision]:
    """``{teacher: decision}`` of a finished pre-flight in directory (or file) ``path``.

    Raises :class:`ConfigurationError` where there is none or it cannot be read.
    """
    file = path / FILE if path.is_dir() else path
    try:
        found = {name: entry["decision"] for name, entry in json.loads(file.read_text())["teachers"].items()}
    except FileNotFoundError:
        raise ConfigurationError(
            f"{file}: no pre-flight has been finished there; run it first (a preflight stage, or tools/preflight.py)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{file}: is no result of a pre-flight: {error!r}; remove it and run again") from None
    if strange := {name: decision for name, decision in found.items() if decision not in ORDER}:
        raise ConfigurationError(f"{file}: decisions {strange} are none of {', '.join(ORDER)}; remove it and run again")
    return found
