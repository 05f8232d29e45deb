"""Someone who computes what a case times: a peer, or another way of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Peer:
    """Someone else's way to do what a case times."""

    name: str
    run: Callable[[Any], Any]  # takes the case's Problem; forward and backward
    source: str  # where the code or the formula is from
    needs: tuple[str, ...] = ()  # modules that must import
    devices: tuple[str, ...] = ("cuda", "cpu")
    forward_run: Callable[[Any], Any] | None = None  # forward alone
    needs_on_cuda: tuple[str, ...] = ()

    def forward(self) -> Peer:
        """The same peer with its forward alone."""
        assert self.forward_run is not None
        return replace(self, run=self.forward_run, forward_run=None)

    def missing(self, device: str) -> str | None:
        """Why it cannot be run here, or None."""
        for module in self.needs + (self.needs_on_cuda if device == "cuda" else ()):
            try:
                importlib.import_module(module)
            except (ImportError, OSError, RuntimeError, AttributeError) as error:  # what CUDA packages raise without it
                return f"{module}: {error}".splitlines()[0]
        return None
