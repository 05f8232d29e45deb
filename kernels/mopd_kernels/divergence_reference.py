"""Plain torch form of the divergences' work on a chunk of logits (divergence_chunks.py says what each function is).

Runs on any device and dtype; fp64 hidden states give fp64. This is also where the formulas of the summands live.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mopd_kernels.divergence_rows import Rows
from mopd_kernels.linear_operands import Operand, packed_product
from mopd_kernels.products import product

Kind = Literal["reverse_kl", "forward_kl", "jsd"]
KINDS: tuple[str, ...] = get_args(Kind)


def terms(kind: Kind, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Summand of the divergence and its derivative with respect to ``log p``, elementwise; p student, q teacher."""
    p, gap = log_p.exp(), log_p - log_q
    if kind == "reverse_kl":
        return p * gap, p * (gap + 1)
    q = log_q.exp()
    if kind == "forward_kl":
        return -q * gap, -q
    # log p - log m = log 2 - log(1 + q / p); the terms of d m cancel in the derivative
    of_p = 0.5 * p * (math.log(2) + logsigmoid(gap))
    of_q = 0.5 * q * (math.log(2) + logsigmoid(-gap))
    return of_p + of_q, of_p


def merge(parts: Tensor) -> Tensor:
    """``[s, 3, n]``, statistics of disjoint sets of columns, to ``[3, n]`` of their union; in the order given."""
    share = parts[:, 0].softmax(0)  # 0 for a set without columns, whose log-sum-exp is -inf
    return torch.stack([parts[:, 0].logsumexp(0), parts[:, 1].logsumexp(0), (share * parts[:, 2]).sum(0)])


def logits(hidden: Operand, weight: Operand) -> Tensor:
    if isinstance(hidden, Tensor) and isinstance(weight, Tensor):
        return product(hidden, weight.T)
    return packed_product(hidden, weight)


def statistics(first: Tensor, second: Tensor | None, temperature: float) -> Tensor:
    scaled = first / temperature
    lse = scaled.logsumexp(-1)
    if second is None:
        return lse[None]
    # softmax divides by its own sum: exp(z - lse) carries the rounding of lse, which `first - second` would magnify
    mean = scaled.softmax(-1).mul_(first - second).sum(-1) / temperature
    return torch.stack([lse, (second / temperature).logsumexp(-1), mean])


def jsd_sums(student: Tensor, teacher: Tensor, student_lse: Tensor, teacher_lse: Tensor, temperature: float) -> Tensor:
    summands = terms(
        "jsd", _log_softmax(student, student_lse, temperature), _log_softmax(teacher, teacher_lse, temperature)
    )
    return torch.stack([x.sum(-1) for x in summands])


def dense_gradient(
    kind: Kind, student: Tensor, teacher: Tensor, rows: Rows, scale: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    assert rows.teacher_lse is not None
    log_p, log_q = (
        _log_softmax(student, rows.student_lse, temperature),
        _log_softmax(teacher, rows.teacher_lse, temperature),
    )
    slopes = terms(kind, log_p, log_q)[1]
    return slopes.sub_(log_p.exp_().mul_(rows.slope[:, None])).mul_(scale[:, None]).to(dtype)


def sparse_gradient(
    student: Tensor,
    rows: Rows,
    values: Tensor,
    columns: Tensor,
    here: Tensor,
    scale: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    p = _log_softmax(student, rows.student_lse, temperature).exp_()
    d_logits = p.mul_(-(rows.slope * scale)[:, None])
    d_logits[here.nonzero()[:, 0], columns[here]] = values[here]
    return d_logits.to(dtype)


def _log_softmax(logits: Tensor, lse: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).sub_(lse[:, None])
