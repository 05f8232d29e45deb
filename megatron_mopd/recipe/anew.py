"""Running stages anew without losing what they held, and one process at a time in a recipe's directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mopd import display
from megatron_mopd.config import ConfigurationError
from megatron_mopd.files import writing
from megatron_mopd.recipe import ablations
from megatron_mopd.recipe.schema import SET_ASIDE, Recipe

logger = logging.getLogger(__name__)

LOCK = "recipe.lock"
PATIENCE = 10.0
"""Seconds to wait for a process that is on its way out, such as the peers of a killed rank."""


def dependents(recipe: Recipe, name: str) -> list[str]:
    """``name`` and every stage that starts from, learns from or waits for one of these, in the recipe's order."""
    found = {name}
    for stage in recipe.stages:  # only earlier stages can be named, so one pass sees all
        if found & {stage.initial, stage.after, *stage.teachers}:
            found.add(stage.name)
    return [other for other in recipe.names if other in found]


def set_aside(recipe: Recipe, name: str) -> list[tuple[Path, Path]]:
    """Move the directories of ``name`` and its dependents to ``set_aside/N``; returns (from, to) of each.

    ``N`` counts from 1. Ablations of these stages go along, before them, and the last stage goes first, so that an
    interrupted call leaves a recipe that is in order. Raises :class:`ConfigurationError` for an unknown stage and while
    another process is at work in ``recipe.dir``, :class:`files.WriteError` where the system refuses.
    """
    recipe.stage(name, "--from")
    redone = dependents(recipe, name)
    there = [path for stage in redone if (path := recipe.dir / stage).exists()]
    if not there:
        return []
    root = recipe.dir / SET_ASIDE
    with alone(recipe.dir), writing(root, "what is set aside"):
        root.mkdir(exist_ok=True)
        taken = [int(path.name) for path in root.iterdir() if path.name.isdecimal()]
        place = root / str(max(taken, default=0) + 1)
        place.mkdir()
        there += ablations.concerned(recipe, redone)
        moved = [(path, place / path.relative_to(recipe.dir)) for path in there]
        for source, target in reversed(moved):
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
    return moved


def begin_at(recipe: Recipe, name: str) -> None:
    """:func:`set_aside`, said on the terminal."""
    for source, target in set_aside(recipe, name):
        display.note(0, f"--from {name}: {source} is kept as {target}")


@contextmanager
def alone(directory: Path) -> Iterator[int]:
    """Hold the lock of a recipe's directory, which the kernel frees when this process ends in whatever way.

    Yields its descriptor: programs that inherit it hold the lock until the last of them has ended too. Two runs would
    overwrite each other's checkpoints. Raises :class:`ConfigurationError` naming the process that holds
    it, and :class:`files.WriteError` for a directory (the recipe's setting ``dir``) that cannot be written. A file
    system without locks is said and used as it is.
    """
    with writing(directory / LOCK, "the lock of the recipe's dir"):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with writing(directory / LOCK, "the lock of the recipe's dir"):
            _lock(descriptor, directory)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise ConfigurationError(
                f"{directory}: {holder} is running stages there; wait for it, end it, or choose another dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.warning("%s: its file system has no locks; start only one run there at a time", directory)
            return None
