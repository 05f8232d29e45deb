"""Where a training step gets its batch from: drawn and scored on the spot, or on its way from elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from megatron_mopd.in_flight import Item
from megatron_mopd.records import Policy, Rollout
from megatron_mopd.sources import DatasetSource, RolloutSource


class Feed(Protocol):
    """Hands out this data-parallel rank's share of one batch a step; every rank has one and calls it alike.

    A context manager: what runs beside the training ends with the block, and is told of the error that ended it.
    """

    in_flight: deque[list[Item]]
    """Batches that are here and wait for their step, the next one first."""

    def take(self, policy: Policy) -> list[Item]:
        """The batch of the step that ``policy``, which is the current weights, is about to make."""
        ...

    def settle(self, policy: Policy) -> None:
        """Bring into ``in_flight`` what a checkpoint of ``policy`` must hold, and the source's state behind it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class InlineFeed:
    """Draws and scores before each update, with ``lag`` batches in flight: batch n is of policy max(0, n - lag)."""

    def __init__(
        self,
        source: DatasetSource | RolloutSource,
        score: Callable[[list[Rollout]], Sequence[Item]],
        lag: int,
    ) -> None:
        self.source, self.score, self.lag = source, score, lag
        self.in_flight: deque[list[Item]] = deque()

    def take(self, policy: Policy) -> list[Item]:
        while len(self.in_flight) <= self.lag:
            self.in_flight.append(list(self.score(self.source.draw(policy))))
        return self.in_flight.popleft()

    def settle(self, policy: Policy) -> None:
        """Nothing is on its way."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
