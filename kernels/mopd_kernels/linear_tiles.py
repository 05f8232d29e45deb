"""Host side of the kernels on hidden states: how a product runs in tiles, and the memory that it may fill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import log
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mopd_kernels import linear_kernels as kernels
from mopd_kernels.vocabulary import VocabularyShard

WORKSPACE_BYTES = 300_000_000
"""E of a chunk of rows and what is alive beside it: 1024 rows of 131072 columns in bf16."""
SLAB = 4096
"""Columns of d_hidden formed at a time, since their fp32 product is alive beside E."""
LOG2_E = 1 / log(2)
NO_DEVICE = (9, 132)
"""Compute capability and multiprocessors where there is no device to ask: the H100."""


@dataclass(frozen=True)
class Tile:
    """Shape of one tile of logits and how its kernel runs."""

    rows: int
    columns: int
    depth: int
    parts: int  # pieces of the columns in the epilogue
    warps: int
    stages: int
    registers: int | None = None  # at most, per thread


# 128 x 256 is the largest accumulator that leaves its threads registers for the epilogue; four stages of its operands
# and a piece of E fill the shared memory. Unbounded, ptxas takes up to 206 registers without being any faster: one
# program fits a multiprocessor either way. On Blackwell the accumulator lies in tensor memory, a row per thread, so
# four warps sum rows without exchange; storing E, they would spill, and eight do not.
TILES = {
    (9, "statistics"): Tile(rows=128, columns=256, depth=64, parts=4, warps=8, stages=4, registers=168),
    (9, "exponentials"): Tile(rows=128, columns=256, depth=64, parts=8, warps=8, stages=4, registers=176),
    (10, "statistics"): Tile(rows=128, columns=256, depth=64, parts=4, warps=4, stages=4),
    (10, "exponentials"): Tile(rows=128, columns=256, depth=64, parts=4, warps=8, stages=4),
}
FP32_TILE = Tile(rows=64, columns=64, depth=32, parts=1, warps=8, stages=3)
"""fp32 is multiplied exactly, without tensor cores: for tests and small models."""
GROUP = 16
"""Row blocks per turn through the vocabulary: 132 programs then read about as many rows of hidden as of weight."""


@dataclass(frozen=True)
class Head:
    """One shard's product and where each target lies in it."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [columns, H], without padding
    places: Tensor  # int32 [T], -1 where another shard holds the target
    shard: VocabularyShard
    factor: float  # log2(e) / temperature

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, temperature: float) -> Head:
        local, here = shard.locate(targets)
        return cls(
            hidden=hidden.contiguous(),
            weight=weight[: shard.columns].contiguous(),
            places=local.where(here, -1).int(),
            shard=shard,
            factor=LOG2_E / temperature,
        )

    def tile(self, use: str) -> Tile:
        if self.hidden.dtype == torch.float32:
            return FP32_TILE
        return TILES[10 if _device(self.hidden.device)[0] >= 10 else 9, use]

    def chunks(self, row_bytes: int, tile_rows: int) -> Iterator[slice]:
        """Even slices over the rows, of whole tiles, within the workspace; as many on every rank."""
        total = len(self.hidden)
        most = max(WORKSPACE_BYTES // row_bytes // tile_rows, 1) * tile_rows
        step = max(quotient(quotient(total, quotient(total, most) or 1), tile_rows), 1) * tile_rows
        for start in range(0, total, step):
            yield slice(start, min(start + step, total))


class Workspace:
    """E of one chunk of rows after another, in the same memory."""

    def __init__(self, head: Head) -> None:
        self.tile = head.tile("exponentials")
        item, width = head.hidden.element_size(), head.hidden.shape[1]
        stride = quotient(head.shard.width, 64) * 64  # rows start on cache lines
        beside = max(4 * min(width, SLAB), item * width) + 8 * quotient(head.shard.width, self.tile.columns)
        self.chunks = list(head.chunks(stride * item + beside, self.tile.rows))
        self._columns = head.shard.columns
        rows = self.chunks[0].stop if self.chunks and self._columns else 0
        self._memory = head.hidden.new_empty(rows, stride)

    def of(self, rows: slice) -> Tensor | None:
        """``[n, columns]``, unset; None where the whole shard is padding."""
        return self._memory[: rows.stop - rows.start, : self._columns] if self._columns else None


def run_tiles(
    head: Head, rows: slice, tile: Tile, guide: Tensor | None, exponentials: Tensor | None, sums: Tensor | None
) -> Tensor:
    """All tiles of some rows: writes E and ``sums [3, n]`` where it has them, and returns fp32 ``[n]``, the target's
    logit less the guide to base 2, unset where another shard holds the target."""
    hidden, places = head.hidden[rows], head.places[rows]
    n, columns = len(hidden), head.shard.columns
    column_tiles = quotient(columns, tile.columns)
    target = hidden.new_empty(n, dtype=torch.float32)
    parts = None if sums is None else target.new_empty(3 if guide is None else 2, column_tiles, n)
    programs = _device(hidden.device)[1]
    launch(
        kernels.logit_tiles_kernel,
        (min(programs, quotient(n, tile.rows) * column_tiles),),
        hidden=TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
        weight=TensorDescriptor.from_tensor(head.weight, [tile.columns, tile.depth]),
        exponentials=None
        if exponentials is None
        else TensorDescriptor.from_tensor(exponentials, [tile.rows, tile.columns // tile.parts]),
        guide=guide,
        places=places,
        target=target,
        sums=parts,
        T=n,
        columns=columns,
        H=hidden.shape[1],
        factor=head.factor,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PARTS=tile.parts,
        GROUP=GROUP,
        PROGRAMS=programs,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    if sums is not None:
        sizes = {"stride": sums.stride(0), "T": n, "tiles": column_tiles}
        constants = {"GUIDED": guide is not None, "ROWS": 32, "TILES": 64}
        launch(kernels.join_tiles_kernel, (quotient(n, 32),), parts, target, places, sums, **sizes, **constants)
    return target


def target_logits(head: Head) -> Tensor:
    """fp32 ``[T]`` to base 2, 0 where another shard holds the target."""
    hidden, weight = head.hidden, head.weight
    out = hidden.new_zeros(len(hidden), dtype=torch.float32)
    if out.numel() and weight.numel():
        strides = {"hidden_stride": hidden.stride(0), "weight_stride": weight.stride(0)}
        sizes = {"T": len(out), "H": hidden.shape[1], "factor": head.factor, "ROWS": 4, "DEPTH": 512}
        launch(
            kernels.target_logits_kernel, (quotient(len(out), 4),), hidden, weight, head.places, out, **strides, **sizes
        )
    return out


def scale_rows(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """``out = scale[:, None] * x`` for ``[n, H]``, rounded once."""
    n, width = x.shape
    strides = {"x_stride": x.stride(0), "out_stride": out.stride(0), "out_step": out.stride(1)}
    grid = (quotient(n, 8), quotient(width, 1024))
    launch(kernels.scale_rows_kernel, grid, x, scale, out, **strides, n=n, H=width, ROWS=8, COLUMNS=1024)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](...)``, past a type checker that wants the kernel's own types where Triton takes plain ones."""
    kernel[grid](*arguments, **options)


def quotient(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def _device(device: torch.device) -> tuple[int, int]:
    return _properties(device) if device.type == "cuda" else NO_DEVICE


@cache
def _properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count
