"""The report of a recipe with roles: reads its stages, writes ``report.json``, ``report.md`` and pictures, shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mopd import plots
from megatron_mopd.config import Config
from megatron_mopd.files import atomically
from megatron_mopd.recipe import numbers, outcomes, pictures, promises, tables, text
from megatron_mopd.recipe.graph import PICTURE
from megatron_mopd.recipe.outcomes import Outcomes
from megatron_mopd.recipe.schema import Recipe
from megatron_mopd.report import Example

STALENESS = "Age of rollouts"
DRAWN = {
    STALENESS: "ablations/staleness.png",
    "Who was initialised from whom, and who taught whom": PICTURE,
}
"""Pictures that others leave in the recipe's directory, by caption."""


def publish(recipe: Recipe, configs: Mapping[str, Config]) -> dict[str, Any]:
    """Write the report of what is finished beside the stages, show it, and return the tree of ``report.json``.

    ``configs`` holds every stage's full configuration. Stages and ablations that are not there are named in the report;
    a promise that was missed is shown and changes nothing else. Raises :class:`ConfigurationError` for a recipe without
    roles and for answers that cannot be paired.
    """
    found = outcomes.load(recipe, configs)
    tree = build(found)
    write(tree, found, recipe.dir)
    tables.show(tree)
    return tree


def build(found: Outcomes) -> dict[str, Any]:
    """The tree of ``report.json``; see :mod:`megatron_mopd.recipe.numbers`."""
    tree = numbers.build(found)
    tree["bars"] = {
        "recovery": promises.RECOVERY,
        "regression": promises.REGRESSION,
        "warm_up": promises.WARM_UP,
        "acceptance": promises.ACCEPTANCE,
    }
    tree["promises"] = [promise.to_json() for promise in promises.check(tree)]
    return tree


def write(tree: Mapping[str, Any], found: Outcomes, directory: Path) -> list[Path]:
    """Pictures, ``report.md`` and last ``report.json``, each whole or not at all; returns their paths."""
    written, shown = [], {}
    for caption, name, figure in pictures.figures(tree, examples(found)):
        written.append(atomically(directory / name, lambda path, figure=figure: plots.save(figure, path)))
        shown[caption] = name
    others = {caption: name for caption, name in DRAWN.items() if (directory / name).is_file()}
    if tree["staleness"] is None:
        others.pop(STALENESS, None)  # of another run
    shown |= others
    markdown = text.to_markdown(tree, shown)
    json_text = json.dumps(tree, indent=2, allow_nan=False) + "\n"
    written.append(atomically(directory / "report.md", lambda path: path.write_text(markdown, encoding="utf-8")))
    written.append(atomically(directory / "report.json", lambda path: path.write_text(json_text, encoding="utf-8")))
    return written


def examples(found: Outcomes) -> list[Example]:
    """A rollout of each distilled domain before the first iteration and one after the last that is finished."""
    done = [outcome for name in found.roles.iterations if (outcome := found.of(name)) is not None]
    if not done:
        return []
    sides = [(f"before {done[0].stage}", done[0].before), (f"after {done[-1].stage}", done[-1].result)]
    return [
        _example(tree, note) for domain in found.teacher_of for note, side in sides for tree in _first(side, domain)
    ]


def _first(side: Mapping[str, Any], domain: str) -> list[Mapping[str, Any]]:
    return [tree for tree in side.get("examples", []) if tree["domain"] == domain][:1]


def _example(tree: Mapping[str, Any], note: str) -> Example:
    return Example(
        domain=tree["domain"],
        prompt=tree["prompt"],
        tokens=tuple(tree["tokens"]),
        advantages=tuple(tree["advantages"]),
        note=note,
    )
