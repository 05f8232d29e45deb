"""Who was initialised from whom and who taught whom in a recipe, as data: ``graph.json`` in its directory.

Nodes are stages: ``name``, ``type``, ``what`` (source and objective in a few words), ``domains`` it was trained on or
taught in, ``checkpoint_id`` of its final weights, ``state`` (planned, unfinished, finished or skipped) and, once it is
finished, a ``note`` on what it found. Edges have ``source``, ``target``, ``domains`` and a
``kind``: ``initial`` (weights), ``teacher`` (scores), ``traces`` (completions), ``quantized`` (the same weights in few
bits), ``measured`` (by a preflight stage) and ``decides`` (a preflight stage on a warm-up).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_mopd import checkpoint_directory
from megatron_mopd.config import Config
from megatron_mopd.data_config import ReasoningGymPrompts
from megatron_mopd.files import atomically
from megatron_mopd.recipe.schema import (
    Recipe,
    Stage,
    decisions,
    is_skipped,
    quantize_settings,
    stage_config,
    starts_from,
)

FILE = "graph.json"
PICTURE = "graph.png"

Graph = dict[str, Any]
"""``{"nodes": [...], "edges": [...]}`` as in the module's docstring; JSON values."""


def build(recipe: Recipe) -> Graph:
    """The graph of a recipe as far as it has run; what has not is as it is planned."""
    nodes, edges = [], []
    for stage in recipe.stages:
        config = stage_config(recipe, stage)
        nodes.append(_node(recipe, stage, config))
        edges += _edges(recipe, stage, config)
    return {"nodes": nodes, "edges": edges}


def write(recipe: Recipe) -> Graph:
    """:func:`build`, left as ``graph.json`` in the recipe's directory, whole or not at all."""
    made = build(recipe)
    recipe.dir.mkdir(parents=True, exist_ok=True)
    atomically(recipe.dir / FILE, lambda file: file.write_text(json.dumps(made, indent=2) + "\n"))
    return made


def _node(recipe: Recipe, stage: Stage, config: Config) -> dict[str, Any]:
    directory = recipe.dir / stage.name
    node: dict[str, Any] = {"name": stage.name, "type": stage.type, "what": _what(stage, config)}
    node["domains"] = _domains(config) if stage.type == "train" else []
    node["state"] = "skipped" if is_skipped(recipe, stage.name) else _state(directory)
    node["note"] = _note(recipe, stage) if node["state"] == "finished" else ""
    trained = node["state"] == "finished" and stage.type == "train"
    node["checkpoint_id"] = (
        checkpoint_directory.read_manifest(directory / "checkpoints").get("checkpoint_id") if trained else None
    )
    return node


def _what(stage: Stage, config: Config) -> str:
    if stage.type == "quantize":
        return Path(quantize_settings(stage).recipe).stem
    if stage.type == "preflight":
        return "overlap, decisions"
    names = {"mopd": "MOPD", "cross_entropy": "SFT", "mtp_boosting": "MTP boosting"}
    what = "warm-up on traces" if config.source.type == "traces" else names[config.objective.type]
    return f"{what}, {config.run.steps} steps"


def _note(recipe: Recipe, stage: Stage) -> str:
    """A preflight's decisions, a quantized student's size."""
    if stage.type == "preflight":
        found = Counter((decisions(recipe, stage.name) or {}).values())
        return ", ".join(f"{count} {decision.replace('_', ' ')}" for decision, count in found.items())
    if stage.type == "quantize":
        said = checkpoint_directory.read_json(recipe.dir / stage.name / "result.json")["quantized"]
        return f"{said['bits_per_element']:.2f} bits a parameter"
    return ""


def _domains(config: Config) -> list[str]:
    if config.teachers:
        return sorted({domain for teacher in config.teachers.values() for domain in teacher.domains})
    return sorted({source.domain for source in config.data.train if isinstance(source, ReasoningGymPrompts)})


def _state(directory: Path) -> str:
    """``planned``, ``unfinished`` or ``finished``."""
    marker = directory / "stage.json"
    if not marker.is_file():
        return "planned"
    return "finished" if checkpoint_directory.read_json(marker)["finished"] else "unfinished"


def _edges(recipe: Recipe, stage: Stage, config: Config) -> list[dict[str, Any]]:
    found = []
    if stage.initial is not None:
        kind = {"train": "initial", "preflight": "measured", "quantize": "quantized"}[stage.type]
        source = starts_from(recipe, stage.initial)
        found.append({"source": source, "target": stage.name, "kind": kind, "domains": []})
    kind = "measured" if stage.type == "preflight" else "traces" if config.source.type == "traces" else "teacher"
    if not is_skipped(recipe, stage.name):
        found += [
            {"source": name, "target": stage.name, "kind": kind, "domains": list(stage.teachers[name])}
            for name in config.teachers
            if name in stage.teachers
        ]
    if stage.after is not None:
        found.append({"source": stage.after, "target": stage.name, "kind": "decides", "domains": []})
    return found
