"""Host side of the kernels on hidden states: how a product runs in tiles, and the memory that it may fill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mopd_kernels import linear_kernels as kernels
from mopd_kernels.device import device_properties
from mopd_kernels.linear_operand_kernels import product_kernel
from mopd_kernels.linear_operands import Operand
from mopd_kernels.linear_packing import Pair
from mopd_kernels.linear_payload_kernels import payload_kernel
from mopd_kernels.nvfp4.triton_ops import EXACT, Target
from mopd_kernels.vocabulary import VocabularyShard

WORKSPACE_BYTES = 300_000_000
"""E of a chunk of rows and what is alive beside it: 1024 rows of 131072 columns in bf16."""
SLAB = 4096
"""Columns of d_hidden formed at a time, since their fp32 product is alive beside E."""
LOG2_E = 1 / log(2)


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
    # Decoding takes registers of its own beside the accumulator, so there is no bound. Each number of the weight is
    # decoded once per row tile: tall tiles halve that work.
    (9, "packed"): Tile(rows=256, columns=128, depth=64, parts=2, warps=8, stages=4),
    (10, "packed"): Tile(rows=256, columns=128, depth=64, parts=1, warps=8, stages=4),
    (9, "logits"): Tile(rows=128, columns=128, depth=64, parts=1, warps=8, stages=4),
    (10, "logits"): Tile(rows=128, columns=128, depth=64, parts=1, warps=8, stages=4),
}
FP32_TILE = Tile(rows=64, columns=64, depth=32, parts=1, warps=8, stages=3)
"""fp32 is multiplied exactly, without tensor cores: for tests and small models."""
PAYLOAD_TILE = Tile(rows=128, columns=64, depth=64, parts=1, warps=8, stages=3, registers=255)
"""Of the columns whose programs also quantize: few, as that takes the registers. 128 rows and 4 blocks of 16 are a tile
of swizzled scales. Left alone, ptxas would rather spill for sm_100 than take more than 128."""
GROUP = 16
"""Row blocks per turn through the vocabulary: 132 programs then read about as many rows of hidden as of weight."""


@dataclass(frozen=True)
class Head:
    """One shard's product and where each target lies in it."""

    pair: Pair
    places: Tensor  # int32 [T], -1 where another shard holds the target
    shard: VocabularyShard
    factor: float  # log2(e) / temperature

    @classmethod
    def of(cls, hidden: Operand, weight: Operand, targets: Tensor, shard: VocabularyShard, temperature: float) -> Head:
        local, here = shard.locate(targets)
        return cls(
            pair=Pair.of(hidden, weight, shard.columns),
            places=local.where(here, -1).int(),
            shard=shard,
            factor=LOG2_E / temperature,
        )

    @property
    def hidden(self) -> Tensor:
        return self.pair.hidden

    @property
    def weight(self) -> Tensor:
        return self.pair.weight

    def tile(self, use: str) -> Tile:
        return tile_of(self.pair, use)

    def chunks(self, row_bytes: int, tile_rows: int) -> Iterator[slice]:
        """Even slices over the rows, of whole tiles, within the workspace; as many on every rank."""
        total = len(self.places)
        most = max(WORKSPACE_BYTES // row_bytes // tile_rows, 1) * tile_rows
        step = max(quotient(quotient(total, quotient(total, most) or 1), tile_rows), 1) * tile_rows
        for start in range(0, total, step):
            yield slice(start, min(start + step, total))


def tile_of(pair: Pair, use: str) -> Tile:
    """``use``: statistics or exponentials of the logits, or the logits themselves."""
    if pair.dtype == torch.float32:
        return FP32_TILE
    if pair.multiplier is not None and use == "statistics":
        use = "packed"
    return TILES[10 if device_properties(pair.hidden.device)[0] >= 10 else 9, use]


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
    places = head.places[rows]
    n, columns = len(places), head.shard.columns
    column_tiles = quotient(columns, tile.columns)
    target = torch.empty(n, dtype=torch.float32, device=places.device)
    parts = None if sums is None else target.new_empty(3 if guide is None else 2, column_tiles, n)
    programs = device_properties(places.device)[1]
    launch(
        kernels.logit_tiles_kernel,
        (min(programs, quotient(n, tile.rows) * column_tiles),),
        **head.pair.arguments(rows, tile.rows, tile.columns, tile.depth),
        exponentials=None
        if exponentials is None
        else TensorDescriptor.from_tensor(exponentials, [tile.rows, tile.columns // tile.parts]),
        guide=guide,
        places=places,
        target=target,
        sums=parts,
        T=n,
        columns=columns,
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
    if parts is not None and sums is not None:
        _join_tiles(parts, target, places, sums, guide is not None)
    return target


def run_payload_tiles(head: Head, payload: Target, out: Tensor) -> None:
    """Of all rows: the statistics ``out [3, T]`` of a head of no more columns than :data:`PAYLOAD_TILE` has, and the
    payload that the dense hidden states, bf16 or fp16, are quantized to."""
    tile = PAYLOAD_TILE
    n, operand = len(head.places), payload.operand
    target = torch.empty(n, dtype=torch.float32, device=head.places.device)
    parts = target.new_empty(3, 1, n)
    given = payload.arguments
    launch(
        payload_kernel,
        (quotient(n, tile.rows),),
        **head.pair.arguments(slice(None), tile.rows, tile.columns, tile.depth),
        payload=tuple(given[name] for name in ("amax", "global_scale", "codes", "scales", "flag", "seed")),
        places=head.places,
        target=target,
        sums=parts,
        T=n,
        columns=head.shard.columns,
        width=operand.shape[1],
        blocks=operand.blocks,
        factor=head.factor,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PAYLOAD_SWIZZLED=operand.format.swizzled,
        KIND=operand.kind,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        **EXACT,
    )
    _join_tiles(parts, target, head.places, out, False)


def _join_tiles(parts: Tensor, target: Tensor, places: Tensor, out: Tensor, guided: bool) -> None:
    """``out [3, n]`` of the tiles' ``parts [.., tiles, n]``."""
    _, tiles, n = parts.shape
    sizes = {"stride": out.stride(0), "T": n, "tiles": tiles}
    constants = {"GUIDED": guided, "ROWS": 32, "TILES": 64}
    launch(kernels.join_tiles_kernel, (quotient(n, 32),), parts, target, places, out, **sizes, **constants)


def packed_logits(hidden: Operand, weight: Operand, out: Tensor) -> Tensor:
    """``out [n, columns]`` in fp32, of which a row is dense, as ``hidden @ weight.T``; one of them at least packed."""
    pair = Pair.of(hidden, weight, out.shape[1])
    tile = tile_of(pair, "logits")
    n, columns = out.shape
    if out.numel():
        launch(
            product_kernel,
            (quotient(n, tile.rows) * quotient(columns, tile.columns),),
            **pair.arguments(slice(None), tile.rows, tile.columns, tile.depth),
            out=out,
            stride=out.stride(0),
            T=n,
            columns=columns,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            GROUP=GROUP,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


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
