"""Runs of elements straight from the files of a ``torch_dist`` checkpoint, whatever layout cut its tensors.

A chunk is an archive that ``torch.save`` wrote, uncompressed; once the record that holds its elements is found, any
run of them is one read. So a tensor of any size is passed on piece by piece, and no more than a piece is in memory.
Only a chunk that is compressed or stored transposed, which mcore writes neither, has to be read whole.
"""

from __future__ import annotations

import bisect
import io
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch
from torch import Tensor

from megatron_mopd import torch_dist
from megatron_mopd.config import ConfigurationError
from megatron_mopd.torch_dist import Chunk, Index

_LOCAL_HEADER = 30  # bytes, before the name and the extra field


class Files:
    """Files opened once and read at any position, by many threads at a time."""

    KEPT = 256  # open at a time; files beyond are opened for each read, since processes may not open many more

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()

    def read(self, file: Path, start: int, into: memoryview) -> None:
        """Fill ``into`` from byte ``start`` of ``file``; raises :class:`ConfigurationError` where the file ends."""
        with self._lock:
            descriptor = self._descriptors.get(file)
            keep = descriptor is None and len(self._descriptors) < self.KEPT
            if descriptor is None:
                descriptor = os.open(file, os.O_RDONLY)
            if keep:
                self._descriptors[file] = descriptor
        try:
            _fill(descriptor, file, start, into)
        finally:
            if self._descriptors.get(file) != descriptor:
                os.close(descriptor)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _fill(descriptor: int, file: Path, start: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], start + done)
        if count == 0:
            raise ConfigurationError(f"{file}: truncated while it was read; copy it again")
        done += count


class RawReader:
    """Reads runs of elements of the tensors in ``index``; use it as a context manager."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files = Files()
        self._places: dict[tuple[str, tuple[int, ...]], int | None] = {}
        self._order: dict[str, tuple[list[Chunk], list[int], int]] = {}
        self._whole: tuple[str, Chunk, Tensor] | None = None  # the last chunk that had to be read whole

    def __enter__(self) -> RawReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def read(self, name: str, start: int, into: memoryview) -> None:
        """Fill ``into`` (bytes) with the elements of tensor ``name`` from number ``start`` on, counted row-major.

        Raises :class:`ConfigurationError` for a damaged chunk and for elements that no chunk holds.
        """
        stored = self.index.tensors[name]
        size, position = stored.dtype.itemsize, 0
        for offset, shape in boxes(stored.shape, start, len(into) // size):
            length = math.prod(shape) * size
            self._read_box(name, offset, shape, into[position : position + length])
            position += length

    def _read_box(self, name: str, offset: Sequence[int], shape: Sequence[int], into: memoryview) -> None:
        dtype, covered = self.index.tensors[name].dtype, 0
        for chunk in self._near(name, offset, shape):
            axes = zip(offset, shape, chunk.offset, chunk.shape, strict=True)
            common = [(max(a, b), min(a + n, b + m)) for a, n, b, m in axes]
            if not all(begin < end for begin, end in common):
                continue
            part = [end - begin for begin, end in common]
            covered += math.prod(part)
            source = [begin - o for (begin, _), o in zip(common, chunk.offset, strict=True)]
            if part == list(shape):
                self._read_chunk(name, chunk, source, part, into)
                continue
            buffer = memoryview(bytearray(math.prod(part) * dtype.itemsize))
            self._read_chunk(name, chunk, source, part, buffer)
            target = tuple(slice(begin - o, end - o) for (begin, end), o in zip(common, offset, strict=True))
            _tensor(into, dtype, shape)[target].copy_(_tensor(buffer, dtype, part))
        if covered != math.prod(shape):
            raise ConfigurationError(
                f"{self.index.path}: the chunks of {name} hold {covered} of {math.prod(shape)} elements at"
                f" {list(offset)}; the checkpoint is incomplete, copy it again"
            )

    def _near(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> list[Chunk]:
        """Chunks that may meet the box along the first axis: of hundreds of experts' chunks, one."""
        if name not in self._order:
            chunks = sorted(self.index.tensors[name].chunks, key=lambda c: c.offset)
            longest = max((c.shape[0] for c in chunks if c.shape), default=0)
            self._order[name] = chunks, [c.offset[0] for c in chunks if c.offset], longest
        chunks, starts, longest = self._order[name]
        if not shape:
            return chunks
        first = bisect.bisect_left(starts, offset[0] - longest + 1)
        return chunks[first : bisect.bisect_left(starts, offset[0] + shape[0])]

    def _read_chunk(
        self, name: str, chunk: Chunk, offset: Sequence[int], shape: Sequence[int], into: memoryview
    ) -> None:
        """A box of one chunk that takes its inner axes whole, so that its elements lie side by side."""
        start = self._place(name, chunk)
        if start is None:
            box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            last = self._whole
            if last is None or last[:2] != (name, chunk):
                self._whole = last = (name, chunk, torch_dist.load_chunk(self.index, name, chunk))
            _tensor(into, last[2].dtype, shape).copy_(last[2][box])
            return
        strides = [math.prod(chunk.shape[axis + 1 :]) for axis in range(len(shape))]
        skipped = sum(o * s for o, s in zip(offset, strides, strict=True))
        file = self.index.path / chunk.file
        self._files.read(file, start + skipped * self.index.tensors[name].dtype.itemsize, into)

    def _place(self, name: str, chunk: Chunk) -> int | None:
        """First byte of the chunk's elements in its file; None where they are compressed or strided."""
        key = (name, chunk.offset)
        if key not in self._places:
            self._places[key] = self._locate(name, chunk)
        return self._places[key]

    def _locate(self, name: str, chunk: Chunk) -> int | None:
        where = f"{self.index.path / chunk.file}: {name}"
        part = _Part(self._files, self.index.path / chunk.file, chunk.start, chunk.length)
        try:
            with zipfile.ZipFile(part) as archive:
                pickled = next(i for i in archive.infolist() if i.filename.endswith("/data.pkl"))
                record = torch_dist.read_record(archive.read(pickled), where)
                data = archive.getinfo(f"{pickled.filename.removesuffix('data.pkl')}data/{record.key}")
        except (zipfile.BadZipFile, StopIteration, KeyError, OSError, ValueError) as error:
            raise ConfigurationError(
                f"{where}: damaged at byte {chunk.start}: {error!r}; copy the checkpoint again"
            ) from None
        if (record.shape, record.dtype) != (chunk.shape, self.index.tensors[name].dtype):
            raise ConfigurationError(
                f"{where}: byte {chunk.start} does not hold what .metadata says; copy the checkpoint again"
            )
        contiguous = all(
            n == 1 or stride == math.prod(chunk.shape[axis + 1 :])
            for axis, (n, stride) in enumerate(zip(record.shape, record.stride, strict=True))
        )
        if data.compress_type != zipfile.ZIP_STORED or not contiguous:
            return None
        header = bytearray(_LOCAL_HEADER)
        self._files.read(self.index.path / chunk.file, chunk.start + data.header_offset, memoryview(header))
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        begin = data.header_offset + _LOCAL_HEADER + name_length + extra_length + record.offset * record.dtype.itemsize
        if begin + math.prod(record.shape) * record.dtype.itemsize > chunk.length:
            raise ConfigurationError(f"{where}: truncated at byte {chunk.start}; copy the checkpoint again")
        return chunk.start + begin


def boxes(shape: Sequence[int], start: int, count: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """``count`` elements from number ``start`` on of a tensor of this shape, as (offset, shape) of boxes in order.

    Example: elements 3 to 9 of a ``[4, 3]`` tensor are rows 1 and 2, ``((1, 0), (2, 3))``.
    """
    if len(shape) < 2:
        yield (start,) * len(shape), (count,) * len(shape)
        return
    inner = math.prod(shape[1:])
    while count:
        row, within = divmod(start, inner)
        rows = count // inner
        if within == 0 and rows:
            done = rows * inner
            yield (row, *[0] * (len(shape) - 1)), (rows, *shape[1:])
        else:
            done = min(count, inner - within)
            for offset, box in boxes(shape[1:], within, done):
                yield (row, *offset), (1, *box)
        start, count = start + done, count - done


def _tensor(buffer: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype).view(tuple(shape))


class _Part(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, files: Files, file: Path, start: int, length: int) -> None:
        self._files, self._file, self._start, self._length = files, file, start, length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        into = memoryview(buffer).cast("B")
        count = max(0, min(len(into), self._length - self._position))
        self._files.read(self._file, self._start + self._position, into[:count])
        self._position += count
        return count
