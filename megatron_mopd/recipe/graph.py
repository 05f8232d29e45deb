"""Who was initialised from whom and who taught whom in a recipe, as data: ``graph.json`` in its directory.

Nodes are stages, and teachers that came as checkpoints: ``name``, ``type`` (external of the latter), ``what`` (source
and objective in a few words), ``domains`` it was trained on or taught in, or teaches, ``checkpoint_id`` of its final
weights, ``state`` (planned, unfinished, finished, skipped, or given of a checkpoint) and, once it is finished, a
``note`` on what it found. Edges have ``source``, ``target``, ``domains`` and a ``kind``: ``initial`` (weights),
``teacher`` (scores), ``traces`` (completions), ``quantized`` (the same weights in few bits), ``measured`` (by a
preflight stage) and ``decides`` (a preflight stage on a warm-up).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
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
    nodes, edges, given = [], [], dict[tuple[str, Path], dict[str, Any]]()
    for stage in recipe.stages:
        config = stage_config(recipe, stage)
        nodes.append(_node(recipe, stage, config))
        _add_external(given, stage, config)
        edges += _edges(recipe, stage, config, given)
    return {"nodes": [*given.values(), *nodes], "edges": edges}


def write(recipe: Recipe) -> Graph:
    """:func:`build`, left as ``graph.json`` in the recipe's directory, whole or not at all."""
    made = build(recipe)
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


def _add_external(given: dict[tuple[str, Path], dict[str, Any]], stage: Stage, config: Config) -> None:
    """A node for each teacher of ``stage`` that is not there yet; two of one name are told apart by their places."""
    for name, teacher in config.teachers.items():
        if name in stage.teachers or (name, teacher.checkpoint) in given:
            continue
        names = {node["name"] for node in given.values()}
        found = checkpoint_directory.latest(teacher.checkpoint)  # None for a Hugging Face directory, or one to come
        given[name, teacher.checkpoint] = {
            "name": name if name not in names else f"{name}, {teacher.checkpoint}",
            "type": "external",
            "what": "a checkpoint",
            "domains": sorted(teacher.domains),
            "state": "given",
            "note": "",
            "checkpoint_id": None if found is None else checkpoint_directory.read_manifest(found).get("checkpoint_id"),
        }


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
        said = checkpoint_directory.read_json(recipe.dir / stage.name / "result.json", _anew(stage.name))["quantized"]
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
    said = checkpoint_directory.read_json(marker, _anew(directory.name))
    return "finished" if said["finished"] else "unfinished"


def _anew(name: str) -> str:
    """The way out where a file of a stage is damaged."""
    return f"run the stage and all that depend on it anew with --from {name}"


def _edges(
    recipe: Recipe, stage: Stage, config: Config, given: Mapping[tuple[str, Path], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    found = []
    if stage.initial is not None:
        kind = {"train": "initial", "preflight": "measured", "quantize": "quantized"}[stage.type]
        source = starts_from(recipe, stage.initial)
        found.append({"source": source, "target": stage.name, "kind": kind, "domains": []})
    kind = "measured" if stage.type == "preflight" else "traces" if config.source.type == "traces" else "teacher"
    if not is_skipped(recipe, stage.name):
        for name, teacher in config.teachers.items():
            source = name if name in stage.teachers else given[name, teacher.checkpoint]["name"]
            found.append({"source": source, "target": stage.name, "kind": kind, "domains": list(teacher.domains)})
    if stage.after is not None:
        found.append({"source": stage.after, "target": stage.name, "kind": "decides", "domains": []})
    return found
