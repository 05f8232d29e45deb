"""Files that are there whole or not at all, and what is said where they cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a file system, or of a user's share of it, without room."""


class WriteError(RuntimeError):
    """A file of a run could not be written; what was there before is as it was. ``cause`` is the system's error."""

    def __init__(self, path: Path, what: str, error: OSError) -> None:
        remedy = f"{free(path)}; make room" if error.errno in FULL else "see to it that this can be done"
        super().__init__(
            f"{path}: {what} could not be written: {error.strerror or error}; {remedy}, then start the same command"
            " again: a run goes on from its last checkpoint, and what is whole is kept"
        )
        self.cause = error


def free(path: Path) -> str:
    """How much room there is where ``path`` lies or would lie, as part of a sentence."""
    try:
        place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        return f"{shutil.disk_usage(place).free:,} bytes are free there"
    except OSError as error:  # the message that asks must be said, whatever else the disk refuses
        return f"how much is free there is unknown ({error.strerror})"


def atomically(path: Path, fill: Callable[[Path], Any], what: str = "it") -> Path:
    """Let ``fill`` write a file beside ``path`` and put it in its place once the disk has it.

    The directory is made where there is none. Raises :class:`WriteError`, which calls the content ``what``, where the
    system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")  # of its own, should another write it too
    with writing(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


@contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Where the system refuses what the block does, :class:`WriteError` on ``path``, whose content is ``what``."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, what, error) from error
