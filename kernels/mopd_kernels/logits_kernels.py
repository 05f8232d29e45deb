"""Triton kernels over the rows of materialised logits ``[T, V/tp]``; what they compute is in logits.py.

A row is walked in blocks ``[LANES, VECTOR]``: a lane loads 16 bytes (VECTOR elements) at a time and keeps running
numbers of its own, in the registers of one thread, until lanes meet at the end of the row. (Of a block with more
dimensions, versions of Triton differ in which they keep within a thread.) Exponents are base 2 and relative to a
running maximum, ``t = scale z - top`` with ``scale = log2(e) / temperature``. So a row comes down to three numbers,
and two parts of a row join by theirs:

    top = max_v scale z_v        sum0 = sum_v 2^t_v        sum1 = sum_v 2^t_v t_v

logprob = ln 2 (t_y - log2 sum0)        entropy = ln 2 (log2 sum0 - sum1 / sum0)        p_v = 2^t_v / sum0

``t`` is one fused multiply-add with one and the same rounded ``top`` everywhere, so rounding ``top`` cancels: logits of
1e4 lose nothing. Nothing of the size of a row leaves the registers but the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.triton_common import ALL, cast, surrogate_rows

EMPTY = tl.constexpr(-1e30)  # `top` of no columns: finite, so that the difference of two is no NaN
LEAST = tl.constexpr(-1e4)  # of `t`: 2^t is 0 all the same, and 2^t t no NaN where a logit is -inf
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def statistics_kernel(
    logits,  # [T, >= columns], rows `stride` elements apart
    targets,  # int64 [T], global
    keep,  # bool [T] or None
    parts,  # fp32 [4, T]: top, sum0, sum1 of this shard, the target's logit (0 where another shard holds it)
    T,
    columns,  # valid ones of this shard
    readable,  # >= columns: what may be read of a row, so that the last valid columns are read in whole vectors
    stride,
    start,  # global number of the first column
    scale,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One row per program, read once; rows out of `keep` are neither read nor written."""
    row = tl.program_id(0).to(tl.int64)
    if is_kept(keep, row):
        values = logits + row * stride
        target = target_logit(values, tl.load(targets + row) - start, columns)
        top, sum0, sum1 = reduce_row(values, columns, readable, scale, LANES, VECTOR, "")
        at = row * 0 + T
        tl.store(parts + row, top)
        tl.store(parts + row + at, sum0)
        tl.store(parts + row + 2 * at, sum1)
        tl.store(parts + row + 3 * at, target)


@triton.jit
def finish_kernel(
    parts,  # fp32 [RANKS, 4, T]
    keep,
    statistics,  # fp32 [3, T]: logprob, entropy, log-sum-exp
    T,
    scale,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of the whole vocabulary from those of its shards; zeros for rows out of `keep`."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < T
    kept = valid
    if keep is not None:
        kept = kept & (tl.load(keep + rows, mask=valid, other=0) != 0)
    top, sum0, sum1, target = join_parts(parts, rows, kept, T, RANKS)  # pyright: ignore[reportGeneralTypeIssues]
    logprob, entropy = finish(top, sum0, sum1, target, scale)
    lse = (top + tl.log2(sum0)) * LN2
    at = rows * 0 + T
    tl.store(statistics + rows, tl.where(kept, logprob, 0.0), mask=valid)
    tl.store(statistics + rows + at, tl.where(kept, entropy, 0.0), mask=valid)
    tl.store(statistics + rows + 2 * at, tl.where(kept, lse, 0.0), mask=valid)


@triton.jit
def objective_kernel(
    logits,  # [T, width], rows `stride` elements apart
    gradient,  # the same, `gradient_stride` apart, or the logits themselves, or None: not wanted
    parts,  # fp32 [RANKS, 4, T] of all shards, or None: this shard is all and the row is read here
    targets,
    keep,
    known,  # tuples for surrogate_rows
    metrics,  # fp32 [len(METRICS), T] and [K, T], zeros
    log_ratios,
    T,
    K,
    width,
    columns,
    readable,
    stride,
    gradient_stride,
    start,
    scale,
    inverse_temperature,
    factors,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    ON_POLICY: tl.constexpr,
    CLIP_ADVANTAGE: tl.constexpr,
):
    """One row per program: statistics, metrics, gradient. A row whose gradient is zero is not read for it."""
    row = tl.program_id(0).to(tl.int64)
    if parts is not None:
        row = T - 1 - row  # what the first launch read last is still in L2
    values = logits + row * stride
    out = gradient
    if gradient is not None:
        out = gradient + row * gradient_stride
    if is_kept(keep, row):
        valid = row < T
        local = tl.load(targets + row) - start
        if parts is None:
            # Loaded before the barriers of the reduction, after which the gradient may take its place.
            target = target_logit(values, local, columns)
            again: tl.constexpr = "" if gradient is None else "evict_last"
            top, sum0, sum1 = reduce_row(values, columns, readable, scale, LANES, VECTOR, again)
        else:
            top, sum0, sum1, target = join_parts(parts, row, valid, T, RANKS)
        logprob, entropy = finish(top, sum0, sum1, target, scale)
        coefficient = inverse_temperature * surrogate_rows(
            row,
            valid,
            logprob,
            entropy,
            known,
            metrics,
            log_ratios,
            T,
            K,
            factors,
            IMPORTANCE,
            ON_POLICY,
            CLIP_ADVANTAGE,
        )
        if gradient is not None:
            row_numbers = (scale, top, sum0, logprob, coefficient, local)
            write_gradient(values, out, row_numbers, width, columns, readable, LANES, VECTOR)
    else:
        if gradient is not None:
            write_zeros(out, width, LANES, VECTOR)


@triton.jit
def scale_kernel(
    gradient,  # [T, width], rows `stride` elements apart
    factor,  # fp32, one number on the device
    width,
    stride,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``gradient *= factor``; where that is 1 nothing is read, which the host need not know."""
    values = gradient + tl.program_id(0).to(tl.int64) * stride
    by = tl.load(factor)
    if by != 1.0:
        for start in range(0, width, LANES * VECTOR):
            at = start + block(LANES, VECTOR)
            scaled = tl.load(values + at, mask=at < width, other=0.0).to(tl.float32) * by
            tl.store(values + at, cast(scaled, values.dtype.element_ty), mask=at < width)


@triton.jit
def reduce_row(
    values,
    columns,
    readable,
    scale,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    eviction,  # policy of the loads
):
    """``(top, sum0, sum1)`` of one row."""
    offsets = block(LANES, VECTOR)
    whole = columns // (LANES * VECTOR) * (LANES * VECTOR)
    tops = tl.full([LANES], EMPTY, tl.float32)
    sums0 = tl.zeros([LANES], tl.float32)
    sums1 = tl.zeros([LANES], tl.float32)
    for start in range(0, whole, LANES * VECTOR):
        z = tl.load(values + start + offsets, eviction_policy=eviction).to(tl.float32)
        tops, sums0, sums1 = fold(z, scale, tops, sums0, sums1)
    if whole < columns:
        z = load_ragged(values, whole + offsets, columns, readable, eviction)
        tops, sums0, sums1 = fold(z, scale, tops, sums0, sums1)
    top = tl.max(tops, axis=0)
    shift = tops - top
    share = tl.exp2(shift)
    return top, tl.sum(share * sums0, axis=0), tl.sum(share * (sums1 + shift * sums0), axis=0)


@triton.jit
def fold(z, scale, tops, sums0, sums1):
    """The lanes' running numbers with one more block of fp32 logits."""
    new = tl.maximum(tops, scale * tl.max(z, axis=1))
    # A NaN must come through: a plain maximum would hide it.
    t = tl.maximum(tl.fma(z, scale, -new[:, None]), LEAST, propagate_nan=ALL)
    e = tl.exp2(t)
    shift = tops - new
    share = tl.exp2(shift)
    sums1 = share * (sums1 + shift * sums0) + tl.sum(e * t, axis=1)
    return new, share * sums0 + tl.sum(e, axis=1), sums1


@triton.jit
def join_parts(parts, rows, valid, T, RANKS: tl.constexpr):
    """``(top, sum0, sum1, target)`` of the whole vocabulary, joined in rank order."""
    at = rows * 0 + T
    top = tl.load(parts + rows, mask=valid, other=0.0)
    for rank in range(1, RANKS):
        top = tl.maximum(top, tl.load(parts + rows + 4 * rank * at, mask=valid, other=0.0))
    sum0, sum1, target = top * 0.0, top * 0.0, top * 0.0
    for rank in range(RANKS):
        part = parts + rows + 4 * rank * at
        shift = tl.load(part, mask=valid, other=0.0) - top
        share = tl.exp2(shift)
        part0 = tl.load(part + at, mask=valid, other=1.0)
        sum0 += share * part0
        sum1 += share * (tl.load(part + 2 * at, mask=valid, other=0.0) + shift * part0)
        target += tl.load(part + 3 * at, mask=valid, other=0.0)
    return top, sum0, sum1, target


@triton.jit
def finish(top, sum0, sum1, target, scale):
    """``(logprob, entropy)`` in nats."""
    size = tl.log2(sum0)
    return (tl.fma(target, scale, -top) - size) * LN2, (size - sum1 / sum0) * LN2


@triton.jit
def write_gradient(values, out, numbers, width, columns, readable, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """``out_v = coefficient (1[v = local] - p_v)``, 0 for padding and, without a look at the logits, for coefficient 0.

    From the end of the row, which was read last and is surest to be in L2.
    """
    scale, top, sum0, logprob, coefficient, local = numbers
    if coefficient == 0.0:
        write_zeros(out, width, LANES, VECTOR)
    else:
        offsets = block(LANES, VECTOR)
        whole = columns // (LANES * VECTOR) * (LANES * VECTOR)
        factor = -coefficient / sum0
        for start in range(whole, width, LANES * VECTOR):
            at = start + offsets
            t = tl.fma(load_ragged(values, at, columns, readable, "evict_first"), scale, -top)
            tl.store(out + at, cast(factor * tl.exp2(t), out.dtype.element_ty), mask=at < width)
        for done in range(0, whole, LANES * VECTOR):
            at = whole - LANES * VECTOR - done + offsets
            t = tl.fma(tl.load(values + at, eviction_policy="evict_first").to(tl.float32), scale, -top)
            d_logits = cast(factor * tl.exp2(t), out.dtype.element_ty)
            tl.store(out + at, d_logits, eviction_policy="evict_first")
        if (local >= 0) & (local < columns):
            tl.debug_barrier()  # the thread that wrote this column just now is another one
            tl.store(out + local, cast(coefficient * (1.0 - tl.exp(logprob)), out.dtype.element_ty))


@triton.jit
def write_zeros(out, width, LANES: tl.constexpr, VECTOR: tl.constexpr):
    for start in range(0, width, LANES * VECTOR):
        at = start + block(LANES, VECTOR)
        tl.store(out + at, tl.zeros([LANES, VECTOR], tl.float32).to(out.dtype.element_ty), mask=at < width)


@triton.jit
def load_ragged(values, at, columns, readable, eviction):
    """fp32 logits with -inf from `columns` on; padding that shares a vector with valid columns is read and dropped."""
    z = tl.load(values + at, mask=at < readable, other=float("-inf"), eviction_policy=eviction)
    return tl.where(at < columns, z.to(tl.float32), float("-inf"))


@triton.jit
def target_logit(values, local, columns):
    """The target's logit, 0 where another shard holds it."""
    here = (local >= 0) & (local < columns)
    return tl.load(values + local, mask=here, other=0.0).to(tl.float32)


@triton.jit
def is_kept(keep, row):
    kept = row >= 0
    if keep is not None:
        kept = tl.load(keep + row) != 0
    return kept


@triton.jit
def block(LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a block, int32 ``[LANES, VECTOR]``."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
