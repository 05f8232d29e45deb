"""Triton kernels behind linear_triton.py: tiles of logits that never reach memory, and what joins their rows.

Exponents are kept to base 2 (``factor = log2(e) / temperature`` turns an accumulator into a logit of that base), and
logits relative to a number per row: the tile's own maximum, or a *guide* known beforehand. With a guide near the
row's log-sum-exp neither a running maximum nor a rescale is needed, so that ``E = exp(z - guide)`` can be written once,
straight from the accumulators, and becomes the gradient of the logits by a factor per row.

Targets come as ``places``: int32 ``[T]``, the target's column in this shard, -1 where another shard holds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.linear_operand_kernels import operand_tile
from mopd_kernels.triton_common import cast, dot, surrogate_rows

OUTSIDE = tl.constexpr(-1e30)
"""Logit of a column outside the vocabulary: exp2 makes 0 of it, and 0 times it is 0 as well."""
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def logit_tiles_kernel(
    hidden,  # descriptor [T, H], or packed (operand_tile)
    weight,  # descriptor [columns, H]: beyond them it reads zeros, whatever the padding holds; or packed
    hidden_scales,  # of packed hidden, else None
    weight_scales,
    multiplier,  # fp32 [1] where one of them is packed
    exponentials,  # descriptor [T, columns] of E, or None
    guide,  # fp32 [T] to base 2, or None: each tile's maximum
    places,
    target,  # out, fp32 [T]: the target's logit less the guide, base 2, where it lies here
    sums,  # out, fp32 [2 or 3, column tiles, T]: sum 2^d, sum 2^d d, and without a guide the maxima; None: not wanted
    T,
    columns,
    H,
    factor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """Statistics of ``d = logit - guide`` for every tile ``[ROWS, COLUMNS]``, and E.

    Persistent: each program takes every PROGRAMS-th tile, so that the loads of the next tile run ahead of the
    epilogue of this one. Tiles go through GROUP row blocks before the next columns: what a wave of programs reads of
    either operand then stays in L2. The first use of the accumulator must stand outside every condition: from within
    one, the wait for it moves there too, and ptxas serialises the wgmma of the whole loop.
    """
    tl.assume(H > 0)  # else the flattened loop carries a second epilogue for an empty sum
    if multiplier is not None:
        factor *= tl.load(multiplier)
    row_tiles = tl.cdiv(T, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        height = min(row_tiles - first, GROUP)
        within = tile % (GROUP * column_tiles)
        row = (first + within % height) * ROWS
        column_tile = within // height
        column = column_tile * COLUMNS
        accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.range(0, H, DEPTH):
            a = operand_tile(hidden, hidden_scales, row, T, k, H, ROWS, DEPTH, DTYPE, UNIT, False)
            b = operand_tile(weight, weight_scales, column, columns, k, H, COLUMNS, DEPTH, DTYPE, UNIT, SWIZZLED)
            accumulator = dot(a, b.T, accumulator)
        rows = row + tl.arange(0, ROWS)
        inside = rows < T
        origin = None
        if guide is not None:
            origin = tl.load(guide + rows, mask=inside, other=0.0)
        place = tl.load(places + rows, mask=inside, other=-1) - column
        hit = tl.max(((place >= 0) & (place < COLUMNS)).to(tl.int32), 0) > 0
        top, total, weighted = tile_statistics(
            accumulator, exponentials, origin, place, hit, target, rows, row, column, columns - column, factor, PARTS
        )
        if sums is not None:
            at = sums + column_tile.to(tl.int64) * T + rows
            tl.store(at, total, mask=inside)
            tl.store(at + column_tiles * T, weighted, mask=inside)
            if guide is None:
                tl.store(at + 2 * column_tiles * T, top, mask=inside)


@triton.jit
def tile_statistics(
    accumulator, exponentials, origin, place, hit, target, rows, row, column, rest, factor, PARTS: tl.constexpr
):
    """``(maximum, sum 2^d, sum 2^d d)`` per row, by PARTS pieces of the columns: one piece at a time fits registers."""
    N: tl.constexpr = accumulator.shape[1]
    if PARTS > 1:
        left, right = _halves(accumulator)  # pyright: ignore[reportGeneralTypeIssues]
        top, total, weighted = tile_statistics(
            left, exponentials, origin, place, hit, target, rows, row, column, rest, factor, PARTS // 2
        )
        place -= N // 2
        rest -= N // 2
        column += N // 2
        top_r, total_r, weighted_r = tile_statistics(
            right, exponentials, origin, place, hit, target, rows, row, column, rest, factor, PARTS // 2
        )
        if origin is not None:
            return top, total + total_r, weighted + weighted_r
        else:
            return _join(top, total, weighted, top_r, total_r, weighted_r)
    else:
        d = accumulator * factor
        if origin is not None:
            d -= origin[:, None]
        if rest < N:
            d = tl.where(tl.arange(0, N)[None, :] < rest, d, OUTSIDE)
        if hit:
            tl.store(target + rows, _pick(d, place), mask=(place >= 0) & (place < N))
        top = 0.0
        if origin is None:
            top = tl.max(d, 1)
            d -= top[:, None]
        e = tl.exp2(d)
        if exponentials is not None:
            exponentials.store([row, column], cast(e, exponentials.dtype))
        return top, tl.sum(e, 1), tl.sum(e * d, 1)


@triton.jit
def _join(top, total, weighted, top_r, total_r, weighted_r):
    """Sums relative to two maxima, relative to the larger."""
    both = tl.maximum(top, top_r)
    scale = tl.exp2(top - both)
    scale_r = tl.exp2(top_r - both)
    weighted = (weighted + (top - both) * total) * scale + (weighted_r + (top_r - both) * total_r) * scale_r
    return both, total * scale + total_r * scale_r, weighted


@triton.jit
def _halves(x):
    """Left and right half of the columns: a choice of registers, no data moves."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _pick(x, place):
    """``x[t, place[t]]``, halving the columns: comparing each with ``place`` would keep all column numbers alive
    through the loop over tiles, at the price of a third of the registers."""
    N: tl.constexpr = x.shape[1]
    if N > 8:
        left, right = _halves(x)  # pyright: ignore[reportGeneralTypeIssues]
        return _pick(tl.where((place % N >= N // 2)[:, None], right, left), place)
    else:
        return tl.sum(tl.where(tl.arange(0, N)[None, :] == (place % N)[:, None], x, 0.0), 1)


@triton.jit
def join_tiles_kernel(
    sums,
    target,
    places,
    out,  # fp32 [3, T], rows `stride` apart
    stride,
    T,
    tiles,
    GUIDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Joins the tiles of a row: ``(sum e^d, sum e^d d, the target's d)`` where guided, else ``(log-sum-exp, the
    target's logit, mean log-probability)``; natural logarithms, 0 for a target that lies elsewhere."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < T
    top = tl.full([ROWS], OUTSIDE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        at = sums + tile.to(tl.int64)[:, None] * T + rows[None, :]
        mask = (tile < tiles)[:, None] & inside[None, :]
        part = tl.load(at, mask=mask, other=0.0)
        part_weighted = tl.load(at + tiles * T, mask=mask, other=0.0)
        maxima = tl.zeros([TILES, ROWS], tl.float32)
        if not GUIDED:
            maxima = tl.load(at + 2 * tiles * T, mask=mask, other=OUTSIDE)
        here = tl.max(maxima, 0)
        scale = tl.exp2(maxima - here[None, :])
        part_weighted = tl.sum((part_weighted + (maxima - here[None, :]) * part) * scale, 0)
        top, total, weighted = _join(top, total, weighted, here, tl.sum(part * scale, 0), part_weighted)
    held = inside & (tl.load(places + rows, mask=inside, other=-1) >= 0)
    logit = tl.load(target + rows, mask=held, other=0.0) * LOG_2
    if GUIDED:
        tl.store(out + rows, total, mask=inside)
        tl.store(out + stride + rows, weighted * LOG_2, mask=inside)
        tl.store(out + 2 * stride + rows, logit, mask=inside)
    else:
        tl.store(out + rows, (top + tl.log2(total)) * LOG_2, mask=inside)
        tl.store(out + stride + rows, logit, mask=inside)
        tl.store(out + 2 * stride + rows, (weighted / total - tl.log2(total)) * LOG_2, mask=inside)


@triton.jit
def target_logits_kernel(
    hidden, weight, places, out, hidden_stride, weight_stride, T, H, factor, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """The target's logit to base 2 where it lies here, else 0: what the guide is made of, before any product."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.load(places + rows, mask=rows < T, other=-1).to(tl.int64)
    held = (place >= 0)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, H, DEPTH):
        k = first + tl.arange(0, DEPTH)[None, :]
        mask = held & (k < H)
        x = tl.load(hidden + rows[:, None] * hidden_stride + k, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + place[:, None] * weight_stride + k, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * w, 1)
    tl.store(out + rows, total * factor, mask=rows < T)


@triton.jit
def objective_rows_kernel(
    sums,  # fp32 [SHARDS, 3, n]: sum e^d, sum e^d d, the target's d
    exponentials,  # [n, columns] of E, rows `stride` apart, or None: no gradient is formed from it
    places,
    scale,  # out, fp32 [n]: what multiplies a row of E
    overflowed,  # out, int8 [T], or None
    metrics,
    log_ratios,
    first,  # row of the batch that is row 0 here
    n,
    columns,
    stride,
    T,
    K,
    gradient,  # d loss / d logit for d loss / d logprob = -1, without the softmax
    bound,  # nats that log(sum e^d) may be off 0 before the row is told to overflow
    known,
    factors,
    SHARDS: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    ON_POLICY: tl.constexpr,
    CLIP_ADVANTAGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From a row's joined sums to its metrics and to its gradient.

    With S = sum e^d the softmax is E / S, so that d loss / d z = scale (E - S onehot) for
    ``scale = -coefficient gradient / S``. E at the target becomes e^d - S here, in fp32, rounded once. A row whose sum
    left the range in which E is exact gets a row of zeros and a mark: it is done again from its true log-sum-exp.
    """
    here = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = here < n
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    logit = tl.zeros([ROWS], tl.float32)
    for shard in range(SHARDS):
        at = sums + shard * 3 * n + here
        total += tl.load(at, mask=valid, other=1.0)
        weighted += tl.load(at + n, mask=valid, other=0.0)
        logit += tl.load(at + 2 * n, mask=valid, other=0.0)
    lse = tl.log(total)
    rows = first + here
    coefficient = surrogate_rows(
        rows, valid, logit - lse, lse - weighted / total, known, metrics, log_ratios, T, K, factors,
        IMPORTANCE, ON_POLICY, CLIP_ADVANTAGE,
    )  # fmt: skip
    fits = (lse >= -bound) & (lse <= bound)  # false of NaN
    tl.store(scale + here, tl.where(fits & (coefficient != 0.0), -coefficient * gradient / total, 0.0), mask=valid)
    if overflowed is not None:
        tl.store(overflowed + rows, (fits == 0).to(tl.int8), mask=valid)
    if exponentials is not None:
        place = tl.load(places + here, mask=valid, other=-1)
        at = exponentials + here * stride
        value = cast(tl.exp(logit) - total, exponentials.dtype.element_ty)
        tl.store(at + place, value, mask=valid & fits & (place >= 0))
        lost = valid & (fits == 0)
        if tl.max(lost.to(tl.int32), 0) > 0:
            for column in range(0, columns, COLUMNS):
                cells = column + tl.arange(0, COLUMNS)
                mask = lost[:, None] & (cells < columns)[None, :]
                zeros = tl.zeros([ROWS, COLUMNS], exponentials.dtype.element_ty)
                tl.store(at[:, None] + cells[None, :], zeros, mask=mask)


@triton.jit
def subtract_onehot_kernel(exponentials, stride, target, places, n, ROWS: tl.constexpr):
    """E at the target less 1, from the fp32 logit: E was the softmax and becomes d (-logprob) / d z."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.load(places + rows, mask=rows < n, other=-1)
    probability = tl.exp2(tl.load(target + rows, mask=place >= 0, other=0.0))
    at = exponentials + rows * stride + place
    tl.store(at, cast(probability - 1.0, exponentials.dtype.element_ty), mask=place >= 0)


@triton.jit
def scale_rows_kernel(x, scale, out, x_stride, out_stride, out_step, n, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``out[t] = scale[t] x[t]`` for ``[n, H]``, rounded once; 0 where scale is 0, whatever x holds."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < n)[:, None] & (columns < H)[None, :]
    factor = tl.load(scale + rows, mask=rows < n, other=0.0)[:, None]
    value = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    at = out + rows[:, None] * out_stride + columns[None, :] * out_step
    value = tl.where(factor == 0.0, 0.0, value * factor)
    tl.store(at, cast(value, out.dtype.element_ty), mask=mask)
