"""A checkpoint's weights under Hugging Face's names, whichever kind of directory holds them.

``hugging_face.HuggingFaceWeights`` and ``megatron_weights.MegatronWeights`` give the same view: names with the prefix
``backbone.``, experts one by one, QKV as q, k and v, no vocabulary padding, a tied head named beside the embedding.
Elements are read as runs of bytes, so memory stays at the size of the caller's buffer.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron_mopd.config import ConfigurationError
from megatron_mopd.identity import Digest, combine

BLOCK = 2**20
"""Bytes read at a time: few enough that what is done with them next finds them in a core's cache."""
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Dtypes of weights that can be converted, with safetensors' names of them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the view."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Companion:
    """What a Hugging Face directory holds and spells beside its tensors' values."""

    config: dict[str, Any]
    prefix: str = "backbone."  # or "model."
    fused: tuple[str, ...] = ()  # names of expert stacks kept in one tensor, with the prefix backbone.
    tied: bool = False  # no output weight is stored
    blocks: int | None = None  # stored MTP blocks; None: as the configuration says
    files: Mapping[str, Path] = field(default_factory=dict)  # tokenizer, chat template and the like, by relative name


class Problems:
    """Everything that is wrong with a checkpoint's tensors, gathered so that one error can list it all."""

    LIMIT = 20  # names per kind in the message

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, list[str]] = {}
        self.excused: set[str] = set()  # names whose absence another problem explains

    def add(self, kind: str, *items: str) -> None:
        if items:
            self.found.setdefault(kind, []).extend(items)

    def check(self, way_out: str) -> None:
        """Raise :class:`ConfigurationError` when anything was added."""
        if not self.found:
            return
        count = sum(map(len, self.found.values()))
        lines = [f"{self.path}: {count} problem{'s' if count > 1 else ''}, nothing was written"]
        for kind, items in self.found.items():
            shown = sorted(items, key=natural)[: self.LIMIT]
            more = f" and {len(items) - self.LIMIT} more" if len(items) > self.LIMIT else ""
            lines.append(f"  {kind} ({len(items)}): {', '.join(shown)}{more}")
        raise ConfigurationError("\n".join([*lines, f"  {way_out}"]))


class Weights(Protocol):
    """The view; close it after use."""

    @property
    def path(self) -> Path: ...

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    @property
    def problems(self) -> Problems: ...

    @property
    def aliases(self) -> Mapping[str, str]: ...  # entry -> the entry whose elements it shares

    @property
    def files(self) -> list[Path]: ...  # that hold the tensors

    def read(self, name: str, start: int, into: memoryview) -> None:
        """Fill ``into`` with the elements of ``name`` from number ``start`` on, row-major."""
        ...

    def close(self) -> None: ...


def blocks(weights: Weights, name: str, start: int, count: int, buffer: memoryview) -> Iterator[memoryview]:
    """``count`` elements of ``name`` from number ``start`` on, as bytes, a buffer's worth at a time."""
    size = weights.entries[name].dtype.itemsize
    step = len(buffer) // size
    for position in range(start, start + count, step):
        part = buffer[: min(step, start + count - position) * size]
        weights.read(name, position, part)
        yield part


def digest(weights: Weights, name: str, buffer: memoryview) -> Digest:
    """The line of ``name`` in the checkpoint's identity."""
    entry, content = weights.entries[name], hashlib.sha256()
    for part in blocks(weights, name, 0, entry.elements, buffer):
        content.update(part)
    return line(name, entry, content.hexdigest())


def equal(a: Weights, name: str, b: Weights, other: str) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes."""
    count, size = a.entries[name].elements, min(BLOCK, a.entries[name].size)
    one, two = memoryview(bytearray(size)), memoryview(bytearray(size))
    return all(x == y for x, y in zip(blocks(a, name, 0, count, one), blocks(b, other, 0, count, two), strict=True))


def line(name: str, entry: Entry, sha256: str) -> Digest:
    return Digest(name, str(entry.dtype).removeprefix("torch."), entry.shape, sha256)


def identify(weights: Weights, digests: Mapping[str, str]) -> str:
    """The checkpoint_id from the sha256 of every tensor that shares its elements with no other."""
    return combine(line(n, e, digests[weights.aliases.get(n, n)]) for n, e in weights.entries.items())


def has_nan(content: memoryview, dtype: torch.dtype) -> bool:
    """Whether a run of elements has a NaN, found at memory speed.

    A NaN's bits, read as an integer, lie above those of the infinity of its sign; numpy's maximum of wider types is NaN
    where one element is. numpy, because torch would take threads for it that are busy hashing.
    """
    if dtype.itemsize > 2:
        return bool(np.isnan(np.frombuffer(content, np.float32 if dtype == torch.float32 else np.float64).max()))
    infinity = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
    positive, negative = np.frombuffer(content, np.int16), np.frombuffer(content, np.uint16)
    return bool(positive.max() > infinity or negative.max() > infinity + 0x8000)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that counts numbers in names: layer 2 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]
