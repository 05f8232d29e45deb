"""Ends the process when a piece of work does not return; by the monotonic clock, which nobody sets."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_mopd import failures


class Hung(RuntimeError):
    """Work that did not return in its time."""


@contextmanager
def watched(seconds: float, message: str) -> Iterator[None]:
    """The block, unless it takes longer than ``seconds``: then where every thread stands goes to standard error, with
    ``message`` after it, and the process ends with status 1 whatever the block is in; torchrun ends its peers."""
    done = threading.Event()
    threading.Thread(target=_wait, args=(done, seconds, message), name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _wait(done: threading.Event, seconds: float, message: str) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if done.wait(left):
            return
    faulthandler.dump_traceback(2)
    try:
        raise Hung(message)  # torchrun is told of errors that were raised
    except Hung as error:
        os.write(2, f"{failures.line(error)}\n".encode())
    os._exit(1)
