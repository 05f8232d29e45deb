"""Hugging Face directories kept in Megatron's format, so that each is converted once.

The place of a directory in the cache is named by its files: the sha256 of their names, of the sizes and times of
change of those with weights, of the headers of those, and of the whole content of all others. A start with unchanged
files reads no weights again; a changed, added or removed file gives another name and so another conversion. What is
in the cache is identified once more by its content when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import closing
from pathlib import Path

from megatron_mopd import checkpoint_directory
from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import directions, hugging_face_config
from megatron_mopd.conversion.hugging_face import HuggingFaceWeights, carried_files
from megatron_mopd.conversion.jobs import Conversion, Report

_FORMAT = 1
"""Part of every name; a higher one leaves directories that an earlier form of the conversion wrote behind."""


def place(source: Path, cache: Path) -> Path:
    """Where the Hugging Face directory ``source`` lies in ``cache``, converted or still to be."""
    content = hashlib.sha256(json.dumps([_FORMAT, _files(source)]).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.resolve().name)
    return cache / f"{name}-{content[:16]}"


def convert(source: Path, target: Path, *, without_mtp: bool, report: Report | None = None) -> Conversion:
    """Convert ``source`` into ``target``, a :func:`place`; goes on with what an interrupted start left.

    Raises :class:`ConfigurationError` for a cache that cannot be written, and as
    :func:`megatron_mopd.conversion.hugging_face_to_megatron`.
    """
    cache = target.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(_unwritable(cache, error.strerror)) from None
    if not os.access(cache, os.W_OK | os.X_OK):
        raise ConfigurationError(_unwritable(cache, "Permission denied"))
    return directions.hugging_face_to_megatron(source, target, without_mtp=without_mtp, report=report)


def is_converted(target: Path) -> bool:
    """Whether ``target`` holds a whole checkpoint."""
    return checkpoint_directory.latest(target) is not None


def _unwritable(cache: Path, reason: str | None) -> str:
    return (
        f"checkpoint.cache = {cache}: cannot be written ({reason}); name a directory for converted Hugging Face"
        " checkpoints there"
    )


def _files(source: Path) -> list[list[str | int]]:
    with closing(HuggingFaceWeights(source)) as weights:
        heavy = {file.name: file for file in weights.files}
    known: list[list[str | int]] = []
    for name, file in sorted(heavy.items()):
        state = file.stat()
        known.append([name, state.st_size, state.st_mtime_ns, _sha(_header(file))])
    light = {**carried_files(source), hugging_face_config.FILE: source / hugging_face_config.FILE}
    return known + [[name, _sha(file.read_bytes())] for name, file in sorted(light.items())]


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
