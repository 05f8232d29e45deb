"""Operands of the products on hidden states that arrive in NVFP4: decoded tile by tile, never in memory as a whole.

A code times its block scale has at most six significant bits (two of E2M1, four of E4M3) and is a multiple of 2^-10 up
to 2688, so bf16 and fp16 hold it exactly; the fp32 multiplier of the tensor goes to the fp32 accumulator. What a
tile holds is that number over 128 (:data:`SHRINK`), a power of two that leaves every dtype exact: it lets one
multiplication bring a code's bits into place and apply the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.nvfp4.triton_codes import e4m3_value
from mopd_kernels.triton_common import dot

SHRINK = 7
"""A decoded tile is code * scale * 2^-SHRINK."""
RAISE = tl.constexpr(2.0 ** (126 - SHRINK))  # a code's bits as those of an fp32 number stand for it times 2^-126


@triton.jit
def operand_tile(
    operand,  # descriptor of a matrix, or its packed codes, uint8 [rows, H / 2]
    scales,  # E4M3 bits of a packed one, uint8 [rows, H / 16] or tiles of 128 x 4; None: it is not packed
    row,
    end,  # rows of the matrix
    k,
    H,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """``[ROWS, DEPTH]`` at ``row``, ``k``; 0 beyond the matrix.

    H and DEPTH are multiples of UNIT, 16 or 64. With 64 scales come by fours, in uint32, which can be copied ahead of
    the products; single bytes cannot.
    """
    if scales is None:
        return operand.load([row, k])
    else:
        units = H // UNIT
        pairs_of: tl.constexpr = UNIT // 2  # codes, in bytes
        here = tl.arange(0, ROWS)
        first = tl.cast(row, tl.int64) * units
        inside = (here < end - row)[:, None]
        byte = k // 2 + tl.arange(0, DEPTH // 2)
        at = first * pairs_of + (here * (units * pairs_of))[:, None] + byte[None, :]
        pairs = tl.load(operand + at, mask=inside & (byte < units * pairs_of)[None, :], other=0)
        unit = k // UNIT + tl.arange(0, DEPTH // UNIT)
        at = first + (here * units)[:, None] + unit[None, :]
        if SWIZZLED:
            per: tl.constexpr = 64 // UNIT  # units in a tile of 4 scales a row
            line = (row + here) % 32 * (4 * per) + (row + here) % 128 // 32 * per
            tile = ((row + here) // 128).to(tl.int64) * tl.cdiv(H, 64)
            at = (tile * (128 * per) + line)[:, None] + (unit // per * (128 * per) + unit % per)[None, :]
        bits = tl.load(scales + at, mask=inside & (unit < units)[None, :], other=0)
        if UNIT == 64:
            bits = tl.reshape((bits[:, :, None] >> (8 * tl.arange(0, 4)).to(tl.uint32)) & 0xFF, (ROWS, DEPTH // 16))
        return _decode(pairs, bits.to(tl.uint8), ROWS, DEPTH, DTYPE)


@triton.jit
def _decode(pairs, bits, ROWS: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """``[ROWS, DEPTH]`` of codes two a byte, the even one low, and a scale for each eight bytes."""
    scale = e4m3_value(bits) * RAISE
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, DEPTH // 16, 8)), (ROWS, DEPTH // 2))
    word = pairs.to(tl.uint32)
    low = _place(word) * scale
    high = _place(word >> 4) * scale
    return tl.reshape(tl.join(low.to(DTYPE), high.to(DTYPE)), (ROWS, DEPTH))  # exact, so truncation does no harm


@triton.jit
def _place(code):
    """The low four bits of ``code``, sign, two of exponent, one of mantissa, as those of an fp32 number: the exponent
    then stands for 2^-126 times its value, the code 1 for a subnormal number included."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def product_kernel(
    hidden,
    hidden_scales,
    weight,
    weight_scales,
    multiplier,  # fp32 [1]
    out,  # fp32 [T, columns], rows `stride` apart
    stride,
    T,
    columns,
    H,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """``out = multiplier * hidden @ weight.T`` of which one or both are packed; GROUP row blocks share the columns that
    a wave of programs reads."""
    tl.assume(H > 0)
    row_tiles = tl.cdiv(T, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0)
    first = tile // (GROUP * column_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    row = (first + within % height) * ROWS
    column = within // height * COLUMNS
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, H, DEPTH):
        a = operand_tile(hidden, hidden_scales, row, T, k, H, ROWS, DEPTH, DTYPE, UNIT, False)
        b = operand_tile(weight, weight_scales, column, columns, k, H, COLUMNS, DEPTH, DTYPE, UNIT, SWIZZLED)
        accumulator = dot(a, b.T, accumulator)
    rows = row + tl.arange(0, ROWS)
    cells = column + tl.arange(0, COLUMNS)
    at = out + rows.to(tl.int64)[:, None] * stride + cells[None, :]
    tl.store(at, accumulator * tl.load(multiplier), mask=(rows < T)[:, None] & (cells < columns)[None, :])
