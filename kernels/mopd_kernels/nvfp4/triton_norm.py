# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""RMS norm to NVFP4: kernels that hold a row, its halves ``[1, B, 8]``, from its statistics to its codes.

The sum of squares is taken in fp32 within a block, in an order that producers.py shares, and in fp64 over blocks, so
that no other order shows in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.nvfp4.triton_blocks import block_amax, choose_scale, cut, encode, transformed
from mopd_kernels.nvfp4.triton_codes import split8
from mopd_kernels.nvfp4.triton_kernels import flag_nonfinite, raise_amax
from mopd_kernels.nvfp4.triton_tiles import load_rows, load_weight, normed, store_codes, swizzled_place


@triton.jit
def norm_statistics_kernel(
    x,  # [rows, width], rows `stride` elements apart
    weight,
    eps,
    rstd,  # fp32 [rows]
    amax,  # int32 []: bits of fp32 0, or None
    width,
    stride,
    blocks,
    B: tl.constexpr,  # a power of two, at least `blocks`
    KIND: tl.constexpr,
):
    """``rstd`` and the largest magnitude of the normed elements."""
    row = tl.program_id(0)
    x0, x1, by = _normed_row(x, weight, eps, row, width, stride, blocks, B, amax is None, KIND)
    tl.store(rstd + row, by)
    if amax is not None:
        raise_amax(amax, block_amax(x0, x1, KIND))


@triton.jit
def norm_quantize_kernel(
    x,  # [rows, width], rows `stride` elements apart
    weight,
    eps,
    amax,  # as in quantize_kernel
    global_scale,
    codes,
    scales,
    flag,
    width,
    stride,
    blocks,
    seed,
    B: tl.constexpr,
    SWIZZLED: tl.constexpr,
    KIND: tl.constexpr,
):
    """A row from ``x`` to codes and scales; padding of swizzled scales stays as it is."""
    row = tl.program_id(0)
    x0, x1, _ = _normed_row(x, weight, eps, row, width, stride, blocks, B, False, KIND)
    flag_nonfinite(flag, x0, x1)
    scale = tl.load(global_scale)
    bits, factor = choose_scale(x0, x1, amax, scale, KIND)
    rows, block = row + tl.arange(0, 1), tl.arange(0, B)
    inside = (block < blocks)[None, :]
    run = rows.to(tl.int64)[:, None] * blocks + block[None, :]
    w0, w1 = encode(x0, x1, factor, seed, run, KIND)
    if KIND.ragged:
        left = (width - block * 16)[None, :]
        w0, w1 = cut(w0, left), cut(w1, left - 8)
    store_codes(codes, w0, w1, run, inside)
    at = run
    if SWIZZLED:
        at = swizzled_place(rows, block, blocks)
    tl.store(scales + at, bits, mask=inside)


@triton.jit
def _normed_row(
    x, weight, eps, row, width, stride, blocks, B: tl.constexpr, STATISTICS: tl.constexpr, KIND: tl.constexpr
):
    """``(x0, x1, rstd)`` of a row, normed and transformed unless only the STATISTICS are wanted."""
    rows, block = row + tl.arange(0, 1), tl.arange(0, B)
    inside = (block < blocks)[None, :]
    x0, x1 = load_rows(x, stride, width, rows, block, inside, KIND.ragged)
    total = tl.sum(tl.sum((_sum8(x0 * x0) + _sum8(x1 * x1)).to(tl.float64), 1), 0).to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, width * 1.0) + eps))
    if not STATISTICS:
        w0, w1 = load_weight(weight, width, block, inside, KIND.ragged)
        x0, x1 = normed(x0, rstd, w0, x.dtype.element_ty), normed(x1, rstd, w1, x.dtype.element_ty)
        x0, x1 = transformed(x0, x1, KIND)
    return x0, x1, rstd


@triton.jit
def _sum8(x):
    x0, x1, x2, x3, x4, x5, x6, x7 = split8(x)
    return ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
