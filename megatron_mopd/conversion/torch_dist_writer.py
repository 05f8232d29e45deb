"""Writes checkpoints in mcore's ``torch_dist`` format chunk by chunk, without a model and without process groups.

A chunk is the archive that ``torch.save`` would write of it, so mcore, torch and :mod:`megatron_mopd.torch_dist` read
it as their own; its elements are passed on as they come, and no chunk is ever whole in memory.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._utils import _rebuild_tensor_v2
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mopd.torch_dist import Stored

LARGEST_CHUNK = 2**29
"""Bytes. Readers hold a chunk at a time, and archives beyond 2 GiB would need another header."""
CHUNK_OVERHEAD = 1024
"""Bytes that an archive adds to its elements, at most."""
_COMMON = "common_state/shard_0_1"  # mcore's name of the state that all ranks have in common
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


@contextmanager
def chunk(file: BinaryIO, shape: Sequence[int], dtype: torch.dtype) -> Iterator[Callable[[memoryview], Any]]:
    """Append a chunk to ``file``; the block writes its elements, row-major, through the function it is given."""
    size = math.prod(shape) * dtype.itemsize
    with zipfile.ZipFile(_From(file), "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _pickled(shape, dtype))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
        data = zipfile.ZipInfo("archive/data/0")
        data.file_size = size
        with archive.open(data, "w") as record:
            yield record.write
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")
    assert data.file_size == size, f"{data.file_size} bytes were written of {size}"


def write_rest(
    path: Path, tensors: Mapping[str, Stored], common: Mapping[str, Any], file: str, empty: Sequence[str] = ()
) -> None:
    """Write what makes the chunk files of ``tensors`` in ``path`` a checkpoint: ``.metadata`` and mcore's other files.

    ``common`` is the state that all ranks have in common, plain values; it goes into ``common.pt``, where mcore before
    0.19 looks for it, and into ``file``, where later ones do. ``empty`` names objects that are there and hold nothing.
    """
    legacy, shared, nothing = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(dict(common), legacy)
    torch.save([dict(common)], shared)
    torch.save([None], nothing)
    first, second = shared.getvalue(), nothing.getvalue()
    (path / "common.pt").write_bytes(legacy.getvalue())
    (path / file).write_bytes(first + second)
    state: dict[str, Any] = dict.fromkeys((_COMMON, *empty), BytesStorageMetadata())
    places = {MetadataIndex(name): _StorageInfo(file, len(first), len(second)) for name in empty}
    places[MetadataIndex(_COMMON)] = _StorageInfo(file, 0, len(first))
    for name, stored in tensors.items():
        boxes = [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in stored.chunks]
        properties = TensorProperties(dtype=stored.dtype)
        state[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), boxes)
        places |= {MetadataIndex(name, c.offset): _StorageInfo(c.file, c.start, c.length) for c in stored.chunks}
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata=state, storage_data=places)))
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (path / "metadata.json").write_text(json.dumps(backend | {"common_backend": "torch", "common_backend_version": 1}))


# --------------------------------------------------------------------------- the pickle inside a chunk


class _Tensor:
    """Pickles as a contiguous tensor over the archive's only storage."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.storage = tuple(shape), _Storage(math.prod(shape), dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        stride = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict())


class _Storage:
    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self.elements, self.dtype = elements, dtype


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", _STORAGES[obj.dtype], "0", "cpu", obj.elements
        return None


def _pickled(shape: Sequence[int], dtype: torch.dtype) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(_Tensor(shape, dtype))
    return stream.getvalue()


class _From:
    """A file from its present position on: an archive that begins there counts from 0."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._start = file, file.tell()

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET, "an archive is written front to back"
        return self._file.seek(self._start + offset) - self._start

    def write(self, content: bytes | memoryview) -> int:
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()
