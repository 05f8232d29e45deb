"""What the worlds of one run must agree on, told by the training world and compared by the others before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_mopd import provenance
from megatron_mopd.asynchrony.directory import Exchange, Session
from megatron_mopd.config import Config, Model
from megatron_mopd.conversion.model_settings import HOW_NOT_WHAT, facts
from megatron_mopd.pattern import without_borders
from megatron_mopd.quantization import recipes
from megatron_mopd.sources import RolloutSource
from megatron_mopd.tokenizer import ChatTokenizer


def common(config: Config, tokenizer: ChatTokenizer, precision: str) -> dict[str, Any]:
    """What every world reads text, draws and scores by; ``precision`` is the resolved one, ``fp32`` or ``bf16``.

    The start of the weights, the borders of pipeline stages and recomputation are a world's own, and so is the layout.
    """
    table = config.quantization.train
    rules = None if table is None else [[r.match, r.format, r.last_layers] for r in recipes.load(table).rules]
    return {
        "run_id": config.run_id,
        "tokenizer_sha": tokenizer.tokenizer_sha,
        "template_sha": tokenizer.template_sha,
        "temperature": config.rollout.temperature,
        "deterministic": config.asynchrony.deterministic,
        "model": _settings(config.model),
        "precision": precision,
        "quantization": config.quantization.model_dump(mode="json") | {"rules": rules},
    }


def of_rollouts(config: Config, source: RolloutSource) -> dict[str, Any]:
    """What decides which prompts are drawn when, and how: the rollout world's side."""
    drawing = config.rollout.model_dump(mode="json", exclude={"batch_size", "prefill_tokens", "shards", "temperature"})
    return {
        "seed": config.run.seed,
        "rollout": drawing,
        "in_flight_updates": config.asynchrony.in_flight_updates,
        "data": {
            "digest": source.stream.state_dict()["digest"],
            "weights": dict(config.data.weights),
            "shuffle_seed": config.data.shuffle_seed,
        },
    }


def of_teachers(config: Config, teachers: provenance.Scorers) -> dict[str, Any]:
    """What decides the scores: the scoring world's side."""
    known = {name: {"checkpoint_id": id_, "nvfp4": list(teachers.nvfp4[name])} for name, id_ in teachers.ids.items()}
    models = {f"teachers.{name}.model": facts(t.model or config.model) for name, t in config.teachers.items()}
    return {"teachers": known, "routing": provenance.routing_sha(teachers.routing)} | models


def compare(exchange: Exchange, session: Session, own: Mapping[str, Any]) -> None:
    """Raise :class:`provenance.ProvenanceError` where this world's ``own`` side is not what training has."""
    where = exchange.root / "session.json"
    for key, ours in json.loads(json.dumps(own)).items():  # training's side is of a file, which has no tuples
        theirs = session.contract.get(key)
        if key == "teachers":
            provenance.check_manifest({key: theirs}, {key: ours}, where=str(where))
            continue
        there, here = _flat(key, theirs), _flat(key, ours)
        for name in here | there:
            if there.get(name) != here.get(name):
                raise provenance.ProvenanceError(
                    f"{where}: training began with {name} = {there.get(name)!r}, this world has {here.get(name)!r}, by"
                    " which it would draw or score something else; start all worlds with the same file and the same"
                    " changes to it (parallel, rollout.batch_size and batching aside)"
                )


def _settings(model: Model) -> dict[str, Any]:
    """A model's settings as JSON, without what a world has of its own: start, stages of a pipeline, recomputation."""
    tree = model.model_dump(mode="json", exclude={"initial"})
    kept = {name: value for name, value in tree["override"].items() if not name.startswith(HOW_NOT_WHAT)}
    return tree | {"pattern": without_borders(model.pattern), "override": kept}


def _flat(name: str, value: Any) -> dict[str, Any]:
    """``{"a.b": 1}`` of ``{"a": {"b": 1}}``."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: leaf for part, below in value.items() for key, leaf in _flat(f"{name}.{part}", below).items()}
