"""The directory of a run's checkpoints: which one is newest, how one is published, and what is cleared away.

Layout as Megatron-LM writes it: ``iter_0000123/`` per checkpoint and ``latest_checkpointed_iteration.txt`` with the
newest step. A checkpoint is written under a hidden name, renamed when it is whole, and pointed at last, so that a crash
between any two steps leaves the previous one good. Imports neither torch nor megatron.core.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_mopd.config import ConfigurationError

POINTER = "latest_checkpointed_iteration.txt"
MANIFEST = "mopd_manifest.json"
COMPANIONS = "hugging_face"
"""Folder of a checkpoint, and entry of its manifest, with what a Hugging Face directory holds beside weights."""
_STEP = re.compile(r"iter_(\d{7,})")


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint under ``root`` (or ``root`` itself when it is one); None when there is none."""
    if is_complete(root):
        return root
    pointer = root / POINTER
    if pointer.is_file():
        text = pointer.read_text().strip()
        name = _name(int(text)) if text.isdecimal() else text  # Megatron-LM also writes "release"
        # The second is where a crash in the middle of replacing the first leaves it.
        for place in (root / name, _hidden(root, name, "replaced")):
            if is_complete(place):
                return place
    steps = [step for step in _steps(root) if is_complete(root / _name(step))]
    return root / _name(max(steps)) if steps else None


def before(root: Path, step: int) -> Path | None:
    """The newest complete checkpoint under ``root`` of a step below ``step``; None when there is none."""
    steps = [found for found in _steps(root) if found < step and is_complete(root / _name(found))]
    return root / _name(max(steps)) if steps else None


def resolve(path: Path) -> Path:
    """The checkpoint that ``path`` stands for; raises :class:`ConfigurationError` when there is none."""
    found = latest(path)
    if found is None:
        what = "holds no complete checkpoint" if path.is_dir() else "no such directory"
        raise ConfigurationError(f"{path}: {what}; name a directory with iter_*/ inside, or one iter_* directory")
    return found


def is_complete(path: Path) -> bool:
    """Whether ``path`` is itself one whole checkpoint directory."""
    return (path / ".metadata").is_file() and (path / "metadata.json").is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """``mopd_manifest.json`` of the newest checkpoint under ``path``; empty for one that another program wrote.

    Raises :class:`ConfigurationError` when there is no checkpoint or the file is not JSON.
    """
    file = resolve(path) / MANIFEST
    return read_json(file, "copy the checkpoint again") if file.is_file() else {}


def read_json(file: Path, way_out: str = "put it back as it was written, from a copy") -> dict[str, Any]:
    """A JSON object; raises :class:`ConfigurationError` naming the file, and ``way_out`` as what to do."""
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"holds {type(found).__name__} instead of an object")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file}: cannot be read: {error}; {way_out}") from None
    return found


def steps(root: Path) -> list[int]:
    """The steps of the complete checkpoints under ``root``, in order."""
    return [step for step in _steps(root) if is_complete(place(root, step))]


def place(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies once it is published."""
    return root / _name(step)


def partial(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it gets its name."""
    return _hidden(root, _name(step), "partial")


def prepare(root: Path, step: int) -> None:
    """Clear what crashed saves left behind and make the empty directory :func:`partial`."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(root.glob(".iter_*")):
        name, _, kind = leftover.name.removeprefix(".").partition(".")
        if kind == "replaced" and is_complete(leftover) and not (root / name).exists():
            leftover.rename(root / name)
        else:
            shutil.rmtree(leftover)
    partial(root, step).mkdir()


def publish(root: Path, step: int, keep: int) -> Path:
    """Give the whole checkpoint in :func:`partial` its name, point at it, then drop all but the newest ``keep``."""
    source, target = partial(root, step), root / _name(step)
    for file in source.rglob("*"):
        sync(file)
    sync(source)
    replaced = _hidden(root, _name(step), "replaced")
    if target.exists():
        target.rename(replaced)
    source.rename(target)
    sync(root)
    write(root / f".{POINTER}", str(step).encode())
    (root / f".{POINTER}").replace(root / POINTER)
    sync(root)
    if replaced.exists():
        shutil.rmtree(replaced)
    # Steps above this one belong to a future that was abandoned; they are not ours to count.
    for old in [s for s in _steps(root) if s <= step][:-keep]:
        doomed = _hidden(root, _name(old), "dropped")
        (root / _name(old)).rename(doomed)  # never half a checkpoint under a real name
        shutil.rmtree(doomed)
    return target


def write(file: Path, content: bytes) -> None:
    """Write ``content`` and wait until the disk has it."""
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(step: int) -> str:
    return f"iter_{step:07d}"


def _hidden(root: Path, name: str, kind: str) -> Path:
    return root / f".{name}.{kind}"


def _steps(root: Path) -> list[int]:
    found = (_STEP.fullmatch(p.name) for p in root.iterdir()) if root.is_dir() else ()
    return sorted(int(m[1]) for m in found if m)
