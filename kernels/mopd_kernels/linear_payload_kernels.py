"""The kernel that scores the first columns of a head and, of the same tiles of hidden states, packs the payload."""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.linear_kernels import tile_statistics
from mopd_kernels.linear_operand_kernels import operand_tile
from mopd_kernels.nvfp4.triton_blocks import transformed
from mopd_kernels.nvfp4.triton_kernels import numbers, quantize_tile
from mopd_kernels.triton_common import dot


@triton.jit
def payload_kernel(
    hidden,  # descriptor [T, H], dense, bf16 or fp16
    hidden_scales,  # None
    weight,  # as in linear_kernels.logit_tiles_kernel, of at most COLUMNS columns
    weight_scales,
    multiplier,
    payload,  # (amax, global_scale, codes, scales, flag, seed) as of nvfp4.triton_kernels.quantize_tile
    places,
    target,
    sums,  # fp32 [3, 1, T]
    T,
    columns,
    H,
    width,  # of the hidden states; H is that or, beside a packed weight, a multiple of 16
    blocks,  # of 16 in a row of the payload
    factor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PAYLOAD_SWIZZLED: tl.constexpr,
    KIND: tl.constexpr,
):
    """A program takes ROWS rows: their statistics over these columns, and their codes and scales.

    Compiled without fused multiply-add, as every kernel that makes NVFP4 bytes.
    """
    if multiplier is not None:
        factor *= tl.load(multiplier)
    row_tile = tl.program_id(0)
    row = row_tile * ROWS
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, blocks * 16, DEPTH):
        a = hidden.load([row, k])
        b = operand_tile(weight, weight_scales, 0, columns, k, H, COLUMNS, DEPTH, DTYPE, UNIT, SWIZZLED)
        accumulator = dot(a, b.T, accumulator)
        x0, x1 = tl.split(tl.permute(tl.reshape(a, (ROWS, DEPTH // 16, 2, 8)), (0, 1, 3, 2)))
        x0, x1 = transformed(x0.to(tl.float32), x1.to(tl.float32), KIND)
        here, block, exists = numbers(row_tile, k // DEPTH, T, blocks, ROWS, DEPTH // 16)
        quantize_tile(
            x0, x1, payload, row_tile, k // DEPTH, here, block, exists, width, blocks, PAYLOAD_SWIZZLED, KIND
        )  # fmt: skip
    rows = row + tl.arange(0, ROWS)
    inside = rows < T
    place = tl.load(places + rows, mask=inside, other=-1)
    hit = tl.max(((place >= 0) & (place < COLUMNS)).to(tl.int32), 0) > 0
    top, total, weighted = tile_statistics(
        accumulator, None, None, place, hit, target, rows, row, 0, columns, factor, 1
    )
    tl.store(sums + rows, total, mask=inside)
    tl.store(sums + T + rows, weighted, mask=inside)
    tl.store(sums + 2 * T + rows, top, mask=inside)
