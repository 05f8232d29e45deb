"""The writing part of a conversion: files side by side, every tensor hashed and looked through for NaN on the way.

Memory holds one buffer of ``weights.BLOCK`` bytes (1 MiB) for each file being written, of which there are at most two
a core and never more than ``WORKERS``, and as much again where a layout cut a tensor along inner axes; beside them the
names and places of all tensors, some 2 KB each. The size of tensors does not matter.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any, BinaryIO

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import plans, safetensors_file, torch_dist_writer
from megatron_mopd.conversion import weights as views
from megatron_mopd.conversion.partial_directory import PartialDirectory, open_partial
from megatron_mopd.conversion.plans import Item, Shard
from megatron_mopd.conversion.weights import BLOCK, Companion, Weights

logger = logging.getLogger(__name__)

WORKERS = 16
"""Files written at a time, at most: two a core, so that one is hashed while another waits for the disk."""
_OTHER_FILES = 2**20  # bytes of metadata, per thousand tensors

Report = Callable[[int, int], Any]
"""Called with the bytes written so far and the bytes to write in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was converted."""

    path: Path  # the directory written
    checkpoint_id: str
    tensors: int
    size: int  # bytes of weights
    resumed: int  # bytes that an earlier, interrupted command had written
    nan: tuple[str, ...] = ()  # tensors with NaN, let through on request
    skipped: Mapping[str, int] = field(default_factory=dict)  # optimizer tensors and objects of a Megatron directory


class Job:
    """The files of a plan, written side by side, each tensor hashed and looked through for NaN on the way.

    ``write`` writes one of them and returns what is to be remembered of each of its items, plain numbers; it is found
    again under ``places`` in ``PartialDirectory.done``, also after an interruption.
    """

    def __init__(
        self,
        weights: Weights,
        plan: Sequence[Shard],
        write: Callable[[Job, BinaryIO, Shard, Hashes], Sequence[Sequence[float]]],
        allow_nan: bool,
        report: Report | None,
    ) -> None:
        self.weights, self.plan, self._write = weights, plan, write
        self._allow_nan, self._report = allow_nan, report or (lambda done, total: None)
        self._stop, self._lock = Event(), Lock()
        self._written = 0
        self._total = sum(item.entry.size for shard in plan for item in shard.items)

    def run(
        self,
        target: Path,
        finish: Callable[[PartialDirectory, str], None],
        companion: Companion,
        skipped: Mapping[str, int] | None = None,
    ) -> Conversion:
        """Write every file that an earlier, interrupted run has not, then let ``finish`` add the rest, then publish."""
        files = companion.files
        sizes = {shard.file: shard.size for shard in self.plan}
        other = sum(file.stat().st_size for file in files.values())
        other += _OTHER_FILES * (1 + sum(len(shard.items) for shard in self.plan) // 1000)
        mark = plans.fingerprint(self.plan, [*self.weights.files, *files.values()], companion.config)
        with open_partial(target, mark, sizes, other) as partial:
            todo = [shard for shard in self.plan if shard.file not in partial.done]
            resumed = self._total - sum(item.entry.size for shard in todo for item in shard.items)
            self._advance(resumed)
            self._convert(todo, partial)
            records = [partial.done[shard.file] for shard in self.plan]
            nan = sorted(name for record in records for name in record["nan"])
            self._refuse(nan)
            digests = {name: sha for record in records for name, sha in record["sha256"].items()}
            checkpoint_id = views.identify(self.weights, digests)
            finish(partial, checkpoint_id)
            partial.publish()
        return Conversion(
            path=target,
            checkpoint_id=checkpoint_id,
            tensors=len(self.weights.entries),
            size=self._total,
            resumed=resumed,
            nan=tuple(nan),
            skipped=skipped or {},
        )

    def _convert(self, todo: Sequence[Shard], partial: PartialDirectory) -> None:
        workers = max(1, min(len(todo), 2 * (os.cpu_count() or 1), WORKERS))
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._convert_one, shard, partial) for shard in todo]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()  # after a failure the others end at their next block
                pool.shutdown(cancel_futures=True)
        failures = [error for future in futures if not future.cancelled() and (error := future.exception())]
        for error in sorted(failures, key=lambda e: isinstance(e, Stopped)):
            raise error

    def _convert_one(self, shard: Shard, partial: PartialDirectory) -> None:
        hashes = Hashes(self.weights)
        (partial.path / shard.file).parent.mkdir(exist_ok=True)
        with open(partial.path / shard.file, "wb") as file:
            places = self._write(self, file, shard, hashes)
        if not self._allow_nan:
            self._refuse(sorted(hashes.nan))
        record = {"sha256": hashes.finish(), "nan": sorted(hashes.nan), "places": places}
        partial.finished(shard.file, record)

    def copy(self, item: Item, write: Callable[[memoryview], Any], hashes: Hashes, buffer: memoryview) -> None:
        """Pass the elements of ``item`` on."""
        for part in item.parts:
            start = part.start
            for content in views.blocks(self.weights, part.source, part.start, part.count, buffer):
                if self._stop.is_set():
                    raise Stopped
                hashes.update(part.source, start, content)
                write(content)
                start += len(content) // item.entry.dtype.itemsize
                self._advance(len(content))

    def _advance(self, count: int) -> None:
        with self._lock:
            self._written += count
            self._report(self._written, self._total)

    def _refuse(self, nan: Sequence[str]) -> None:
        if not nan:
            return
        listed = f"{', '.join(nan[:20])}{f' and {len(nan) - 20} more' if len(nan) > 20 else ''}"
        if not self._allow_nan:
            raise ConfigurationError(
                f"{self.weights.path}: NaN in {listed}; a model with these weights computes nothing else. Take the"
                " checkpoint from its source again, or convert it as it is with --allow-nan"
            )
        logger.warning("%s: NaN in %s", self.weights.path, listed)


class Stopped(Exception):
    """Another file of the same conversion failed."""


class Hashes:
    """sha256 of every tensor of the source's view that one file takes in, whole, each front to back."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._open: dict[str, Any] = {}
        self._ends: dict[str, int] = {}
        self._digests: dict[str, str] = {}
        self.nan: set[str] = set()

    def update(self, name: str, start: int, content: memoryview) -> None:
        entry = self._weights.entries[name]
        assert start == self._ends.get(name, 0), f"{name}: read out of order"
        self._open.setdefault(name, hashlib.sha256()).update(content)
        self._ends[name] = start + len(content) // entry.dtype.itemsize
        if name not in self.nan and views.has_nan(content, entry.dtype):
            self.nan.add(name)
        if self._ends[name] == entry.elements:
            self._digests[name] = self._open.pop(name).hexdigest()

    def finish(self) -> dict[str, str]:
        assert not self._open, f"{next(iter(self._open))}: not read to its end"
        return self._digests


def write_chunk(job: Job, file: BinaryIO, shard: Shard, hashes: Hashes) -> list[list[int]]:
    """The chunks of a ``.distcp`` file; returns where each begins and how long it is, in bytes."""
    buffer, places = _buffer(shard), []
    for item in shard.items:
        start = file.tell()
        with torch_dist_writer.chunk(file, item.entry.shape, item.entry.dtype) as write:
            job.copy(item, write, hashes, buffer)
        places.append([start, file.tell() - start])
    return places


def write_tensor(job: Job, file: BinaryIO, shard: Shard, hashes: Hashes) -> list[list[int]]:
    """A safetensors file, which says itself where everything lies."""
    buffer = _buffer(shard)
    file.write(safetensors_file.header([(item.name, item.entry) for item in shard.items]))
    for item in shard.items:
        job.copy(item, file.write, hashes, buffer)
    return []


def _buffer(shard: Shard) -> memoryview:
    return memoryview(bytearray(min(BLOCK, max(item.entry.size for item in shard.items))))
