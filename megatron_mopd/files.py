"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class WriteError(RuntimeError):
    """A file of a run could not be written; what was there before is as it was."""

    def __init__(self, path: Path, what: str, error: OSError) -> None:
        super().__init__(
            f"{path}: {what} could not be written: {error.strerror or error}; make room, then start the same command"
            " again: it goes on from the last checkpoint"
        )


def atomically(path: Path, fill: Callable[[Path], Any]) -> Path:
    """Let ``fill`` write a file beside ``path`` and put it in its place once the disk has it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")  # of its own, should another write it too
    try:
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
