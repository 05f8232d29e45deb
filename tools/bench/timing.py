"""Interleaved timing of contenders on one problem, with each one's memory and error.

A round draws new inputs; then every contender runs once on the same inputs, in an order that turns by one each round,
so that what else the machine does meets all alike. Restoring the inputs that a contender wrote over is not timed. On
CUDA, events bracket the contender; before them the L2 cache is overwritten and the stream sleeps for a millisecond, in
which the host queues the contender's kernels, so that launch overhead counts only where a contender waits for the GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from bench.peers import Peer
from bench.problem import Problem

L2_BYTES = 256 << 20  # well above the 50 MiB of Hopper and the 126 MB of Blackwell
SLEEP_CYCLES = 2_000_000  # about a millisecond


@dataclass
class Measured:
    """What one contender did on one problem."""

    peer: Peer
    times: list[float] = field(default_factory=list)  # milliseconds, a round each
    workspace: int = 0  # bytes at the peak above inputs and above the gradients of hidden states and weight
    error: float | None = None  # largest of a sample against the truth; None where nothing can be compared
    failed: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)


class Clock:
    """Times one call on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(L2_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self, run: Callable[[], Any]) -> float:
        """Milliseconds."""
        if self.cache is None:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.cache.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end)


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> int:
    """Most bytes that ``run`` holds at a time in torch's tensors, above what is held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class Attempt:
    """Runs someone else's code, whose failure of any kind is a result to report, not ours to handle."""

    failed: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, Exception):
            self.failed = f"{type(error).__name__}: {error}".splitlines()[0]
        return self.failed is not None


def examine(peer: Peer, problem: Problem) -> Measured:
    """One run, not timed: warm-up, error against fp64, memory; a peer that cannot do it is marked failed."""
    values: list[Any] = []
    with Attempt() as attempt:
        problem.restore()
        peer.run(problem)  # compiles, tunes, and fills the caches of the allocator
        problem.restore()
        peak = peak_bytes(problem.device, lambda: values.append(peer.run(problem)))
        measured = Measured(peer, workspace=peak - problem.gradient_bytes())
        if values[0] is not None:
            measured.error = problem.error(values[0])
        return measured
    return Measured(peer, failed=attempt.failed)


def race(peers: list[Peer], problem: Problem, rounds: int, warmup: int, progress: Callable[[], None]) -> list[Measured]:
    """Every contender's measurement, in the order given; a failed one has no times, and if the first fails none has."""
    problem.redraw(seed=0)
    measured = [examine(peer, problem) for peer in peers]
    if measured[0].failed:
        return measured
    running = [m for m in measured if m.failed is None]
    clock = Clock(problem.device)
    for turn in range(warmup + rounds):
        problem.redraw(seed=1 + turn)
        shift = turn % len(running)
        for m in running[shift:] + running[:shift]:
            problem.restore()
            elapsed = clock(lambda peer=m.peer: peer.run(problem))
            if turn >= warmup:
                m.times.append(elapsed)
        progress()
    problem.restore()
    return measured
