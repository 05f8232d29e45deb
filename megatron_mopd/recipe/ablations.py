"""Whose weights the files of ``DIR/ablations`` are of: the recipe they lie in may have been run anew since.

A file, or each of its ``runs``, has ``weights``: ``{stage: checkpoint_id}`` of every stage of the recipe that it starts
from, learns from or is compared with. The report shows none of another run, and what ``--from`` runs anew takes the
ablations of it along. Imports neither torch nor megatron.core.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mopd.config import ConfigurationError
from megatron_mopd.recipe.schema import Recipe, Stage

FOLDER = "ablations"
NAMES = ("warm_up", "staleness", "mtp_boosting")
"""Files that the report reads."""


def weights_of(recipe: Recipe, stages: Iterable[str]) -> dict[str, str]:
    """``weights`` of something made of these finished train stages.

    Raises :class:`ConfigurationError` where one is not finished or comes from a version that did not say.
    """
    found = {}
    for name in dict.fromkeys(stages):
        file = recipe.dir / name / "result.json"
        if (known := _checkpoint_id(file)) is None:
            why = "does not say whose weights the stage left" if file.is_file() else "missing"
            raise ConfigurationError(
                f"{file}: {why}; run the recipe first (make recipe, --from {name} where it is old)"
            )
        found[name] = known
    return found


def foreign(recipe: Recipe, tree: Mapping[str, Any]) -> str:
    """Why the content of a file of ``ablations`` is not of this run of the recipe; "" where it is."""
    said = _said(tree)
    if not said or not all(said):
        return "it does not say whose weights it is of"
    for weights in said:
        for stage, theirs in weights.items():
            ours = _checkpoint_id(recipe.dir / stage / "result.json")
            if ours is None:
                return f"{stage} was checkpoint {theirs[:12]} there and is not finished here"
            if ours != theirs:
                return f"{stage} was checkpoint {theirs[:12]} there and is {ours[:12]} here"
    return ""


def concerned(recipe: Recipe, stages: Collection[str]) -> list[Path]:
    """Files and folders of ablations that vary one of ``stages`` or are of its weights."""
    folder, found = recipe.dir / FOLDER, []
    for name in NAMES:
        file = folder / f"{name}.json"
        named = {stage for weights in _said(_read(file)) for stage in weights}
        if not (named | _varied(recipe, name)).isdisjoint(stages):
            found += [path for path in (file, folder / f"{name}.png", folder / name) if path.exists()]
    return found


def warmed(recipe: Recipe) -> tuple[Stage, Stage] | None:
    """The first MOPD iteration that starts from a warm-up, behind that warm-up; None where there is none."""
    for name in recipe.report.iterations if recipe.report is not None else ():
        iteration = recipe.stage(name, "report.iterations")
        start = recipe.stage(iteration.initial, name) if iteration.initial is not None else None
        if start is not None and start.after is not None:
            return start, iteration
    return None


def _varied(recipe: Recipe, name: str) -> set[str]:
    """The stage that an ablation runs again with a difference. (Runs of staleness say themselves what they are of.)"""
    if name == "warm_up" and (found := warmed(recipe)) is not None:
        return {found[1].name}
    boosted = recipe.report.boosted if recipe.report is not None else None
    return {boosted} if name == "mtp_boosting" and boosted is not None else set()


def _said(tree: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    return [tree["weights"]] if "weights" in tree else [run.get("weights", {}) for run in tree.get("runs", [])]


def _checkpoint_id(result: Path) -> str | None:
    return _read(result).get("ended", {}).get("checkpoint_id")


def _read(file: Path) -> dict[str, Any]:
    """Empty where there is no such file, and for one that is no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
