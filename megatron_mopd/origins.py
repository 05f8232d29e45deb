"""Which model the checkpoints of a configuration hold: read from the directories, and held against what was written.

A Hugging Face directory says it in ``config.json``, a Megatron directory of this project or of a conversion in its
manifest; one that another Megatron program wrote says nothing. Only metadata is read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_mopd import checkpoint_directory, presets
from megatron_mopd.checkpoint_directory import COMPANIONS
from megatron_mopd.config import Config, ConfigurationError, Model
from megatron_mopd.conversion import hugging_face_config, inspection
from megatron_mopd.conversion.hugging_face import HuggingFaceWeights
from megatron_mopd.conversion.model_settings import HOW_NOT_WHAT, facts, model_settings, stored_blocks
from megatron_mopd.pattern import Pattern, parse_pattern

logger = logging.getLogger(__name__)

_ARCHITECTURE = ("preset", "pattern", "override", "mamba_conv", "mamba_chunk", "vocab_size")


def is_hugging_face(path: Path) -> bool:
    """Whether ``path`` is a Hugging Face model directory."""
    return (path / hugging_face_config.FILE).is_file() and checkpoint_directory.latest(path) is None


def stored_mtp_blocks(path: Path) -> int:
    """MTP blocks in a Hugging Face directory, which may be fewer than the depths that its config.json promises."""
    model = hugging_face_config.architecture(hugging_face_config.read(path), str(path / hugging_face_config.FILE))
    if not model.blocks:
        return 0
    with closing(HuggingFaceWeights(path)) as weights:
        layers = {int(name.split(".")[2]) for name in weights.entries if name.startswith("mtp.layers.")}
    return -(-len(layers) // len(model.mtp))


def model_of(path: Path) -> Model | None:
    """The model in a checkpoint directory of either kind; None for one that does not say.

    Its pattern has MTP where the directory stores MTP weights. Raises :class:`ConfigurationError` for a directory that
    is missing, damaged or of another family.
    """
    if is_hugging_face(path):
        file = path / hugging_face_config.FILE
        return model_settings(hugging_face_config.read(path), str(file), blocks=stored_mtp_blocks(path))
    if checkpoint_directory.latest(path) is None:
        raise inspection.neither(path)
    manifest = checkpoint_directory.read_manifest(path)
    where = str(checkpoint_directory.resolve(path) / checkpoint_directory.MANIFEST)
    if isinstance(found := manifest.get("model"), dict):
        try:
            known = Model.model_validate({name: found[name] for name in _ARCHITECTURE if found.get(name) is not None})
        except ValidationError as error:
            raise ConfigurationError(f"{where}: model: {error.errors()[0]['msg']}; copy the checkpoint again") from None
        kept = {name: value for name, value in known.override.items() if not name.startswith(HOW_NOT_WHAT)}
        preset = known.preset or "tiny"
        return known.model_copy(
            update={"preset": preset, "override": kept, "vocab_size": manifest.get("vocab_size", known.vocab_size)}
        )
    if isinstance(companion := manifest.get(COMPANIONS), dict):
        return model_settings(companion["config"], where, blocks=companion["mtp_blocks"])
    return None


def resolved(config: Config, written: Mapping[Path, Model] | None = None) -> Config:
    """``config`` with the architecture of student and teachers spelled out; a resolved one comes back equal.

    Dimensions that ``model`` leaves out are those of ``model.initial``, and ``tiny`` where nothing says them; a teacher
    without a ``model`` has its checkpoint's. ``written`` names the models of checkpoints that are still to be written,
    by run directory. Raises :class:`ConfigurationError` where a setting and a checkpoint contradict each other.
    """
    known = written or {}
    student = _completed(config.model, config.model.initial, "model", "model.initial", known)
    teachers = {}
    for name, teacher in config.teachers.items():
        setting, origin = f"teachers.{name}.model", f"teachers.{name}.checkpoint"
        if teacher.model is not None:
            model = _completed(teacher.model, teacher.checkpoint, setting, origin, known, mtp=False)
        else:
            found = _model_at(teacher.checkpoint, origin, known)
            model = None if found is None or facts(found) == facts(student) else found
            if model is not None:
                logger.info("teachers.%s: its checkpoint is a model of its own: %s", name, summary(model))
        teachers[name] = teacher.model_copy(update={"model": model})
    return config.model_copy(update={"model": student, "teachers": teachers})


def summary(model: Model) -> str:
    """A model in a few words."""
    p = presets.resolve(model)
    return f"pattern {p.pattern}, hidden size {p.hidden_size}, {presets.parameter_count(p).main:,} parameters"


def vocab_size(model: Model, tokens: int) -> int:
    """Rows of the embedding that stand for tokens, which must be the tokenizer's ``tokens``: a row without a token
    could be sampled and mean nothing."""
    given = model.vocab_size
    if given is not None and given != tokens:
        whose = f", of {model.initial}" if model.initial else ""
        raise ConfigurationError(
            f"model.vocab_size = {given}{whose}, but the tokenizer has {tokens} tokens; name the tokenizer of these"
            " weights under tokenizer (type huggingface and path), or leave the setting out for weights that are drawn"
        )
    return tokens


def _model_at(path: Path, origin: str, written: Mapping[Path, Model]) -> Model | None:
    if (model := written.get(path)) is not None:
        return model
    try:
        return model_of(path)
    except ConfigurationError as error:
        if path.exists():
            raise ConfigurationError(f"{origin} = {path}: {error}") from None
        return None  # whoever loads it says what is missing


def _completed(
    model: Model, path: Path | None, setting: str, origin: str, written: Mapping[Path, Model], mtp: bool = True
) -> Model:
    """``model`` with what it leaves out taken from the checkpoint at ``path``; without ``mtp`` its MTP is not built.

    ``setting`` and ``origin`` name the two in messages.
    """
    found = None if path is None else _model_at(path, origin, written)
    if found is None or path is None:
        if path is not None and model.preset is None and not path.exists():
            raise ConfigurationError(f"{origin} = {inspection.neither(path)}")  # no reason to build another model
        return model if model.preset else model.model_copy(update={"preset": "tiny"})
    if model.preset is None:
        derived = {name: getattr(found, name) for name in _ARCHITECTURE}
        given = {name: value for name in _ARCHITECTURE if (value := getattr(model, name)) is not None}
        merged = model.model_copy(update=derived | given | {"override": found.override | model.override})
    else:
        merged = model.model_copy(update={"vocab_size": model.vocab_size or found.vocab_size})
    _compare(merged, found, path, setting, mtp)
    return merged


def _compare(ours: Model, theirs: Model, path: Path, setting: str, mtp: bool) -> None:
    """Refuse settings that describe another model than the one in the directory."""
    a, b = facts(ours), facts(theirs)
    differing = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    problems = [f"{name} = {_shown(a, name)} in the settings, {_shown(b, name)} there" for name in differing]
    mine, stored = parse_pattern(presets.resolve(ours).pattern), parse_pattern(presets.resolve(theirs).pattern)
    # Depths that share one block may be any number: the released Ultra says 1 and is trained with 2.
    if mtp and mine.mtp and (mine.mtp, stored_blocks(ours)) != (stored.mtp, stored_blocks(theirs)):
        problems.append(f"MTP layers {_mtp(mine)} in the settings, {_mtp(stored)} there")
    if ours.vocab_size != theirs.vocab_size and theirs.vocab_size is not None:
        problems.append(f"vocab_size = {ours.vocab_size} in the settings, {theirs.vocab_size} there")
    if problems:
        pattern = presets.resolve(theirs).pattern
        raise ConfigurationError(
            f"{setting}: {path} holds another model: {'; '.join(problems)}. Leave preset, pattern, override of"
            f" dimensions and vocab_size out, and they are read from there (pattern {pattern!r}), or name another"
            " checkpoint"
        )


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "not set"


def _mtp(pattern: Pattern) -> str:
    return f"{pattern.mtp} x {pattern.depths}" if pattern.mtp else "none"
