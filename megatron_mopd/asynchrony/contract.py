"""What the worlds of one run must agree on, told by the training world and compared by the others before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mopd import provenance
from megatron_mopd.asynchrony.directory import Exchange, Session
from megatron_mopd.config import Config
from megatron_mopd.sources import RolloutSource
from megatron_mopd.tokenizer import ChatTokenizer


def common(config: Config, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What every world reads text and draws by."""
    return {
        "run_id": config.run_id,
        "tokenizer_sha": tokenizer.tokenizer_sha,
        "template_sha": tokenizer.template_sha,
        "temperature": config.rollout.temperature,
        "deterministic": config.asynchrony.deterministic,
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


def of_teachers(ids: Mapping[str, str], nvfp4: Mapping[str, tuple[str, ...]], routing_sha: str) -> dict[str, Any]:
    """What decides the scores: the scoring world's side."""
    teachers = {name: {"checkpoint_id": ids[name], "nvfp4": list(nvfp4[name])} for name in ids}
    return {"teachers": teachers, "routing": routing_sha}


def compare(exchange: Exchange, session: Session, own: Mapping[str, Any]) -> None:
    """Raise :class:`provenance.ProvenanceError` where this world's ``own`` side is not what training has."""
    provenance.check_manifest(session.contract, own, where=str(exchange.root / "session.json"))
