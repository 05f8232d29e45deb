"""The walk of a divergence over chunks of rows, and how shards join; the work on a chunk's logits is the form's.

A form (divergence_reference.py, divergence_triton.py) is a module with five functions on one chunk of one shard:

- ``logits(hidden, weight)``: ``[n, columns]`` before the temperature, accumulated and kept in fp32;
- ``statistics(first, second, temperature)``: ``[3, n]``, the two log-sum-exps and the mean of ``first - second`` under
  the softmax of ``first``, all over the temperature; ``[1, n]``, one log-sum-exp, where ``second`` is None;
- ``jsd_sums(student, teacher, student_lse, teacher_lse, temperature)``: ``[2, n]``, sums of the summand and its slope;
- ``dense_gradient``, ``sparse_gradient``: ``scale (s - p sum s)`` in the dtype of the products, s from the teacher's
  logits or 0 but at ``columns`` that are ``here``, where the gradient is ``values``. They may take the student's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mopd_kernels.divergence_reference import Kind, merge, terms
from mopd_kernels.divergence_rows import Rows
from mopd_kernels.linear_operands import Operand, rows_of
from mopd_kernels.vocabulary import VocabularyShard

LOGITS_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
"""Of fp32 logits alive at a time, student's and teacher's together, by device; a gradient in bf16 takes a quarter of it
more. On CPU what leaves the caches only costs."""


class Head[X: Operand](NamedTuple):
    """A distribution over the vocabulary as what makes its logits. A teacher's parts may be packed in NVFP4."""

    hidden: X  # [T, H]; fp32, bf16 or fp16 (fp64: reference only)
    weight: X  # [V/tp, H], of the same dtype


class TopK(NamedTuple):
    """A teacher's k likeliest tokens of each row. A token may stand in a row once; rows without a teacher stay out."""

    ids: Tensor  # int64 [T, k], global token numbers
    logprobs: Tensor  # fp32 [T, k], normalised over the full vocabulary at the temperature of the call


class Problem(NamedTuple):
    kind: Kind
    shard: VocabularyShard
    temperature: float
    top_k: int | None
    form: ModuleType

    def logits(self, head: Head[Operand], rows: slice) -> Tensor:
        return self.form.logits(rows_of(head.hidden, rows), rows_of(head.weight, slice(self.shard.columns)))

    def known(self, teacher: Head[Operand] | TopK, rows: slice, dtype: torch.dtype) -> Tensor | TopK:
        """Of the teacher in a chunk, in the student's fp32 or fp64: its logits, or the tokens it brings."""
        if isinstance(teacher, Head):
            return self.logits(teacher, rows).to(dtype)
        return TopK(teacher.ids[rows], teacher.logprobs[rows].to(dtype))


def chunks(student: Head[Tensor], teacher: Head[Operand] | TopK) -> Iterator[slice]:
    """Slices over the rows, equal on all ranks, so that they meet in the same collectives; one empty slice for none."""
    width = len(student.weight)  # not the valid columns, which may be fewer on the last ranks
    heads = 2 if isinstance(teacher, Head) else 1
    bound = LOGITS_BYTES.get(student.hidden.device.type, LOGITS_BYTES["cuda"])
    step = max(1, bound // (4 * heads * max(1, width)))
    for start in range(0, max(1, len(student.hidden)), step):
        yield slice(start, start + step)


def measure(logits: Tensor, known: Tensor | TopK, problem: Problem) -> Rows:
    """Of a chunk; joins the shards."""
    if isinstance(known, TopK):
        return _against_top_k(logits, known, problem)
    return _against_head(logits, known, problem)


def _against_head(logits: Tensor, known: Tensor, problem: Problem) -> Rows:
    form, temperature, k = problem.form, problem.temperature, problem.top_k
    # KL(first || second) = mean of (first - second) under first - (lse of first - lse of second)
    swap = problem.kind == "forward_kl"
    parts = [form.statistics(*((known, logits) if swap else (logits, known)), temperature)]
    if k is not None:
        top, ids = _largest(known, k)
        parts += [top, _at(logits, ids.T, ids.T >= 0).T, _largest(logits, k)[0]]
    joined = problem.shard.gather(torch.cat(parts))
    first, second, mean = merge(joined[:, :3])
    value = mean - (first - second)
    student_lse, teacher_lse = (second, first) if swap else (first, second)
    if problem.kind == "jsd":
        sums = form.jsd_sums(logits, known, student_lse, teacher_lse, temperature)
        value, slope = problem.shard.gather(sums).sum(0).unbind()
    else:
        slope = torch.full_like(value, -1.0) if swap else value + 1
    rows = Rows(value, student_lse, teacher_lse, slope, *[None] * 6)
    if k is None:
        return rows
    top, at, own = joined[:, 3:].unflatten(1, (3, k)).transpose(0, 1).flatten(1, 2)  # [tp * k, n] each
    top, chosen = top.topk(k, dim=0)
    return _with_by_products(rows, at.gather(0, chosen), top / temperature - teacher_lse, own, temperature)


def _against_top_k(logits: Tensor, known: TopK, problem: Problem) -> Rows:
    k, temperature = known.ids.shape[1], problem.temperature
    parts = [
        problem.form.statistics(logits, None, temperature),
        _at(logits, *problem.shard.locate(known.ids)).T,
        _largest(logits, k)[0],
    ]
    joined = problem.shard.gather(torch.cat(parts))
    lse = joined[:, 0].logsumexp(0)
    at, log_q = joined[:, 1 : 1 + k].sum(0), known.logprobs.T
    value, slope = (x.sum(0) for x in terms(problem.kind, at / temperature - lse, log_q))
    rows = Rows(value, lse, None, slope, *[None] * 6)
    return _with_by_products(rows, at, log_q, joined[:, 1 + k :].flatten(0, 1), temperature)


def _with_by_products(rows: Rows, at: Tensor, log_q: Tensor, own: Tensor, temperature: float) -> Rows:
    """``at [k, n]``: the student's logits on the support; ``own [tp * k, n]``: its largest of each shard."""
    top = own.topk(len(at), dim=0).values
    shared = (at >= top[-1]).to(at.dtype)
    q, p = log_q.exp(), (at / temperature - rows.student_lse).exp()
    return rows._replace(
        overlap=shared.mean(0),
        teacher_mass=q.sum(0),
        student_mass=p.sum(0),
        shared_teacher_mass=(q * shared).sum(0),
        shared_student_mass=(p * shared).sum(0),
        student_top_mass=(top / temperature - rows.student_lse).exp().sum(0),
    )


def logit_gradient(
    logits: Tensor, known: Tensor | TopK, problem: Problem, rows: Rows, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """``scale (s - p sum s)`` in ``dtype``, ``[n, columns]``; may take the logits' place."""
    if not isinstance(known, TopK):
        return problem.form.dense_gradient(problem.kind, logits, known, rows, scale, problem.temperature, dtype)
    local, here = problem.shard.locate(known.ids)
    log_p = _at(logits, local, here) / problem.temperature - rows.student_lse[:, None]
    slopes = terms(problem.kind, log_p, known.logprobs)[1]
    values = scale[:, None] * (slopes - log_p.exp() * rows.slope[:, None])
    return problem.form.sparse_gradient(logits, rows, values, local, here, scale, problem.temperature, dtype)


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, ``[k, n]``; -inf and column -1 where the shard has fewer."""
    some, columns = logits.topk(min(k, logits.shape[1]), dim=1)
    values, ids = logits.new_full((k, len(logits)), float("-inf")), columns.new_full((k, len(logits)), -1)
    values[: some.shape[1]], ids[: some.shape[1]] = some.T, columns.T
    return values, ids


def _at(logits: Tensor, columns: Tensor, here: Tensor) -> Tensor:
    """Logits at ``columns [n, k]``, 0 where they are not here."""
    if not logits.shape[1]:
        return logits.new_zeros(columns.shape)
    return logits.gather(1, columns.where(here, 0)).where(here, 0.0)
