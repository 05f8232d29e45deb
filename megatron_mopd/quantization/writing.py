"""The files of a quantized checkpoint, written piece by piece while the source's tensors stream past.

Memory holds, for each file being written, one buffer of the source (``weights.BLOCK`` bytes, or ``ELEMENTS`` of a
matrix that is quantized) and the encoder's temporaries over it, some 40 bytes an element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import safetensors_file
from megatron_mopd.conversion import weights as views
from megatron_mopd.conversion.jobs import Hashes, Job
from megatron_mopd.conversion.plans import Item, Shard
from megatron_mopd.conversion.weights import BLOCK, Entry, Weights
from megatron_mopd.quantization.recipes import QUANTIZED, Format
from megatron_mopd.quantization.stored import Encoder, FourOverSix, Layout

ELEMENTS = 2**18
"""Of a matrix encoded at a time, or one row where that is longer."""


@dataclass(frozen=True, slots=True)
class OutputShard(Shard):
    """One file to write. Its items are the source's tensors; ``outputs`` are those that hold each of them."""

    outputs: tuple[tuple[tuple[str, Entry], ...], ...]

    @property
    def size(self) -> int:
        """Bytes, the header included, at most."""
        return sum(entry.size + 256 + 2 * len(name) for group in self.outputs for name, entry in group)


class Writer:
    """Writes an :class:`OutputShard`; handed to :class:`Job`.

    ``formats``: of each item by its name. What it returns of an item are the squared norms of its error and of itself
    as fp32, both 0 for one that is passed on as it is. Raises :class:`ConfigurationError` for NaN and infinity.
    """

    def __init__(
        self,
        weights: Weights,
        formats: Mapping[str, Format],
        layout: Layout,
        four_over_six: FourOverSix | None,
        device: torch.device,
    ) -> None:
        self._weights, self._formats = weights, formats
        self._layout: Layout = layout
        self._four_over_six: FourOverSix | None = four_over_six
        self._device = device

    def __call__(self, job: Job, file: BinaryIO, shard: Shard, hashes: Hashes) -> Sequence[Sequence[float]]:
        assert isinstance(shard, OutputShard)
        # Wider elements first, so that every tensor starts at a multiple of its element's size.
        tensors = sorted((out for group in shard.outputs for out in group), key=lambda out: -out[1].dtype.itemsize)
        header = safetensors_file.header(tensors)
        file.write(header)
        starts, end = {}, len(header)
        for name, entry in tensors:
            starts[name], end = end, end + entry.size
        return [
            self._item(job, file, item, [starts[name] for name, _ in outputs], hashes)
            for item, outputs in zip(shard.items, shard.outputs, strict=True)
        ]

    def _item(self, job: Job, file: BinaryIO, item: Item, starts: list[int], hashes: Hashes) -> list[float]:
        format, entry = self._formats[item.name], item.entry
        if format == "keep" or (format == "bf16" and entry.dtype == torch.bfloat16):
            self._pass_on(job, file, item, starts[0], hashes)
            return [0.0, 0.0]
        width = entry.shape[-1] if format in QUANTIZED else 1
        buffer = memoryview(bytearray(min(entry.elements, max(1, ELEMENTS // width) * width) * entry.dtype.itemsize))
        encode = Encoder(item.name, format, self._layout, self._four_over_six, self._largest(item, buffer))
        positions, norms = list(starts), [0.0, 0.0]
        scale: Tensor | None = None

        def write(content: memoryview) -> None:
            nonlocal scale
            rows = torch.frombuffer(content, dtype=entry.dtype).view(-1, width).to(self._device)
            rows = rows.float() if entry.dtype == torch.float64 else rows
            found = encode(rows)
            for number, part in enumerate(found.rows):
                positions[number] += _put(file, positions[number], part)
            norms[0] += _squared(found.values - rows.float())
            norms[1] += _squared(rows.float())
            scale = found.scale

        job.copy(item, write, hashes, buffer)
        if scale is not None:
            _put(file, positions[-1], scale)
        return norms

    def _pass_on(self, job: Job, file: BinaryIO, item: Item, start: int, hashes: Hashes) -> None:
        def write(content: memoryview) -> None:
            self._check(item.name, torch.frombuffer(content, dtype=item.entry.dtype).abs().max())
            file.write(content)

        file.seek(start)
        job.copy(item, write, hashes, memoryview(bytearray(min(BLOCK, item.entry.size))))

    def _largest(self, item: Item, buffer: memoryview) -> Tensor:
        """fp32 []: the largest magnitude of the tensor."""
        largest = torch.zeros((), device=self._device)
        for part in item.parts:
            for content in views.blocks(self._weights, part.source, part.start, part.count, buffer):
                block = torch.frombuffer(content, dtype=item.entry.dtype).to(self._device)
                largest = torch.maximum(largest, block.abs().max().float())
        self._check(item.name, largest)
        return largest

    def _check(self, name: str, largest: Tensor) -> None:
        if not largest.isfinite():
            what = "NaN" if largest.isnan() else "infinity"
            raise ConfigurationError(
                f"{self._weights.path}: {what} in {name}; no format holds it, and a model with it computes nothing"
                " else. Take the checkpoint from its source again"
            )


def _put(file: BinaryIO, position: int, tensor: Tensor) -> int:
    """Write a tensor's bytes at ``position`` and return their number."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    file.seek(position)
    return file.write(memoryview(content))


def _squared(x: Tensor) -> float:
    return float(x.double().square().sum())
