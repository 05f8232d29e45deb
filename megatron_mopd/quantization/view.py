"""A quantized Hugging Face directory seen as one that is not: every matrix decoded where it is read.

The view of :mod:`megatron_mopd.conversion.weights`, so that whatever reads checkpoints reads these, with memory of the
size of the caller's buffer. Layouts are told apart by ``quant_method`` in ``config.json``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import hugging_face_config
from megatron_mopd.conversion.hugging_face import HuggingFaceWeights
from megatron_mopd.conversion.weights import Companion, Entry, Problems
from megatron_mopd.quantization import config, stored
from megatron_mopd.quantization.recipes import QUANTIZED, Format
from megatron_mopd.quantization.stored import BLOCK, NAMES, Layout, Names

_ACTIVATIONS = {"input_scale", "input_global_scale", "k_scale", "v_scale"}
"""Scales that say nothing of weights; calibrated checkpoints have them."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    module: str
    format: Format
    names: Names


class QuantizedWeights:
    """The view of the quantized directory ``path``; matrices come out in ``dtype``, rounded once from fp32.

    Raises :class:`ConfigurationError` for a directory that is not quantized, or in a layout that is not read here.
    Codes without their scales, and scales of another shape, are gathered in ``problems``.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self._stored = HuggingFaceWeights(path)
        self._layout: Layout = _layout(path, self._stored.companion)
        self.path, self.problems, self.aliases = path, self._stored.problems, self._stored.aliases
        self.entries: dict[str, Entry] = {}
        self._matrices: dict[str, _Matrix] = {}
        own = [names for (_, layout), names in NAMES.items() if layout == self._layout]
        scales = _ACTIVATIONS | {name for names in own for name in (names.block_scales, names.scale)}
        for name, entry in self._stored.entries.items():
            module, _, last = name.rpartition(".")
            matrix = _matrix(module, last, entry, self._layout)
            if matrix is None:
                if last not in scales:
                    self.entries[name] = entry
                continue
            shape = (entry.shape[0], entry.shape[1] * (2 if matrix.format == "nvfp4" else 1))
            self.entries[f"{module}.weight"] = Entry(shape, dtype)
            self._matrices[f"{module}.weight"] = matrix
            _check(matrix, shape, self._stored.entries, self._layout, self.problems)
        tree = {key: value for key, value in self._stored.companion.config.items() if key != config.ENTRY}
        files = {n: file for n, file in self._stored.companion.files.items() if n != config.MODELOPT_FILE}
        self.companion = replace(self._stored.companion, config=tree, files=files)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return self._stored.files

    def read(self, name: str, start: int, into: memoryview) -> None:
        """Fill ``into`` with elements from number ``start`` on, row-major."""
        matrix = self._matrices.get(name)
        if matrix is None:
            self._stored.read(name, start, into)
            return
        dtype = self.entries[name].dtype
        end = start + len(into) // dtype.itemsize
        first, last = start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK
        values = self._decode(matrix, first, min(last, self.entries[name].elements), dtype)
        into[:] = memoryview(values[start - first : end - first].view(torch.uint8).numpy())

    def close(self) -> None:
        self._stored.close()

    def _decode(self, matrix: _Matrix, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Elements ``first`` to ``last``, whole blocks, as one row."""
        scale = self._part(matrix, matrix.names.scale, 0, 1)
        if matrix.format == "fp8":
            return stored.decode_fp8(self._part(matrix, matrix.names.codes, first, last), scale, dtype)
        codes = self._part(matrix, matrix.names.codes, first // 2, last // 2)
        blocks = self._part(matrix, matrix.names.block_scales, first // BLOCK, last // BLOCK)
        return stored.decode_nvfp4(codes[None], blocks[None], scale, self._layout, dtype)[0]

    def _part(self, matrix: _Matrix, last: str, start: int, end: int) -> Tensor:
        name = f"{matrix.module}.{last}"
        dtype = self._stored.entries[name].dtype
        content = bytearray((end - start) * dtype.itemsize)
        self._stored.read(name, start, memoryview(content))
        return torch.frombuffer(content, dtype=dtype)


def _layout(path: Path, companion: Companion) -> Layout:
    found = (companion.config.get(config.ENTRY) or {}).get("quant_method")
    for layout in get_args(Layout):
        if found == layout:
            return layout
    file = path / hugging_face_config.FILE
    what = "is not quantized" if found is None else f"has quant_method {found!r}"
    raise ConfigurationError(f"{file}: {what}; name a directory with one of {', '.join(get_args(Layout))}")


def _matrix(module: str, last: str, entry: Entry, layout: Layout) -> _Matrix | None:
    """The matrix that the tensor ``module.last`` holds the codes of, if it does."""
    dtypes: dict[Format, torch.dtype] = {"nvfp4": torch.uint8, "fp8": torch.float8_e4m3fn}
    for format in QUANTIZED:
        names = NAMES[format, layout]
        if last == names.codes and entry.dtype == dtypes[format] and len(entry.shape) == 2:
            return _Matrix(module, format, names)
    return None


def _check(
    matrix: _Matrix, shape: tuple[int, int], entries: dict[str, Entry], layout: Layout, problems: Problems
) -> None:
    expected = stored.outputs(f"{matrix.module}.weight", Entry(shape, torch.bfloat16), matrix.format, layout)
    for name, entry in expected[1:]:
        if name not in entries:
            problems.add("scales missing", name)
        elif entries[name].dtype != entry.dtype or math.prod(entries[name].shape) != entry.elements:
            problems.add("scales of another kind", f"{name} ({entries[name].dtype} {list(entries[name].shape)})")
