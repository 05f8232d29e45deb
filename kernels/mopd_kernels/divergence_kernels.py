"""Triton kernels over a chunk of fp32 logits ``[n, columns]``; what they compute is in divergence_chunks.py.

Grid ``(n, splits)``: a program takes SPAN columns of one row, in blocks ``[UNROLL, LANES, VECTOR]`` of one thread per
lane: its loads are 16 bytes (VECTOR logits) wide, UNROLL of each tensor are in flight, and its running numbers stay its
own until the end of the span. (Loaded as ``[UNROLL * LANES, VECTOR]``: of blocks with more dimensions, versions of
Triton differ in which they keep within a thread.) Whole blocks go without a mask, whose odd bound would break up the
wide loads. Student and teacher are read side by side, once each; nothing of the size of a row but the gradient leaves
the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.triton_common import cast

REVERSE_KL = tl.constexpr(0)
FORWARD_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-(2.0**100))  # stands for -inf where a difference of two must be no NaN; no scale rounds it


@triton.jit
def statistics_kernel(
    first,  # fp32 [n, columns], rows `stride` apart
    second,  # the same, or None
    parts,  # fp32 [splits, 3, n]: log-sum-exps, mean of first - second under first; [splits, 1, n] without second
    columns,
    stride,
    inverse_temperature,
    SPAN: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    offsets = _block(UNROLL, LANES, VECTOR)
    row, begin, whole, end = _span(columns, SPAN, UNROLL * LANES * VECTOR)
    scale = inverse_temperature * LOG2E  # exponents are base 2
    top1 = tl.full([LANES], LOWEST, tl.float32)
    top2 = tl.full([LANES], LOWEST, tl.float32)
    sum1 = tl.zeros([LANES], tl.float32)
    sum2 = tl.zeros([LANES], tl.float32)
    gaps = tl.zeros([LANES], tl.float32)
    for start in range(begin, whole, UNROLL * LANES * VECTOR):
        x = _load(first, row * stride + start, offsets, None, LANES)
        y = _load(second, row * stride + start, offsets, None, LANES)
        top1, sum1, gaps, top2, sum2 = _fold(x, y, scale, top1, sum1, gaps, top2, sum2)
    if whole < end:
        x = _load(first, row * stride + whole, offsets, end - whole, LANES)
        y = _load(second, row * stride + whole, offsets, end - whole, LANES)
        top1, sum1, gaps, top2, sum2 = _fold(x, y, scale, top1, sum1, gaps, top2, sum2)
    lse, total, share = _lse(top1, sum1)
    rows = tl.num_programs(0)
    if second is None:
        tl.store(parts + tl.program_id(1) * rows + row, lse)
    else:
        out = parts + tl.program_id(1) * 3 * rows + row
        mean = tl.sum(share * gaps, axis=0) * inverse_temperature / tl.where(total > 0, total, 1.0)
        tl.store(out, lse)
        tl.store(out + rows, _lse(top2, sum2)[0])
        tl.store(out + 2 * rows, mean)


@triton.jit
def jsd_sums_kernel(
    student,  # fp32 [n, columns], rows `stride` apart
    teacher,
    student_lse,  # fp32 [n], of the whole vocabulary
    teacher_lse,
    sums,  # fp32 [splits, 2, n]: of the summand and of its slope
    columns,
    stride,
    inverse_temperature,
    SPAN: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    offsets = _block(UNROLL, LANES, VECTOR)
    row, begin, whole, end = _span(columns, SPAN, UNROLL * LANES * VECTOR)
    p_lse = tl.load(student_lse + row)
    q_lse = tl.load(teacher_lse + row)
    values = tl.zeros([LANES], tl.float32)
    slopes = tl.zeros([LANES], tl.float32)
    for start in range(begin, whole, UNROLL * LANES * VECTOR):
        log_p = _load(student, row * stride + start, offsets, None, LANES) * inverse_temperature - p_lse
        log_q = _load(teacher, row * stride + start, offsets, None, LANES) * inverse_temperature - q_lse
        value, slope = _terms(log_p, log_q, JSD)
        values += _of_lanes(value)
        slopes += _of_lanes(slope)
    if whole < end:  # p = q = 0 from `end` on, and so are the terms
        log_p = _load(student, row * stride + whole, offsets, end - whole, LANES) * inverse_temperature - p_lse
        log_q = _load(teacher, row * stride + whole, offsets, end - whole, LANES) * inverse_temperature - q_lse
        value, slope = _terms(log_p, log_q, JSD)
        values += _of_lanes(value)
        slopes += _of_lanes(slope)
    rows = tl.num_programs(0)
    out = sums + tl.program_id(1) * 2 * rows + row
    tl.store(out, tl.sum(values, axis=0))
    tl.store(out + rows, tl.sum(slopes, axis=0))


@triton.jit
def gradient_kernel(
    student,  # fp32 [n, columns], rows `stride` apart
    teacher,  # the same, or None: the slope is 0 but on the support, which support_kernel writes
    student_lse,  # fp32 [n]
    teacher_lse,
    slope_sum,  # fp32 [n]
    scale,  # fp32 [n]
    gradient,  # [n, columns] in the dtype of the products, rows `stride` apart
    columns,
    stride,
    inverse_temperature,
    KIND: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``scale (s - p sum s)``."""
    offsets = tl.arange(0, BLOCK)
    row, begin, whole, end = _span(columns, SPAN, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    q_lse = 0.0
    if teacher is not None:
        q_lse = tl.load(teacher_lse + row)
    scalars = inverse_temperature, tl.load(student_lse + row), q_lse, tl.load(slope_sum + row), tl.load(scale + row)
    for start in range(begin, whole, BLOCK):
        z = _load(student, row * stride + start, offsets, None)
        d = _gradient(z, _load(teacher, row * stride + start, offsets, None), scalars, KIND)
        tl.store(gradient + row * stride + start + offsets, cast(d, gradient.dtype.element_ty))
    if whole < end:
        z = _load(student, row * stride + whole, offsets, end - whole)
        d = _gradient(z, _load(teacher, row * stride + whole, offsets, end - whole), scalars, KIND)
        at = gradient + row * stride + whole + offsets
        tl.store(at, cast(d, gradient.dtype.element_ty), mask=offsets < end - whole)


@triton.jit
def support_kernel(
    columns,  # int64 [n, k], of this shard
    here,  # bool [n, k]: whether this shard holds the token
    values,  # fp32 [n, k]
    gradient,  # [n, columns], rows `stride` apart
    k,
    stride,
    BLOCK: tl.constexpr,
):
    """Writes the gradient on a sparse support, after gradient_kernel has written p's share everywhere."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = tl.load(here + row * k + at, mask=at < k, other=0) != 0
    column = tl.load(columns + row * k + at, mask=held, other=0)
    value = tl.load(values + row * k + at, mask=held, other=0.0)
    tl.store(gradient + row * stride + column, cast(value, gradient.dtype.element_ty), mask=held)


@triton.jit
def _terms(log_p, log_q, KIND: tl.constexpr):
    """``(summand, slope)`` of divergence_reference.terms."""
    p = tl.exp2(log_p * LOG2E)
    q = tl.exp2(log_q * LOG2E)
    gap = log_p - log_q
    if KIND == REVERSE_KL:
        value, slope = p * gap, p * (gap + 1)
    elif KIND == FORWARD_KL:
        value, slope = -q * gap, -q
    else:
        rest = LN2 - tl.log2(1 + tl.exp2(-tl.abs(gap) * LOG2E)) * LN2
        slope = 0.5 * p * (tl.minimum(gap, 0.0) + rest)
        value = slope + 0.5 * q * (tl.minimum(-gap, 0.0) + rest)
    return value, slope


@triton.jit
def _gradient(z, u, scalars, KIND: tl.constexpr):
    """``scale (s - p sum s)`` from logits of student and teacher; s is 0 without a teacher's."""
    inverse_temperature, p_lse, q_lse, total, scale = scalars
    log_p = z * inverse_temperature - p_lse
    if u is None:
        d = -total * tl.exp2(log_p * LOG2E)
    else:
        slope = _terms(log_p, u * inverse_temperature - q_lse, KIND)[1]
        d = slope - total * tl.exp2(log_p * LOG2E)
    return scale * d


@triton.jit
def _fold(x, y, scale, top1, sum1, gaps, top2, sum2):
    """The lanes' running maxima, sums of exp and sum of exp times ``x - y``, with one more block."""
    top1, share, e = _exponentials(x, scale, top1)  # pyright: ignore[reportGeneralTypeIssues]
    sum1 = share * sum1 + _of_lanes(e)
    if y is not None:
        gaps = share * gaps + _of_lanes(e * (x - y))
        top2, share, e = _exponentials(y, scale, top2)
        sum2 = share * sum2 + _of_lanes(e)
    return top1, sum1, gaps, top2, sum2


@triton.jit
def _exponentials(x, scale, tops):
    """New maxima of the lanes, what becomes of sums relative to the old ones, and exp relative to the new ones."""
    new = tl.maximum(tops, scale * tl.max(tl.max(x, axis=2), axis=0))
    return new, tl.exp2(tops - new), tl.exp2(tl.fma(x, scale, -new[None, :, None]))


@triton.jit
def _lse(tops, sums):
    """``(log-sum-exp, sum, share of each lane in that sum)``; -inf, 0 for no columns."""
    top = tl.max(tops, axis=0)
    share = tl.exp2(tops - top)
    total = tl.sum(share * sums, axis=0)
    return (top + tl.log2(total)) * LN2, total, share  # a constexpr on the left would stay one in the interpreter


@triton.jit
def _load(logits, begin, offsets, count, LANES=None):
    """A block of logits, 3-D if LANES are given; with `count` only that many, LOWEST beyond; None of None."""
    values = None
    if logits is not None:
        if count is None:
            values = tl.load(logits + begin + offsets)
        else:
            values = tl.load(logits + begin + offsets, mask=offsets < count, other=LOWEST)
        if LANES is not None:
            values = tl.reshape(values, [values.shape[0] // LANES, LANES, values.shape[1]])
    return values


@triton.jit
def _of_lanes(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _block(UNROLL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a block, int32 ``[UNROLL * LANES, VECTOR]``."""
    return tl.arange(0, UNROLL * LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _span(columns, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Row (int64) and columns of this program: ``[begin, whole)`` in whole blocks, ``[whole, end)`` ragged."""
    begin = tl.program_id(1) * SPAN
    end = tl.minimum(begin + SPAN, columns)
    return tl.program_id(0).to(tl.int64), begin, begin + (end - begin) // BLOCK * BLOCK, end
