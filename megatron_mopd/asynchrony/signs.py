"""Signs of life between worlds: what each is at, told by counters in a file, so that no two clocks are compared.

A world's first rank counts up in ``NAME.json`` every second from a thread, and once more for each new piece of work.
Who waits for it measures by a clock of its own that never jumps how long the counters stand still.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_mopd.config import Asynchrony

log = logging.getLogger(__name__)

PERIOD = 1.0
"""Seconds between two beats of a world that lives."""
FINISHED = "finished"


class WorldError(RuntimeError):
    """Another world is gone, or what it left is not what it should be; names it and the way out."""


def unwritable(path: Path, error: OSError) -> WorldError:
    """The error about a file that worlds need to find each other."""
    return WorldError(
        f"{path}: could not be written: {error.strerror or error}; other worlds find this one by it. Make room, or set"
        " asynchrony.directory for all worlds to a place that can be written, and start the same command again"
    )


class Beacon:
    """Says that a world lives and what it is at; a context manager around all it does.

    Where one such block stands in another, signs begin with the outer and end with the inner one.
    """

    def __init__(self, directory: Path, name: str, enabled: bool) -> None:
        self.name, self.path, self.enabled = name, directory / f"{name}.json", enabled
        self.life, self._beats, self._works, self._doing = uuid.uuid4().hex, 0, 0, "starting"
        self._ended: str | None = None
        self._begun = False
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"signs of {name}", daemon=True)

    def doing(self, what: str) -> None:
        """A new piece of work begins."""
        self._works += 1
        self._doing = what
        self._write()

    def __enter__(self) -> Self:
        """Raises :class:`WorldError` where no sign can be left."""
        if self._begun or not self.enabled:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._leave()
        except OSError as error:
            raise unwritable(self.path, error) from None
        self._begun = True
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ended is not None:
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._ended = FINISHED if kind is None else f"{kind.__name__}: {error}"
        self._write()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD):
            self._beats += 1
            self._write()

    def _write(self) -> None:
        if not self.enabled:
            return
        try:
            self._leave()
        except OSError as error:  # a full disk: a beat is missed, and the work itself says what it could not write
            log.warning("%s: no sign of life could be left: %s", self.path, error)

    def _leave(self) -> None:
        tree = {
            "world": self.name,
            "life": self.life,
            "beats": self._beats,
            "works": self._works,
            "doing": self._doing,
            "ended": self._ended,
            "process": os.getpid(),
        }
        with self._lock:  # the thread and the work write the same temporary file
            temporary = self.path.with_name(f".{self.path.name}.{self.life}")
            temporary.write_text(json.dumps(tree))
            temporary.replace(self.path)


class Watch:
    """One world as another sees it."""

    def __init__(self, directory: Path, name: str, settings: Asynchrony) -> None:
        self.name, self.path, self.settings = name, directory / f"{name}.json", settings
        self._seen: dict[str, Any] = {}
        self._first = self._seen = self._read()
        # What had ended before this watch began is of the past: the world may be about to start again.
        self._past = self._seen.get("life") if self._seen.get("ended") else None
        self._beat_at = self._work_at = time.monotonic()

    def begin(self) -> None:
        """A wait begins, and patience with it."""
        self._beat_at = self._work_at = time.monotonic()

    def check(self) -> None:
        """Raise :class:`WorldError` when the world has ended by an error, is silent or stands still for too long."""
        now, found = time.monotonic(), self._read()
        if _count(found, "beats") != _count(self._seen, "beats"):
            self._beat_at = now
        if _count(found, "works") != _count(self._seen, "works"):
            self._beat_at = self._work_at = now
        self._seen = found
        ended = found.get("ended")
        if ended and ended != FINISHED and found["life"] != self._past:
            raise WorldError(f"the {self.name} world has ended while it was {found['doing']}: {ended}. {self._way_out}")
        if now - self._beat_at > self.settings.silence_s:
            raise WorldError(
                f"the {self.name} world {self._last_did(found)} and has given no sign of life for"
                f" {now - self._beat_at:.0f} s (asynchrony.silence_s = {self.settings.silence_s:g}). {self._way_out}"
            )
        if now - self._work_at > self.settings.standstill_s:
            raise WorldError(
                f"the {self.name} world lives, but has been {found['doing']} for {now - self._work_at:.0f} s"
                f" (asynchrony.standstill_s = {self.settings.standstill_s:g}): it hangs, or the limit is too low for"
                f" this piece of work. {self._way_out}"
            )

    @property
    def stirs(self) -> bool:
        """Whether the world has given a sign since this watch began and has not ended: a file alone may be old."""
        found = self._read()
        moved = any(_count(found, what) != _count(self._first, what) for what in ("beats", "works"))
        return moved and not found.get("ended")

    @property
    def life(self) -> str | None:
        """The life of the world that is at work, as far as its file says."""
        found = self._read()
        return None if found.get("ended") else found.get("life")

    @property
    def finished(self) -> bool:
        """Whether the world came to its end as it should, since this watch began."""
        found = self._read()
        return found.get("ended") == FINISHED and found["life"] != self._past

    @property
    def _way_out(self) -> str:
        return (
            "Look at its output, then start the same command again (where worlds are started by hand: it, then this"
            f" one); signs of life are in {self.path}"
        )

    @staticmethod
    def _last_did(found: dict[str, Any]) -> str:
        if not found:
            return "was never started"
        return f"(process {found['process']}) was last {found['doing']}" + (
            f", ended ({found['ended']})" if found["ended"] else ""
        )

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s: cannot be read: %s", self.path, error)
            return self._seen


def _count(found: dict[str, Any], what: str) -> tuple[Any, Any]:
    return found.get("life"), found.get(what)
