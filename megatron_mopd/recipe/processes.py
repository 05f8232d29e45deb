"""The programs that a recipe's command starts on its machine: its training, and worlds beside it that end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

import torch

from megatron_mopd import display
from megatron_mopd.recipe.words import Command

PAUSE = 0.1
"""Seconds between two looks at the programs."""
PATIENCE = 10.0
"""Seconds that the training has to say itself why it ends, once a world beside it has failed."""
GRACE = 60.0
"""Seconds that worlds have to end by themselves after a training that came to its end, and all after a signal."""

LAST_WORDS = 2.0
"""Seconds for what a world said before it ended; its output stays open where a process of it outlives torchrun."""

_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of linux/prctl.h."""


def run(training: Command, beside: Mapping[str, Command]) -> int:
    """Run ``training`` in the foreground and worlds ``beside`` it, by name; the status of the first that failed, or 0.

    Lines of a world begin with its name. What fails ends all others; a training that comes to its end ends its worlds.
    Signals that end this process end the programs first, as torchrun sees fit; of one that it cannot answer, SIGKILL,
    Linux tells worlds and the training beside them.
    """
    children: list[subprocess.Popen[bytes]] = []
    with _passed_on(children) as told:
        try:
            main, worlds = _start(training, children, tied=bool(beside)), {}
            for name, command in beside.items():
                if not told:
                    worlds[name] = _start(command, children, tied=True, piped=True)
            if told:  # while they were started, when it missed some of them
                return -told[0]
            return _finished(main, worlds, told)
        finally:
            for child in children:
                _end(child)


def _finished(main: subprocess.Popen[bytes], worlds: Mapping[str, subprocess.Popen[bytes]], told: Sequence[int]) -> int:
    """The status of all once the training and its worlds have ended and what these said is passed on."""
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


def _start(
    command: Command, children: list[subprocess.Popen[bytes]], tied: bool, piped: bool = False
) -> subprocess.Popen[bytes]:
    """One more of ``children``; a ``tied`` one is ended by the kernel when this process is gone without a word."""
    environment = dict(os.environ)
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # mcore's order of communication before computation
    if not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", "1")
    environment |= command.environment
    out, err = (subprocess.PIPE, subprocess.STDOUT) if piped else (None, None)
    before = _tie(os.getpid()) if tied and sys.platform == "linux" else None
    children.append(subprocess.Popen(command.words, env=environment, stdout=out, stderr=err, preexec_fn=before))
    return children[-1]


def _tie(starter: int) -> Callable[[], None]:
    """What a child does before its program begins, so that it gets SIGTERM when ``starter`` is killed.

    Worlds wait without limit for a stage to begin, and would do the work of those that the same command starts next.
    """
    libc = ctypes.CDLL(None)

    def tie() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until then it has this process's handlers
        libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != starter:  # gone before that was set
            os.kill(os.getpid(), signal.SIGTERM)

    return tie


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
