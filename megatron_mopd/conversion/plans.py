"""What a conversion will write, decided from headers and metadata alone: each tensor has a place, or none is written.

A plan lists the files to write and, for each, its tensors (or chunks of them) as runs of elements of the source's view.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_mopd import names
from megatron_mopd.conversion import hugging_face_config
from megatron_mopd.conversion.hugging_face import SINGLE, disk_tensors
from megatron_mopd.conversion.hugging_face_config import Architecture
from megatron_mopd.conversion.torch_dist_writer import CHUNK_OVERHEAD, LARGEST_CHUNK
from megatron_mopd.conversion.weights import EMBEDDING, FLOATS, HEAD, Companion, Entry, Weights
from megatron_mopd.names import Layout, Segment

MEGATRON_SHARD = 4 * 10**9
"""Bytes of a ``.distcp`` file, about, when no number of shards is asked for; see SMALL_SHARD for small checkpoints."""
SMALL_SHARD, SMALL_SHARDS = 256 * 10**6, 8
"""Bytes of a file, about, where MEGATRON_SHARD would make fewer than so many of them: one worker writes a file, and
several are to be busy. The cores have no say, so that another machine goes on with an interrupted conversion."""
HUGGING_FACE_SHARD = 5 * 10**9
"""Bytes of a ``.safetensors`` file, at most; a larger tensor has one of its own. The published checkpoints' size."""
MISSING, UNKNOWN = "missing", "unknown to config.json"
_MTP = re.compile(r"mtp\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor or a chunk of one, and the runs of the source's elements that it is made of."""

    name: str
    entry: Entry  # of this chunk
    parts: tuple[Segment, ...]
    offset: tuple[int, ...] = ()  # of this chunk in its tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write."""

    file: str
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Bytes, archives' and header's included, at most."""
        return sum(item.entry.size + CHUNK_OVERHEAD + 2 * len(item.name) for item in self.items)


def expected_layouts(
    weights: Weights, companion: Companion, origin: str, *, without_mtp: bool = False
) -> tuple[Architecture, dict[str, tuple[int, ...]], dict[str, Layout]]:
    """The model that ``companion`` describes, its Megatron shapes, and where each Hugging Face tensor lies in those.

    MTP depths may share one stored block or have one each; which of the two is seen from the tensors' names.
    """
    model = hugging_face_config.architecture(companion.config, origin)
    depths = model.blocks
    if without_mtp or companion.blocks == 0:
        model = model.stored(0)
    elif depths > 1:
        second = any(int(m[1]) >= len(model.mtp) for name in weights.entries if (m := _MTP.match(name)))
        model = model.stored(depths if second else 1)
    shapes = hugging_face_config.megatron_shapes(model)
    pieces, problems = names.find_pieces(shapes)
    assert not problems
    found = {p.name: names.layout(p, shapes, model.preset.num_query_groups, model.preset.vocab_size) for p in pieces}
    order = names.invert(found)  # Megatron's order: neighbours on one side are neighbours on the other
    ordered = dict.fromkeys(segment.source for name in shapes for segment in order[name])
    return model, shapes, {name: found[name] for name in ordered}


def check(weights: Weights, expected: Mapping[str, Layout], *, without_mtp: bool = False) -> None:
    """One error for every tensor that is missing, unknown or misshapen, beside the problems found when opening."""
    examine(weights, expected, without_mtp=without_mtp)
    found = weights.problems.found
    mtp = any(item.startswith("mtp.") for kind in (MISSING, UNKNOWN) for item in found.get(kind, ()))
    hint = " MTP tensors can be left out with --without-mtp." if mtp else ""
    weights.problems.check(f"The tensors and config.json must describe one model; take both from one source.{hint}")


def examine(weights: Weights, expected: Mapping[str, Layout], *, without_mtp: bool = False) -> None:
    """Add to the view's problems where its tensors are not those that are expected."""
    problems, entries = weights.problems, weights.entries
    missing = [name for name in expected if name not in entries and name not in problems.excused]
    unknown = [name for name in entries if name not in expected and not (without_mtp and name.startswith("mtp."))]
    problems.add(MISSING, *missing)
    problems.add(UNKNOWN, *unknown)
    for name, layout in expected.items():
        if name in entries and entries[name].shape != layout.shape:
            problems.add("of another shape", f"{name} {list(entries[name].shape)}, expected {list(layout.shape)}")
    odd = [f"{name} ({e.dtype})" for name, e in entries.items() if e.dtype not in FLOATS]
    problems.add("of a dtype that is not converted", *odd)


def megatron_shards(
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, Layout],
    shards: int | None,
) -> list[Shard]:
    """Files of Megatron tensors in chunks, cut where no tensor of the source is halved; call :func:`check` before."""
    inverse = names.invert(expected)
    items: list[Item] = []
    for name, shape in shapes.items():
        if weights.aliases.get(HEAD) == EMBEDDING and inverse[name][0].source == HEAD:
            continue  # written as a second name of the embedding's bytes
        dtypes = {weights.entries[part.source].dtype for part in inverse[name]}
        if len(dtypes) > 1:
            found = sorted({f"{p.source} ({weights.entries[p.source].dtype})" for p in inverse[name]})
            weights.problems.add("of different dtypes within one Megatron tensor", f"{name}: {', '.join(found[:4])}")
            continue
        items += _chunks(name, Entry(shape, dtypes.pop()), inverse[name])
    weights.problems.check("Save them in one dtype.")
    total = sum(item.entry.size for item in items)
    number = shards or max(-(-total // MEGATRON_SHARD), min(-(-total // SMALL_SHARD), SMALL_SHARDS), 1)
    cut = _cut(_units(items), number, total)
    return [Shard(f"__{i}_0.distcp", tuple(group)) for i, group in enumerate(cut)]


def _chunks(name: str, entry: Entry, parts: Sequence[Segment]) -> Iterator[Item]:
    """Rows up to the largest chunk at a time; experts one by one, as Megatron-LM keeps them."""
    row, ends = entry.elements // entry.shape[0], [*accumulate(part.count for part in parts)]
    step = max(1, LARGEST_CHUNK // (row * entry.dtype.itemsize))
    if len(entry.shape) == 3 and ".experts.experts." in name:
        step = 1
    for first in range(0, entry.shape[0], step):
        rows = min(step, entry.shape[0] - first)
        chunk = Entry((rows, *entry.shape[1:]), entry.dtype)
        offset = (first, *[0] * (len(entry.shape) - 1))
        yield Item(name, chunk, tuple(_within(parts, ends, first * row, rows * row)), offset)


def _within(parts: Sequence[Segment], ends: Sequence[int], start: int, count: int) -> Iterator[Segment]:
    """The runs of elements ``start`` to ``start + count`` of their concatenation, in which each ends at ``ends``."""
    for number in range(bisect.bisect_right(ends, start), bisect.bisect_left(ends, start + count) + 1):
        part, position = parts[number], ends[number] - parts[number].count
        first, last = max(start, position), min(start + count, ends[number])
        yield Segment(part.source, part.start + first - position, last - first)


def _units(items: Iterable[Item]) -> list[list[Item]]:
    """Items that must lie in one file, so that each tensor of the source is read, and hashed, front to back."""
    units: list[list[Item]] = []
    sources: set[str] = set()
    for item in items:
        mine = {part.source for part in item.parts}
        if units and sources & mine:
            units[-1].append(item)
            sources |= mine
        else:
            units.append([item])
            sources = mine
    return units


def _cut(units: Sequence[Sequence[Item]], number: int, total: int) -> list[list[Item]]:
    """Units in at most ``number`` groups of about equal size, in order."""
    groups: list[list[Item]] = [[]]
    done = 0
    for unit in units:
        if groups[-1] and len(groups) < number and done >= len(groups) * total / number:
            groups.append([])
        groups[-1].extend(unit)
        done += sum(item.entry.size for item in unit)
    return groups


def hugging_face_shards(
    weights: Weights, expected: Mapping[str, Layout], companion: Companion, largest: int
) -> list[Shard]:
    """Files of Hugging Face tensors of at most ``largest`` bytes; call :func:`check` before."""
    groups: list[list[Item]] = [[]]
    size = 0
    for name, entry, members in disk_tensors({name: weights.entries[name] for name in expected}, companion):
        parts = tuple(Segment(member, 0, weights.entries[member].elements) for member in members)
        if groups[-1] and size + entry.size > largest:
            groups.append([])
            size = 0
        groups[-1].append(Item(name, entry, parts))
        size += entry.size
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    # Wider elements first, so that every tensor starts at a multiple of its element's size.
    items = [tuple(sorted(group, key=lambda item: -item.entry.dtype.itemsize)) for group in groups]
    return [Shard(SINGLE if len(groups) == 1 else file, group) for file, group in zip(files, items, strict=True)]


def fingerprint(shards: Sequence[Shard], sources: Iterable[Path], options: Mapping[str, Any]) -> str:
    """Changes when another file, another plan or another option would be converted."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    plan = [
        (s.file, [(i.name, str(i.entry), i.offset, [(p.source, p.start, p.count) for p in i.parts]) for i in s.items])
        for s in shards
    ]
    return hashlib.sha256(json.dumps([files, plan, options], sort_keys=True).encode()).hexdigest()
