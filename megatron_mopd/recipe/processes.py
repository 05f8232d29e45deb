"""The programs that a recipe's command starts on its machine: its training, and worlds beside it that end with it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

import torch

from megatron_mopd import display

PAUSE = 0.1
"""Seconds between two looks at the programs."""
PATIENCE = 10.0
"""Seconds that the training has to say itself why it ends, once a world beside it has failed."""
GRACE = 60.0
"""Seconds that worlds have to end by themselves after a training that came to its end, and all after a signal."""

LAST_WORDS = 2.0
"""Seconds for what a world said before it ended; its output stays open where a process of it outlives torchrun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A program to start."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # over that of this process

    @property
    def line(self) -> str:
        """As one would type it."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), shlex.join(self.words)])


def run(training: Command, beside: Mapping[str, Command]) -> int:
    """Run ``training`` in the foreground and worlds ``beside`` it, by name; the status of the first that failed, or 0.

    Lines of a world begin with its name. What fails ends all others; a training that comes to its end ends its worlds.
    Signals that end this process end the programs first, as torchrun sees fit.
    """
    children: list[subprocess.Popen[bytes]] = []
    with _passed_on(children) as told:
        children.append(main := _start(training))
        worlds = {name: _start(command, piped=True) for name, command in beside.items()}
        children += worlds.values()
        said = [threading.Thread(target=_say, args=(name, world.stdout), daemon=True) for name, world in worlds.items()]
        for thread in said:
            thread.start()
        status = _watched(main, worlds, told) if worlds else main.wait()
        for world in worlds.values():
            if status == 0 and not told:
                _ended_within(world, GRACE)
            _end(world)
        for thread in said:
            thread.join(LAST_WORDS)
    return status


def _watched(main: subprocess.Popen[bytes], worlds: Mapping[str, subprocess.Popen[bytes]], told: Sequence[int]) -> int:
    """Wait for the training; end it when a world has failed, by which it would only notice after a long silence."""
    while main.poll() is None:
        time.sleep(PAUSE)
        failed = [name for name, world in worlds.items() if world.poll()]
        if told or not failed or _ended_within(main, PATIENCE):
            continue
        display.note(
            0, f"the {failed[0]} world ended with status {worlds[failed[0]].returncode}, so the training is ended too"
        )
        _end(main)
        return worlds[failed[0]].returncode
    return main.returncode


def _start(command: Command, piped: bool = False) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # mcore's order of communication before computation
    if not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", "1")
    environment |= command.environment
    out, err = (subprocess.PIPE, subprocess.STDOUT) if piped else (None, None)
    return subprocess.Popen(command.words, env=environment, stdout=out, stderr=err)


def _say(name: str, stream: IO[bytes] | None) -> None:
    """Pass on what a world says, line by line with its name."""
    for line in stream or ():
        sys.stderr.write(f"{name}: {line.decode(errors='replace')}")
        sys.stderr.flush()


def _ended_within(child: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a torchrun with its processes, which it ends itself when asked; one that does not is killed."""
    if child.poll() is None:
        child.terminate()
        if not _ended_within(child, GRACE):
            child.kill()
            child.wait()


@contextmanager
def _passed_on(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """SIGTERM and SIGHUP reach ``children`` too; a terminal sends them Ctrl-C by itself. Yields the signals so far."""
    told: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for child in children:
            child.send_signal(number)

    def stay(number: int, frame: FrameType | None) -> None:
        """Wait for the programs, which have the signal already."""
        told.append(number)

    handlers = {signal.SIGTERM: pass_on, signal.SIGHUP: pass_on, signal.SIGINT: stay}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
