"""Long work that one rank, or one per machine, does for all: the others wait for as long as it takes and fail with it.

A collective would give up after the process group's timeout, which a conversion of a large checkpoint outlasts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion.partial_directory import DiskFullError
from megatron_mopd.files import WriteError
from megatron_mopd.parallel import Groups

PERIOD = 0.5
"""Seconds between looks at how far the work is, at most."""

Report = Callable[[int, int], Any]


class _Interrupted(Exception):
    """The waiting part of this process is gone."""


def work(groups: Groups, mine: bool, action: Callable[[Report], Any], show: Report = lambda done, total: None) -> None:
    """Run ``action(report)`` on the ranks with ``mine``; return on all when all are done.

    ``action`` passes on how far it is; ``show`` is called with that on the same rank, in its main thread. When one
    fails, all raise :class:`ConfigurationError` with its message, and its rank unless that is the first.
    """
    progress: list[tuple[int, int]] = []
    outcome: list[str | None] = []
    stop = threading.Event()

    def report(done: int, total: int) -> None:
        if stop.is_set():
            raise _Interrupted
        progress[:] = [(done, total)]

    def run() -> None:
        try:
            action(report)
            outcome.append(None)
        except _Interrupted:
            outcome.append(None)
        except (ConfigurationError, WriteError) as error:
            outcome.append(str(error))
        except DiskFullError as error:
            outcome.append(str(error.strerror))
        except OSError as error:
            outcome.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, daemon=True) if mine else None
    if thread is not None:
        thread.start()
    pause = 0.01
    try:
        while True:
            alive = thread is not None and thread.is_alive()
            if progress:
                show(*progress[0])
            problem = None
            if thread is not None and not alive:
                problem = outcome[0] if outcome else f"rank {groups.rank} failed; its traceback is on standard error"
            states: list[Any] = [None] * groups.world_size
            dist.all_gather_object(states, (alive, problem), group=groups.world)
            if failed := [(rank, text) for rank, (_, text) in enumerate(states) if text is not None]:
                rank, text = failed[0]
                raise ConfigurationError(f"rank {rank}: {text}" if rank else text)
            if not any(working for working, _ in states):
                return
            time.sleep(pause)
            pause = min(2 * pause, PERIOD)
    finally:
        stop.set()
