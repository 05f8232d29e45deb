"""safetensors files read and written piece by piece: a header in JSON, then every tensor's bytes in a row.

The format's own library hands out whole tensors and writes whole files from memory; a conversion needs neither.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion.weights import FLOATS, Entry

_DTYPES = {name: dtype for dtype, name in FLOATS.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    file: Path
    start: int  # first byte in the file
    entry: Entry


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of ``file`` by name.

    Raises :class:`ConfigurationError` for a file that is missing or truncated and for a header that is damaged: bytes
    that overlap, leave a gap or do not fit a tensor's shape.
    """
    try:
        size = os.stat(file).st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= min(_LONGEST_HEADER, size - 8):
                raise ConfigurationError(f"{file}: truncated, {size} bytes hold no whole header; copy it again")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read ({error.strerror}); copy it again") from None
    except ValueError as error:
        raise ConfigurationError(f"{file}: its header is damaged: {error}; copy it again") from None
    data, found, end = 8 + length, {}, 0
    try:
        for name, entry in sorted(_tensors(header), key=lambda item: item[1]["data_offsets"]):
            tensor = Entry(tuple(int(n) for n in entry["shape"]), _DTYPES[entry["dtype"]])
            begin, after = entry["data_offsets"]
            if begin != end or after - begin != tensor.size:
                raise ConfigurationError(f"{file}: {name} is misplaced or of another length; copy it again")
            found[name], end = Stored(file, data + begin, tensor), after
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{file}: its header is damaged or of an unknown kind: {error!r}; copy it") from None
    if size != data + end:
        what = "truncated" if size < data + end else "too long"
        raise ConfigurationError(f"{file}: {what}, {size} bytes of {data + end}; copy it again")
    return found


def _tensors(header: Mapping[str, Mapping[str, Sequence[int]]]) -> list[tuple[str, Mapping]]:
    return [(name, entry) for name, entry in header.items() if name != "__metadata__"]


def header(tensors: Sequence[tuple[str, Entry]]) -> bytes:
    """The bytes before those of ``tensors``, which follow in this order."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in tensors:
        begin, end = end, end + math.prod(entry.shape) * entry.dtype.itemsize
        tree[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text
