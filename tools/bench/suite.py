"""What a suite of the kernel benchmark is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench.peer import Peer
from bench.problem import Problem

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row a shape. The limit is ``share`` times what the yardstick takes in the same run."""

    name: str
    what: str
    problem: type[Problem]
    ours: Callable[[Any], Any]
    shapes: tuple[Any, ...]  # dataclasses of sizes, which can be printed and made `shorter`
    yardstick: Peer
    share: float
    peers: tuple[Peer, ...]
    cpu_shape: Any = None
    cpu_dtype: torch.dtype = torch.float32
    kept: float = 1.0
    same_as: Callable[[Any], Any] | None = None  # what `ours` comes down to, where it has no reference form

    def reference(self, problem: Problem) -> Any:
        """The reference form's results, where ``problem.impl`` asks for it."""
        return (self.same_as or self.ours)(problem)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Cases that are measured together."""

    tests: tuple[str, ...]  # patterns of the files that gate it
    cases: tuple[Case, ...]
    tolerance: float  # of our error, in the unit of the cases' values
    wrong_on_device: Callable[[torch.device], str | None]  # how the kernels differ there from the truth
    after: Callable[[Sequence[Row], torch.device], Iterator[Row]]  # rows that are not timed
    untimed: dict[str, str | None] = field(default_factory=dict)  # their names, and the case they need, if any

    @property
    def names(self) -> list[str]:
        return [*(case.name for case in self.cases), *self.untimed]
