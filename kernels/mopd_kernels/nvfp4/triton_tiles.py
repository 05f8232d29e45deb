# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""Loads and stores of tiles of A rows and B blocks: fp32 halves ``[A, B, 8]`` in, codes and scales ``[A, B]`` out.

"Row" and "block" are of the matrix that is quantized, ``x`` or ``x.T``; ``row [A]`` and ``block [B]`` are numbers,
``inside [A, B]`` says which exist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.nvfp4.triton_codes import bf16_bits, join8, maximum, rounded
from mopd_kernels.triton_common import INTERPRET


@triton.jit
def places(row, block, stride):
    """Where the first halves of blocks along rows of memory lie, ``[A, B, 8]``."""
    first = row.to(tl.int64)[:, None] * stride + block[None, :] * 16
    return first[:, :, None] + tl.arange(0, 8)[None, None, :]


@triton.jit
def masks(block, inside, width, RAGGED: tl.constexpr):
    """Of the elements of the first and second halves, those that exist."""
    mask0 = inside[:, :, None]
    mask1 = mask0
    if RAGGED:
        column = block[None, :, None] * 16 + tl.arange(0, 8)[None, None, :]
        mask0, mask1 = mask0 & (column < width), mask0 & (column + 8 < width)
    return mask0, mask1


@triton.jit
def load_fp32(at, mask):
    """What lies at ``at`` as fp32, 0 without the mask."""
    if at.dtype.element_ty == tl.bfloat16:  # as integers, else the device takes two instructions for every other one
        bits = tl.load(at.to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0)
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(x, stride, width, row, block, inside, RAGGED: tl.constexpr):
    """Of blocks along the rows of ``x``; 0 outside and from ``width`` on."""
    if x.dtype.element_ty == tl.float32:
        return _load_quarters(x, stride, width, row, block, inside, 0, RAGGED), _load_quarters(
            x, stride, width, row, block, inside, 8, RAGGED
        )
    else:
        at = x + places(row, block, stride)
        mask0, mask1 = masks(block, inside, width, RAGGED)
        return load_fp32(at, mask0), load_fp32(at + 8, mask1)


@triton.jit
def _load_quarters(x, stride, width, row, block, inside, FIRST: tl.constexpr, RAGGED: tl.constexpr):
    """A half of fp32: 16 bytes are four of its eight, and two loads of one thread keep it in that thread."""
    element = FIRST + tl.arange(0, 4)[None, None, :]
    at = x + (row.to(tl.int64)[:, None] * stride + block[None, :] * 16)[:, :, None] + element
    mask0 = inside[:, :, None]
    mask1 = mask0
    if RAGGED:
        column = block[None, :, None] * 16 + element
        mask0, mask1 = mask0 & (column < width), mask0 & (column + 4 < width)
    both = tl.join(tl.load(at, mask=mask0, other=0.0), tl.load(at + 4, mask=mask1, other=0.0))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (both.shape[0], both.shape[1], 8))


@triton.jit
def load_columns(x, stride, width, row, block, inside, RAGGED: tl.constexpr):
    """Of blocks along the columns of ``x``."""
    x0 = _load_half(x, stride, width, row, block * 16, inside, RAGGED)
    return x0, _load_half(x, stride, width, row, block * 16 + 8, inside, RAGGED)


@triton.jit
def _load_half(x, stride, width, row, first, inside, RAGGED: tl.constexpr):
    at = x + first.to(tl.int64)[None, :] * stride + row[:, None]
    x0 = _load_one(at, stride, width, first, inside, 0, RAGGED)
    x1 = _load_one(at, stride, width, first, inside, 1, RAGGED)
    x2 = _load_one(at, stride, width, first, inside, 2, RAGGED)
    x3 = _load_one(at, stride, width, first, inside, 3, RAGGED)
    x4 = _load_one(at, stride, width, first, inside, 4, RAGGED)
    x5 = _load_one(at, stride, width, first, inside, 5, RAGGED)
    x6 = _load_one(at, stride, width, first, inside, 6, RAGGED)
    x7 = _load_one(at, stride, width, first, inside, 7, RAGGED)
    return join8(x0, x1, x2, x3, x4, x5, x6, x7)


@triton.jit
def _load_one(at, stride, width, first, inside, ELEMENT: tl.constexpr, RAGGED: tl.constexpr):
    mask = inside
    if RAGGED:
        mask = mask & (first + ELEMENT < width)[None, :]
    return load_fp32(at + ELEMENT * stride, mask)


@triton.jit
def squared_relu(x, DTYPE: tl.constexpr):
    """max(x, 0)^2 as DTYPE holds it, in fp32."""
    x = maximum(x, 0.0)
    return rounded(x * x, DTYPE)


@triton.jit
def normed(x, rstd, weight, DTYPE: tl.constexpr):
    """(x rstd) weight as DTYPE holds it, in fp32."""
    return rounded((x * rstd) * weight, DTYPE)


@triton.jit
def load_weight(weight, width, block, inside, RAGGED: tl.constexpr):
    """Halves ``[1, B, 8]`` of one row, fp32."""
    at = weight + places(tl.arange(0, 1), block, 0)
    mask0, mask1 = masks(block, inside, width, RAGGED)
    return load_fp32(at, mask0), load_fp32(at + 8, mask1)


@triton.jit
def store_codes(codes, w0, w1, run, inside):
    """``codes``: int32, two words for each run of 16."""
    words = tl.join(w0, w1).to(tl.int32, bitcast=True)
    tl.store(codes + run[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], words, mask=inside[:, :, None])


@triton.jit
def store_scales(scales, bits, row_tile, block_tile, run, blocks, inside, SWIZZLED: tl.constexpr):
    """``scales``: uint8, linear, or in tiles of 128 rows and 4 blocks, which are written with their padding."""
    if SWIZZLED:
        A: tl.constexpr = bits.shape[0]
        B: tl.constexpr = bits.shape[1]
        tl.static_assert(A == 128 and B % 4 == 0, "tiles of 128x4 scales must be whole")
        tiles = tl.reshape(tl.where(inside, bits, 0), (4, 32, B // 4, 4))
        line = tl.reshape(tl.permute(tiles, (2, 1, 0, 3)), (B * 128,))
        at = block_tile * (B * 128) + tl.arange(0, B * 128)
        size = tl.cdiv(blocks, 4) * 512
        tl.store(scales + row_tile.to(tl.int64) * size + at, line, mask=at < size)
    else:
        tl.store(scales + run, bits, mask=inside)


@triton.jit
def swizzled_place(row, block, blocks):
    """Where the scale of a row and a block lies in tiles of 128x4."""
    tile = (row.to(tl.int64) // 128)[:, None] * tl.cdiv(blocks, 4) + (block // 4)[None, :]
    return tile * 512 + (row % 32 * 16 + row % 128 // 32 * 4)[:, None] + (block % 4)[None, :]


@triton.jit
def store_halves(out, y0, y1, stride, width, row, block, inside, RAGGED: tl.constexpr):
    """Elements along rows of memory, in the dtype of ``out``."""
    at = out + places(row, block, stride)
    mask0, mask1 = masks(block, inside, width, RAGGED)
    if INTERPRET and out.dtype.element_ty == tl.bfloat16:
        at = at.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(at, bf16_bits(y0), mask=mask0)
        tl.store(at + 8, bf16_bits(y1), mask=mask1)
    else:
        tl.store(at, y0.to(out.dtype.element_ty), mask=mask0)
        tl.store(at + 8, y1.to(out.dtype.element_ty), mask=mask1)
