"""How a run of several processes fails: the user reads the message of the rank that failed first, and no rank stays.

torchrun ends all processes once one has ended with an error, and its summary gives the message that the first of them
left in ``TORCHELASTIC_ERROR_FILE``. So a rank that fails says why and ends; its peers, whose collectives then break, do
not speak over it.
"""

from __future__ import annotations

import os
import time
from typing import NoReturn

from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

GRACE = 2.0
"""Seconds that other ranks leave the first one to speak, where all fail alike."""
PEERS = 60.0
"""Seconds until a rank that lost its peers fails too, should nobody end it (torchrun ends those of its machine)."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


def line(error: BaseException) -> str:
    """The error as the user reads it, with the rank where there are several; left for torchrun too."""
    get_error_handler().record_exception(error)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"error on rank {_rank()}: {error}" if several else f"error: {error}"


def end(error: BaseException) -> NoReturn:
    """End this process over an error that a user can act on."""
    if _rank() > 0:
        time.sleep(GRACE)
    raise SystemExit(line(error)) from None


def wait_if_peers_are_lost(error: RuntimeError) -> None:
    """Where ``error`` is a collective that broke because another process ended, wait for the end that it brings."""
    if isinstance(error, DistError) or any(text in str(error) for text in _LOST):
        time.sleep(PEERS)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
