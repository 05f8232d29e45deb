"""Reads checkpoints in mcore's ``torch_dist`` format without a model, without process groups, without trusting pickle.

A directory holds ``.metadata`` (a pickle naming every tensor, its chunks and where they lie) and ``*.distcp`` files of
chunks saved by ``torch.save``. The pickle is read through an allow-list onto inert stand-ins, so it can run nothing;
the chunks go through torch's ``weights_only`` unpickler. Objects among the chunks are never read.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.config import ConfigurationError


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of one tensor and the bytes that hold it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int  # byte
    length: int  # bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the checkpoint: its global shape and the chunks that the writing layout cut it into."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """What a checkpoint directory holds, by Megatron name."""

    path: Path
    tensors: Mapping[str, Stored]
    objects: tuple[str, ...] = ()  # names of what is no tensor, such as transformer-engine's state; never read


def open_index(path: Path) -> Index:
    """Read ``path/.metadata`` and check that every file it names is there and long enough.

    Raises :class:`ConfigurationError` for a missing, truncated or damaged checkpoint and for a pickle with foreign
    classes.
    """
    metadata = _read_metadata(path / ".metadata")
    try:
        places = {(key.fqn, _ints(key.offset)): info for key, info in metadata.storage_data.items()}
        tensors = {
            name: Stored(
                tuple(entry.size), entry.properties.state[0], tuple(_chunk(name, c, places) for c in entry.chunks)
            )
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, _TensorStorageMetadata)
        }
        objects = tuple(name for name in metadata.state_dict_metadata if name not in tensors)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path / '.metadata'}: damaged, or written by an unknown version: {error!r}"
        ) from None
    _check_files(path, tensors)
    return Index(path, tensors, objects)


def read(index: Index, name: str) -> Tensor:
    """The whole tensor ``name`` on the host, in its stored dtype."""
    stored = index.tensors[name]
    tensor = torch.zeros(stored.shape, dtype=stored.dtype)
    read_into(index, name, tensor, (0,) * tensor.dim())
    return tensor


def read_into(index: Index, name: str, target: Tensor, offset: Sequence[int]) -> None:
    """Fill ``target``, the box of tensor ``name`` that starts at ``offset``; values are cast to its dtype.

    What the stored tensor does not cover (padding rows of another layout) stays as it is.
    """
    for chunk in index.tensors[name].chunks:
        axes = zip(offset, target.shape, chunk.offset, chunk.shape, strict=True)
        common = [(max(a, b), min(a + n, b + m)) for a, n, b, m in axes]
        if all(begin < end for begin, end in common):
            source = load_chunk(index, name, chunk)
            into = tuple(slice(begin - a, end - a) for (begin, end), a in zip(common, offset, strict=True))
            out_of = tuple(slice(begin - b, end - b) for (begin, end), b in zip(common, chunk.offset, strict=True))
            target[into].copy_(source[out_of])


def load_chunk(index: Index, name: str, chunk: Chunk) -> Tensor:
    """One chunk as a tensor on the host; raises :class:`ConfigurationError` when its bytes are not what they must."""
    where = f"{index.path / chunk.file}: {name}"
    with open(index.path / chunk.file, "rb") as file:
        file.seek(chunk.start)
        content = file.read(chunk.length)
    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"refused, its pickle uses {foreign[1]}" if foreign else f"damaged at byte {chunk.start}"
        raise ConfigurationError(f"{where}: {what}; take the checkpoint from its source again") from error
    if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (
        chunk.shape,
        index.tensors[name].dtype,
    ):
        raise ConfigurationError(
            f"{where}: byte {chunk.start} does not hold what .metadata says; copy the checkpoint again"
        )
    return tensor


def _chunk(name: str, chunk: Any, places: Mapping[Any, Any]) -> Chunk:
    place = places[name, _ints(chunk.offsets)]
    if getattr(place, "transform_descriptors", None):
        raise ConfigurationError(
            f"{place.relative_path}: {place.transform_descriptors} is no supported encoding; save plainly"
        )
    return Chunk(_ints(chunk.offsets), _ints(chunk.sizes), place.relative_path, place.offset, place.length)


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values or ())


def _check_files(path: Path, tensors: Mapping[str, Stored]) -> None:
    needed: dict[str, int] = {}
    for stored in tensors.values():
        for chunk in stored.chunks:
            needed[chunk.file] = max(needed.get(chunk.file, 0), chunk.start + chunk.length)
    for name, size in sorted(needed.items()):
        if Path(name).name != name:
            raise ConfigurationError(f"{path / '.metadata'}: names a file outside its directory: {name!r}")
        file = path / name
        if not file.is_file():
            raise ConfigurationError(f"{file}: missing; the checkpoint is incomplete, copy it again")
        if (found := file.stat().st_size) < size:
            raise ConfigurationError(f"{file}: truncated, {found} bytes of {size}; copy the checkpoint again")


# --------------------------------------------------------------------------- a chunk's own pickle


@dataclass(frozen=True, slots=True)
class Record:
    """How a chunk saved by ``torch.save`` keeps its tensor: in which record of its archive, and how strided."""

    key: str
    dtype: torch.dtype
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_record(content: bytes, where: str) -> Record:
    """Read a chunk's ``data.pkl`` onto inert values; raises :class:`ConfigurationError` for any other pickle."""
    try:
        (_, storage, key, *_), offset, shape, stride, *_ = _TensorUnpickler(io.BytesIO(content)).load()
        return Record(str(key), _STORAGES[storage], int(offset), _ints(shape), _ints(stride))
    except _Refused as refused:
        raise ConfigurationError(
            f"{where}: refused, its pickle uses {refused}; take the checkpoint from its source again"
        ) from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{where}: damaged: {error!r}; copy the checkpoint again") from None


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _keep
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


# --------------------------------------------------------------------------- the metadata pickle


class _Inert:
    """Keeps the pickled arguments and state of one metadata class and does nothing with them."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _TensorStorageMetadata(_Inert):
    size: tuple[int, ...]
    properties: Any
    chunks: list[Any]


class _MetadataIndex(_Inert):
    fqn: str
    offset: tuple[int, ...] | None = None  # left out of the pickle for objects
    index: int | None = None


class _StrPath(_Inert):
    """A pathlib path; only its presence matters."""


def _keep(*arguments: Any) -> Any:
    return arguments


_PLANNING = (
    "SavePlan",
    "WriteItem",
    "WriteItemType",
    "TensorWriteData",
    "BytesIOWriteData",
)  # mcore keeps its save plans
_METADATA = ("Metadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta")
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _TensorStorageMetadata,
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): _MetadataIndex,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _Inert,
    **{("torch.distributed.checkpoint.metadata", name): type(name, (_Inert,), {}) for name in _METADATA},
    **{("torch.distributed.checkpoint.planner", name): type(name, (_Inert,), {}) for name in _PLANNING},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): type("_StorageInfo", (_Inert,), {}),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): type("_StoragePrefix", (_Inert,), {}),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): type("MCoreMetadata", (_Inert,), {}),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): type("MCoreSavePlan", (_Inert,), {}),
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch.serialization", "_get_layout"): _keep,
    ("pathlib", "PosixPath"): _StrPath,
    ("pathlib._local", "PosixPath"): _StrPath,
}
"""Names a ``.metadata`` may hold, and the inert thing that stands in for each; torch's dtypes are allowed besides."""


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _Refused(f"{module}.{name}")


class _Refused(Exception):
    """Carries the name of a class that a metadata pickle must not use."""


def _read_metadata(file: Path) -> Any:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{file}: cannot be read ({error.strerror}); name a Megatron checkpoint directory"
        ) from None
    try:
        return _AllowListUnpickler(io.BytesIO(content)).load()
    except _Refused as refused:
        raise ConfigurationError(
            f"{file}: refused, its pickle uses {refused}, which checkpoint metadata never needs; mcore writes no such"
            " file, so take the checkpoint from its source again"
        ) from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{file}: truncated or damaged: {error!r}; copy the checkpoint again") from None
