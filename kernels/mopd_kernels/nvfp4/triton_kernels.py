# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""The NVFP4 kernels. A program takes one tile of A rows and B blocks of 16, so 16 A B elements, of what is quantized.

That is ``x`` or ``x.T``: "row" and "block" are of the matrix that is quantized, and the columns of ``x`` differ only in
how a tile is loaded. ``KIND`` is a :class:`mopd_kernels.nvfp4.triton_numerics.Kind`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.nvfp4.triton_blocks import block_amax, choose_scale, cut, encode, round_trip, transformed
from mopd_kernels.nvfp4.triton_codes import EXPONENT, e2m1_value, unpack8
from mopd_kernels.nvfp4.triton_numerics import LARGEST, decode_scale
from mopd_kernels.nvfp4.triton_tiles import (
    load_columns,
    load_fp32,
    load_rows,
    load_weight,
    normed,
    squared_relu,
    store_codes,
    store_halves,
    store_scales,
    swizzled_place,
)


@triton.jit
def quantize_kernel(
    x,  # [rows, width], or [width, rows] with COLUMNS; rows of memory `stride` elements apart
    rstd,  # fp32 [rows] and weight [width] of the RMS norm that makes the elements, else None
    weight,
    amax,  # fp32 [], of the elements
    global_scale,  # fp32 [], as the numerics store it
    codes,  # int32 [rows, 2 blocks]
    scales,  # uint8
    flag,  # int32 [] that becomes 1 where an element is not finite, or None
    rows,
    width,
    stride,
    blocks,
    seed,
    A: tl.constexpr,
    B: tl.constexpr,
    COLUMNS: tl.constexpr,
    SWIZZLED: tl.constexpr,
    KIND: tl.constexpr,
):
    tiles = tl.cdiv(blocks, B)
    row_tile, block_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, block, inside = numbers(row_tile, block_tile, rows, blocks, A, B)
    x0, x1 = load(x, rstd, weight, stride, width, row, block, inside, COLUMNS, KIND)
    out = (amax, global_scale, codes, scales, flag, seed)
    quantize_tile(x0, x1, out, row_tile, block_tile, row, block, inside, width, blocks, SWIZZLED, KIND)


@triton.jit
def quantize_both_kernel(
    x,  # [R, K], rows `stride` elements apart
    of_rows,  # (amax, global_scale, codes, scales, flag, seed) as in quantize_kernel
    of_columns,
    R,
    K,
    stride,
    row_blocks,
    column_blocks,
    A: tl.constexpr,  # rows and columns of a tile
    ROWS_SWIZZLED: tl.constexpr,
    COLUMNS_SWIZZLED: tl.constexpr,
    ROWS: tl.constexpr,  # Kind
    COLUMNS: tl.constexpr,
):
    """A tile of ``x`` as rows and as columns; it is in L1 when it is looked at for the second time."""
    tiles = tl.cdiv(K, A)
    down, across = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, block, inside = numbers(down, across, R, row_blocks, A, A // 16)
    x0, x1 = load(x, None, None, stride, K, row, block, inside, False, ROWS)
    quantize_tile(x0, x1, of_rows, down, across, row, block, inside, K, row_blocks, ROWS_SWIZZLED, ROWS)
    tl.debug_barrier()  # else both are loaded first, for which there are no registers
    row, block, inside = numbers(across, down, K, column_blocks, A, A // 16)
    x0, x1 = load(x, None, None, stride, R, row, block, inside, True, COLUMNS)
    quantize_tile(x0, x1, of_columns, across, down, row, block, inside, R, column_blocks, COLUMNS_SWIZZLED, COLUMNS)


@triton.jit
def round_trip_kernel(
    x,
    amax,
    global_scale,
    out,  # [rows, width], rows `out_stride` elements apart
    flag,
    rows,
    width,
    stride,
    out_stride,
    blocks,
    seed,
    A: tl.constexpr,
    B: tl.constexpr,
    KIND: tl.constexpr,
):
    """Quantizes and dequantizes; arguments as in quantize_kernel."""
    tiles = tl.cdiv(blocks, B)
    row_tile, block_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, block, inside = numbers(row_tile, block_tile, rows, blocks, A, B)
    x0, x1 = load(x, None, None, stride, width, row, block, inside, False, KIND)
    flag_nonfinite(flag, x0, x1)
    scale = tl.load(global_scale)
    bits, factor = choose_scale(x0, x1, amax, scale, KIND)
    run = row.to(tl.int64)[:, None] * blocks + block[None, :]
    y0, y1 = round_trip(x0, x1, factor, seed, run, KIND)
    by = tl.expand_dims(decode_scale(bits, scale, KIND.numerics, KIND.bound), -1)
    store_halves(out, y0 * by, y1 * by, out_stride, width, row, block, inside, KIND.ragged)


@triton.jit
def dequantize_kernel(
    codes,
    scales,
    global_scale,
    out,  # [rows, width], dense
    rows,
    width,
    blocks,
    A: tl.constexpr,
    B: tl.constexpr,
    SWIZZLED: tl.constexpr,
    RAGGED: tl.constexpr,
    NUMERICS: tl.constexpr,
    BOUND: tl.constexpr,
):
    tiles = tl.cdiv(blocks, B)
    row_tile, block_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, block, inside = numbers(row_tile, block_tile, rows, blocks, A, B)
    run = row.to(tl.int64)[:, None] * blocks + block[None, :]
    words = tl.load(codes + run[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], mask=inside[:, :, None], other=0)
    w0, w1 = tl.split(words.to(tl.uint32, bitcast=True))
    at = run
    if SWIZZLED:
        at = swizzled_place(row, block, blocks)
    bits = tl.load(scales + at, mask=inside, other=0)
    by = tl.expand_dims(decode_scale(bits, tl.load(global_scale), NUMERICS, BOUND), -1)
    y0, y1 = e2m1_value(unpack8(w0)) * by, e2m1_value(unpack8(w1)) * by
    store_halves(out, y0, y1, width, width, row, block, inside, RAGGED)


@triton.jit
def tile_amax_kernel(
    x,
    rstd,
    weight,
    amax,  # int32 []: bits of fp32 0
    rows,
    width,
    stride,
    blocks,
    A: tl.constexpr,
    B: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
):
    """The largest magnitude of the elements that quantize_kernel makes blocks of."""
    tiles = tl.cdiv(blocks, B)
    row_tile, block_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, block, inside = numbers(row_tile, block_tile, rows, blocks, A, B)
    x0, x1 = load(x, rstd, weight, stride, width, row, block, inside, COLUMNS, KIND)
    raise_amax(amax, block_amax(x0, x1, KIND))


@triton.jit
def raise_amax(amax, found):
    """``amax`` to the largest of ``found [A, B]``: bits of magnitudes are ordered as they are, with NaN above all."""
    raise_bits(amax, tl.max(tl.max(found.to(tl.int32, bitcast=True), 1), 0))


@triton.jit
def raise_bits(amax, bits):
    tl.atomic_max(amax, tl.where(bits > EXPONENT, 0x7FC00000, bits), sem="relaxed")  # one NaN, whatever its bits were


@triton.jit
def flat_amax_kernel(x, amax, size, BLOCK: tl.constexpr, NUMBERS: tl.constexpr):
    """Of ``size`` elements one after the other; NUMBERS leaves out NaN."""
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits = load_fp32(x + at, at < size).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if NUMBERS:
            bits = tl.where(bits > EXPONENT, 0, bits)
        largest = tl.maximum(largest, bits)
    raise_bits(amax, tl.max(largest, 0))


@triton.jit
def numbers(row_tile, block_tile, rows, blocks, A: tl.constexpr, B: tl.constexpr):
    """``(row [A], block [B], inside [A, B])`` of a tile."""
    row, block = row_tile * A + tl.arange(0, A), block_tile * B + tl.arange(0, B)
    return row, block, (row < rows)[:, None] & (block < blocks)[None, :]


@triton.jit
def load(x, rstd, weight, stride, width, row, block, inside, COLUMNS: tl.constexpr, KIND: tl.constexpr):
    """The fp32 halves that are made into blocks."""
    if COLUMNS:
        x0, x1 = load_columns(x, stride, width, row, block, inside, KIND.ragged)
    else:
        x0, x1 = load_rows(x, stride, width, row, block, inside, KIND.ragged)
    if KIND.producer == "squared_relu":
        x0, x1 = squared_relu(x0, x.dtype.element_ty), squared_relu(x1, x.dtype.element_ty)
    elif KIND.producer == "rms_norm":
        by = tl.load(rstd + row, mask=tl.max(inside.to(tl.int32), 1) != 0, other=0.0)[:, None, None]
        w0, w1 = load_weight(weight, width, block, (block * 16 < width)[None, :], KIND.ragged)
        x0, x1 = normed(x0, by, w0, x.dtype.element_ty), normed(x1, by, w1, x.dtype.element_ty)
    return transformed(x0, x1, KIND)


@triton.jit
def quantize_tile(
    x0, x1, out, row_tile, block_tile, row, block, inside, width, blocks, SWIZZLED: tl.constexpr, KIND: tl.constexpr
):
    """Codes and scales of the tile with these halves."""
    amax, global_scale, codes, scales, flag, seed = out
    flag_nonfinite(flag, x0, x1)
    scale = tl.load(global_scale)
    bits, factor = choose_scale(x0, x1, amax, scale, KIND)
    run = row.to(tl.int64)[:, None] * blocks + block[None, :]
    w0, w1 = encode(x0, x1, factor, seed, run, KIND)
    if KIND.ragged:
        left = (width - block * 16)[None, :]
        w0, w1 = cut(w0, left), cut(w1, left - 8)
    store_codes(codes, w0, w1, run, inside)
    store_scales(scales, bits, row_tile, block_tile, run, blocks, inside, SWIZZLED)


@triton.jit
def flag_nonfinite(flag, x0, x1):
    if flag is not None:
        finite = (tl.abs(x0) <= LARGEST) & (tl.abs(x1) <= LARGEST)
        tl.atomic_max(flag, 1 - tl.min(tl.min(tl.min(finite.to(tl.int32), 2), 1), 0), sem="relaxed")
