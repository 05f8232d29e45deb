"""A directory that is written beside its place, file by file, and renamed into it when it is whole.

A journal in it lists the files that the disk has for good, so that the same command, started again after a kill, a
crash or a full disk, goes on behind the last of them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_mopd.checkpoint_directory import sync
from megatron_mopd.config import ConfigurationError

_JOURNAL = ".journal.jsonl"
_FULL = {errno.ENOSPC, errno.EDQUOT}


class DiskFullError(OSError):
    """The disk ran full; what is whole is kept."""


class BusyError(ConfigurationError):
    """Another process is writing the same directory."""


class PartialDirectory:
    """``target`` under construction as ``<target>.partial``; made by :func:`open_partial`.

    ``path`` is where to write, ``done`` what the journal says of finished files, by name.
    """

    def __init__(self, target: Path, done: dict[str, dict[str, Any]], journal: int) -> None:
        self.target, self.path, self.done = target, partial_path(target), done
        self._journal, self._lock = journal, Lock()

    def finished(self, name: str, record: Mapping[str, Any]) -> None:
        """Note that ``name`` is whole, once the disk has it."""
        sync(self.path / name)
        entry = {**record, "file": name, "size": (self.path / name).stat().st_size}
        with self._lock:
            os.write(self._journal, json.dumps(entry).encode() + b"\n")
            os.fsync(self._journal)
            self.done[name] = entry

    def publish(self) -> None:
        """Wait until the disk has everything and give the directory its name."""
        for path in sorted(self.path.rglob("*"), reverse=True):
            sync(path)
        sync(self.path)
        refuse_existing(self.target)  # made by somebody else in the hours between
        self.path.rename(self.target)
        (self.target / _JOURNAL).unlink()
        sync(self.target.parent)


@contextmanager
def open_partial(target: Path, fingerprint: str, sizes: Mapping[str, int], other: int) -> Iterator[PartialDirectory]:
    """Begin or go on with ``target``, of which ``sizes`` lists the journaled files' bytes and ``other`` the rest's.

    ``fingerprint`` says what is written; an unfinished directory of something else is refused. Raises
    :class:`ConfigurationError` for that, for a target that exists, for another process at work on it
    (:class:`BusyError`), for files of other origin in ``<target>.partial`` and for a disk with less room than is
    needed, before anything is written;
    :class:`DiskFullError` when it runs full on the way.
    """
    refuse_existing(target)
    path = partial_path(target)
    if path.exists() and not (path / _JOURNAL).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigurationError(
            f"{path}: is in the way and no unfinished conversion; move it elsewhere, or name another target"
        )
    room = next(p for p in (path, *path.parents) if p.is_dir())
    if not path.is_dir():
        _check_room(target, room, sum(sizes.values()) + other)
    path.mkdir(parents=True, exist_ok=True)
    journal = os.open(path / _JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{path}: another process is writing it; wait for that one") from None
        refuse_existing(target)  # by a process that held the lock until now
        done = _read_journal(path, fingerprint, journal)
        for file in [p for p in path.rglob("*") if p.is_file()]:  # begun and not finished: its room is needed again
            if file.relative_to(path).as_posix() not in {_JOURNAL, *done}:
                file.unlink()
        _check_room(target, path, sum(size for name, size in sizes.items() if name not in done) + other)
        partial = PartialDirectory(target, done, journal)
        try:
            yield partial
        except OSError as error:
            if error.errno not in _FULL:
                raise
            left = sum(size for name, size in sizes.items() if name not in partial.done) + other
            raise DiskFullError(
                error.errno,
                f"{target}: the disk is full ({error.strerror}): {shutil.disk_usage(path).free:,} bytes are free,"
                f" {left:,} bytes are still to be written; what is whole is kept in {path}: make room and start the"
                " same command again, or remove that directory",
            ) from error
    finally:
        os.close(journal)


def partial_path(target: Path) -> Path:
    """Where ``target`` is written before it is whole."""
    return target.with_name(f"{target.name}.partial")


def refuse_existing(target: Path) -> None:
    """Raise :class:`ConfigurationError` unless a new directory can be given the name ``target``."""
    if target.name in ("", "..") or target.is_symlink():
        what = "is a link" if target.is_symlink() else "has no name of its own"
        raise ConfigurationError(f"{target}: {what}, so no finished directory can take its place; name a new directory")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigurationError(f"{target}: exists already and is not overwritten; name another or remove it first")


def _check_room(target: Path, where: Path, needed: int) -> None:
    free = shutil.disk_usage(where).free
    if needed > free:
        raise ConfigurationError(
            f"{target}: {needed:,} bytes are to be written and {free:,} are free there; make room or name another disk"
        )


def _read_journal(path: Path, fingerprint: str, journal: int) -> dict[str, dict[str, Any]]:
    """Finished files by name; a line that a crash cut off, and files that are not as noted, do not count."""
    lines = (path / _JOURNAL).read_bytes().split(b"\n")[:-1]
    if not lines:
        os.ftruncate(journal, 0)
        os.write(journal, json.dumps({"fingerprint": fingerprint}).encode() + b"\n")
        os.fsync(journal)
        sync(path)
        return {}
    try:
        first, *entries = (dict(json.loads(line)) for line in lines)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{path / _JOURNAL}: damaged: {error}; remove {path} and start again") from None
    if first.get("fingerprint") != fingerprint:
        raise ConfigurationError(
            f"{path}: holds an unfinished conversion of something else or with other options; remove it, or start that"
            " command again"
        )
    os.ftruncate(journal, sum(len(line) + 1 for line in lines))
    return {e["file"]: e for e in entries if _size(path / e["file"]) == e["size"]}


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
