"""What the Triton kernels share: arithmetic that is right on the device and in the interpreter, and the surrogate.

The interpreter multiplies bf16 operands of ``tl.dot`` as raw bits and truncates fp32 to bf16; :func:`dot` and
:func:`cast` go around both there and leave the device's own instructions alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mopd_kernels.objective import METRICS, Surrogate, Tokens

INTERPRET = tl.constexpr(bool(knobs.runtime.interpret))
ICEPOP = tl.constexpr(0)
CLAMP = tl.constexpr(1)
ALL = tl.constexpr(tl.PropagateNan.ALL)  # a NaN logit must show in the loss
_IMPORTANCE = {"icepop": 0, "clamp": 1, "none": 2}


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 ``x`` to ``dtype``, nearest even; in the interpreter, whose own cast to bf16 truncates, by integers."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, accumulator):
    """``accumulator + a @ b`` in fp32; fp32 operands are multiplied exactly, never as tf32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def surrogate_rows(
    rows,  # int64 row numbers, a scalar or a block
    valid,  # rows inside the batch, shaped as `rows`
    logprob,  # fp32, l^theta
    entropy,  # fp32
    known,  # tuple of pointers: behaviour, teachers, weight, teacher_weights, prox, outcome, gate (None where absent)
    metrics,  # fp32 [len(METRICS), T]
    log_ratios,  # fp32 [K, T]
    T,
    K,
    factors,  # tuple of floats: clip_low, clip_high, importance_low, importance_high, advantage_clip
    IMPORTANCE: tl.constexpr,
    ON_POLICY: tl.constexpr,
    CLIP_ADVANTAGE: tl.constexpr,
):
    """Writes the metrics of :func:`mopd_kernels.objective.surrogate` and returns d loss_t / d logprob_t."""
    behaviour, teachers, weight, teacher_weights, prox_pointer, outcome, gate = known
    clip_low, clip_high, importance_low, importance_high, advantage_clip = factors
    prox = logprob
    if prox_pointer is not None:
        prox = tl.load(prox_pointer + rows, mask=valid, other=0.0)
    zero = rows.to(tl.float32) * 0.0  # shaped as rows; a multiple of logprob would be NaN where that is -inf
    log_ratio, k1, k2, k3 = zero, zero, zero, zero
    at = rows
    for _ in range(K):
        teacher = tl.load(teachers + at, mask=valid, other=0.0)
        share = 1.0 / K
        if teacher_weights is not None:
            share = tl.load(teacher_weights + at, mask=valid, other=0.0)
        tl.store(log_ratios + at, teacher - prox, mask=valid)
        at += T
        log_ratio += share * (teacher - prox)
        gap = teacher - logprob
        k1 -= share * gap
        k2 += share * gap * gap / 2
        k3 += share * _exp_minus_1_minus(gap)
    advantage = log_ratio
    if outcome is not None:
        advantage += tl.load(outcome + rows, mask=valid, other=0.0)
    if CLIP_ADVANTAGE:
        advantage = tl.clamp(advantage, -advantage_clip, advantage_clip, ALL)
    importance = tl.exp(prox - tl.load(behaviour + rows, mask=valid, other=0.0))
    mask = valid
    factor = importance
    if IMPORTANCE == ICEPOP:
        mask = mask & (importance >= importance_low) & (importance <= importance_high)
    elif IMPORTANCE == CLAMP:
        factor = tl.clamp(importance, importance_low, importance_high, ALL)
    if gate is not None:
        mask = mask & (tl.load(gate + rows, mask=valid, other=0) != 0)
    ratio = zero + 1.0
    if prox_pointer is not None and not ON_POLICY:
        ratio = tl.exp(logprob - prox)
    free = ratio * advantage
    bound = tl.clamp(ratio, 1.0 - clip_low, 1.0 + clip_high, ALL) * advantage
    clipped = mask & (bound < free)
    scale = tl.where(mask, tl.load(weight + rows, mask=valid, other=0.0) * factor, 0.0)
    loss = tl.where(mask, -scale * tl.minimum(free, bound, ALL), 0.0)
    stride = rows * 0 + T  # in 64 bits where rows are; the order is that of METRICS
    tl.store(metrics + rows, logprob, mask=valid)
    tl.store(metrics + rows + 1 * stride, entropy, mask=valid)
    tl.store(metrics + rows + 2 * stride, log_ratio, mask=valid)
    tl.store(metrics + rows + 3 * stride, advantage, mask=valid)
    tl.store(metrics + rows + 4 * stride, ratio, mask=valid)
    tl.store(metrics + rows + 5 * stride, importance, mask=valid)
    tl.store(metrics + rows + 6 * stride, mask.to(tl.float32), mask=valid)
    tl.store(metrics + rows + 7 * stride, clipped.to(tl.float32), mask=valid)
    tl.store(metrics + rows + 8 * stride, k1, mask=valid)
    tl.store(metrics + rows + 9 * stride, k2, mask=valid)
    tl.store(metrics + rows + 10 * stride, k3, mask=valid)
    tl.store(metrics + rows + 11 * stride, loss, mask=valid)
    return tl.where(mask & ~clipped, -scale * free, 0.0)  # NaN where the loss is


@triton.jit
def _exp_minus_1_minus(x):
    """``exp(x) - 1 - x`` without the cancellation near 0."""
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0 - x)


def surrogate_arguments(tokens: Tokens, settings: Surrogate) -> dict[str, Any]:
    """Keyword arguments of a kernel that calls :func:`surrogate_rows` under these parameter names."""
    bounds = (settings.clip_low, settings.clip_high, settings.importance_low, settings.importance_high)
    known = (
        tokens.behaviour,
        tokens.teachers,
        tokens.weight,
        tokens.teacher_weights,
        tokens.prox,
        tokens.outcome,
        tokens.gate,
    )
    return {
        "known": tuple(None if t is None else t.contiguous() for t in known),
        "factors": tuple(float(f) for f in (*bounds, settings.advantage_clip or 0.0)),
        "IMPORTANCE": _IMPORTANCE[settings.importance],
        "ON_POLICY": settings.force_on_policy_ratio,
        "CLIP_ADVANTAGE": settings.advantage_clip is not None,
    }


def metric_buffers(rows: int, teachers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros ``[len(METRICS), T]`` and ``[K, T]``: what rows that never run keep."""
    return (
        torch.zeros(len(METRICS), rows, dtype=torch.float32, device=device),
        torch.zeros(teachers, rows, dtype=torch.float32, device=device),
    )
