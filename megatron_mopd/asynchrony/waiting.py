"""How the ranks of one world wait together for another: the first looks, all get the same answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist

from megatron_mopd.asynchrony.signs import Beacon, Watch, WorldError
from megatron_mopd.config import ConfigurationError
from megatron_mopd.parallel import Groups

PAUSE = 0.01
"""Seconds between two looks."""
CHECK = 0.25
"""Seconds between two looks at the other worlds' signs of life."""
ROUND = 10.0
"""Seconds after which the first rank tells the others that there is nothing yet, long before a collective gives up."""


def awaited[T](groups: Groups, look: Callable[[], T | None], watches: Sequence[Watch], pause: float = PAUSE) -> T:
    """What ``look`` finds on the first rank, on all; every rank calls it. It looks every ``pause`` seconds.

    Raises :class:`WorldError` on all ranks when ``look`` does or one of ``watches`` does.
    """
    for watch in watches:
        watch.begin()
    while True:
        answer: list[Any] = [None, None]
        if groups.rank == 0:
            answer = _look(look, watches, pause)
        dist.broadcast_object_list(answer, src=0, group=groups.world)
        found, problem = answer
        if problem is not None:
            raise WorldError(problem)
        if found is not None:
            return found


def _look(look: Callable[[], Any], watches: Sequence[Watch], pause: float) -> list[Any]:
    start = time.monotonic()
    checked = start - CHECK
    try:
        while (now := time.monotonic()) - start < ROUND:
            if (found := look()) is not None:
                return [found, None]
            if now - checked >= CHECK:
                checked = now
                for watch in watches:
                    watch.check()
            time.sleep(pause)
    except (WorldError, ConfigurationError, OSError) as error:  # all ranks must leave the wait together
        return [None, str(error)]
    return [None, None]


def on_first[T](groups: Groups, action: Callable[[], T]) -> T:
    """What ``action`` returns on the first rank, on all; an error of it is raised on all as a :class:`WorldError`."""
    answer: list[Any] = [None, None]
    if groups.rank == 0:
        try:
            answer[0] = action()
        except (WorldError, ConfigurationError, OSError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, group=groups.world)
    if answer[1] is not None:
        raise WorldError(answer[1])
    return answer[0]


@contextmanager
def alive(groups: Groups, beacon: Beacon) -> Iterator[None]:
    """A block in which this world gives signs of life; all ranks enter it, and all learn where none can be given."""
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(beacon)

        on_first(groups, begin)
        yield
