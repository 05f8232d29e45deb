"""Log-probabilities of chosen tokens straight from hidden states, in plain torch: the truth the kernels are held to.

Notation: ``z = hidden @ weight.T / temperature``, ``p = softmax(z)``; then

    logprob[t]    = z[t, y_t] - logsumexp(z[t])          d logprob[t] / d z[t]  = onehot(y_t) - p[t]
    entropy[t]    = logsumexp(z[t]) - sum_v p[t, v] z[t, v]
    reverse_kl[t] = sum_v p[t, v] (log p[t, v] - log q[t, v])
                                                         d reverse_kl[t] / d z  = p (log p - log q - reverse_kl)

with p the student and q the teacher. Rows are walked in chunks and logits are made again in backward, so neither
``[T, V]`` logits nor their gradient ever exist whole. Each rank of ``group`` holds ``weight[V / tp, H]``, the rows
``rank * V / tp`` onwards; one all-gather of a few numbers per token joins the shards, always summed in rank order.
Statistics and logits are fp32 (fp64 when the inputs are). Runs on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits alive at a time (64 MiB in fp32)."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
) -> Tensor:
    """Log-probability of ``targets`` under ``softmax(hidden @ weight.T / temperature)``; fp32 ``[T]``.

    ``hidden [T, H]`` is equal on all ranks of ``group``, ``weight [V/tp, H]`` is this rank's shard, ``targets`` is
    int64 ``[T]`` of global token numbers. Columns from ``valid_vocab`` on are padding: never read, their gradient is
    zero. A target outside ``[0, valid_vocab)`` gives NaN. Backward gives this shard's share of the gradient of
    ``hidden`` (sum it over the group) and the whole gradient of the local ``weight``. Raises ValueError for shapes
    that do not fit.
    """
    _check(hidden, weight, targets, temperature)
    return _LinearLogprob.apply(hidden, weight, targets, temperature, group, valid_vocab)


@torch.no_grad()
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``(logprob, entropy)``, fp32 ``[T]`` each, in nats; arguments as :func:`linear_logprob`; no gradient."""
    _check(hidden, weight, targets, temperature)
    shard = _Shard(len(weight), group, valid_vocab)
    lse, chosen, mean_logit = [], [], []
    for rows in _chunks(hidden, shard):
        logits = _logits(hidden[rows], weight[: shard.columns], temperature)
        lse.append(logits.logsumexp(-1))
        chosen.append(shard.pick(logits, targets[rows]))
        mean_logit.append((logits.softmax(-1) * logits).sum(-1))
    parts = shard.gather(torch.stack([torch.cat(lse), torch.cat(chosen), torch.cat(mean_logit)]))
    total = parts[:, 0].logsumexp(0)
    entropy = total - ((parts[:, 0] - total).exp() * parts[:, 2]).sum(0)
    return shard.checked(parts[:, 1].sum(0) - total, targets), entropy


def reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
) -> Tensor:
    """Exact ``KL(student || teacher)`` over the whole vocabulary, fp32 ``[T]`` in nats.

    Hidden sizes may differ, vocabulary shards may not. Differentiable in the student's two tensors, with partial
    gradients as in :func:`linear_logprob`; the teacher's get none. Raises ValueError for shapes that do not fit.
    """
    _check(student_hidden, student_weight, None, temperature)
    _check(teacher_hidden, teacher_weight, None, temperature)
    if len(student_hidden) != len(teacher_hidden) or len(student_weight) != len(teacher_weight):
        raise ValueError(
            f"student [T={len(student_hidden)}, V/tp={len(student_weight)}] and teacher [T={len(teacher_hidden)},"
            f" V/tp={len(teacher_weight)}] must agree in both"
        )
    return _ReverseKL.apply(
        student_hidden,
        student_weight,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        temperature,
        group,
        valid_vocab,
    )


class _Shard:
    """This rank's valid columns of the vocabulary, and how they join those of the group."""

    def __init__(self, width: int, group: dist.ProcessGroup | None, valid_vocab: int | None) -> None:
        self.size = 1 if group is None else dist.get_world_size(group)
        self.group = group
        self.valid = self.size * width if valid_vocab is None else valid_vocab
        if not 0 < self.valid <= self.size * width:
            raise ValueError(f"valid_vocab = {self.valid} must be between 1 and {self.size * width} columns")
        self.start = 0 if group is None else dist.get_rank(group) * width
        self.columns = min(max(self.valid - self.start, 0), width)

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target in this shard (0 where it lies elsewhere), and whether it lies here."""
        local = targets - self.start
        here = (local >= 0) & (local < self.columns)
        return local.where(here, 0), here

    def pick(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logit of each target, 0 where another rank holds it."""
        if self.columns == 0:
            return logits.new_zeros(len(logits))
        local, here = self.locate(targets)
        return logits.gather(1, local[:, None])[:, 0].where(here, 0.0)

    def gather(self, part: Tensor) -> Tensor:
        """``[k, T]`` of this rank to ``[tp, k, T]`` of all ranks; T is equal within the group."""
        if self.size == 1 or part.numel() == 0:
            return part.expand(self.size, *part.shape)
        parts = part.new_empty(self.size, *part.shape)
        dist.all_gather(list(parts.unbind()), part.contiguous(), group=self.group)
        return parts

    def checked(self, logprob: Tensor, targets: Tensor) -> Tensor:
        """NaN for targets that no rank holds: cheaper than a device synchronisation, and no number passes as right."""
        return logprob.masked_fill((targets < 0) | (targets >= self.valid), float("nan"))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        valid_vocab: int | None,
    ) -> Tensor:
        shard = _Shard(len(weight), group, valid_vocab)
        lse, chosen = [], []
        for rows in _chunks(hidden, shard):
            logits = _logits(hidden[rows], weight[: shard.columns], temperature)
            lse.append(logits.logsumexp(-1))
            chosen.append(shard.pick(logits, targets[rows]))
        parts = shard.gather(torch.stack([torch.cat(lse), torch.cat(chosen)]))
        total = parts[:, 0].logsumexp(0)
        ctx.save_for_backward(hidden, weight, targets, total)
        ctx.shard, ctx.temperature = shard, temperature
        return shard.checked(parts[:, 1].sum(0) - total, targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, total = ctx.saved_tensors
        shard, temperature = ctx.shard, ctx.temperature
        sink = _Gradients(hidden, weight, shard, ctx.needs_input_grad)
        for rows in _chunks(hidden, shard):
            logits = _logits(hidden[rows], sink.columns, temperature)
            d_logits = (logits - total[rows, None]).exp_().mul_(-grad[rows, None])
            if shard.columns:
                local, here = shard.locate(targets[rows])
                d_logits.scatter_add_(1, local[:, None], grad[rows].where(here, 0.0)[:, None])
            sink.add(rows, d_logits.div_(temperature))
        return sink.hidden, sink.weight_gradient(), None, None, None, None


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        t_hidden: Tensor,
        t_weight: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        valid_vocab: int | None,
    ) -> Tensor:
        shard = _Shard(len(weight), group, valid_vocab)
        parts = []
        for rows in _chunks(hidden, shard):
            student = _logits(hidden[rows], weight[: shard.columns], temperature)
            teacher = _logits(t_hidden[rows], t_weight[: shard.columns], temperature)
            gap = (student.softmax(-1) * (student - teacher)).sum(-1)
            parts.append(torch.stack([student.logsumexp(-1), teacher.logsumexp(-1), gap]))
        joined = shard.gather(torch.cat(parts, dim=1))
        lse, t_lse = joined[:, 0].logsumexp(0), joined[:, 1].logsumexp(0)
        divergence = ((joined[:, 0] - lse).exp() * joined[:, 2]).sum(0) - (lse - t_lse)
        ctx.save_for_backward(hidden, weight, t_hidden, t_weight, lse, t_lse, divergence)
        ctx.shard, ctx.temperature = shard, temperature
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, t_hidden, t_weight, lse, t_lse, divergence = ctx.saved_tensors
        sink = _Gradients(hidden, weight, ctx.shard, ctx.needs_input_grad)
        for rows in _chunks(hidden, ctx.shard):
            log_p = _logits(hidden[rows], sink.columns, ctx.temperature) - lse[rows, None]
            log_q = _logits(t_hidden[rows], t_weight[: ctx.shard.columns], ctx.temperature) - t_lse[rows, None]
            d_logits = log_p.exp() * (log_p - log_q - divergence[rows, None]) * grad[rows, None]
            sink.add(rows, d_logits / ctx.temperature)
        return sink.hidden, sink.weight_gradient(), None, None, None, None, None


class _Gradients:
    """Collects the two products of a chunk's logit gradient; the weight's share is summed in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, shard: _Shard, needed: tuple[bool, ...]) -> None:
        self.source, self.dtype = hidden, weight.dtype
        self.columns = weight[: shard.columns]
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=_wide(weight)) if needed[1] else None

    def add(self, rows: slice, d_logits: Tensor) -> None:
        d_logits = d_logits.to(self.source.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _product(d_logits, self.columns)
        if self.weight is not None:
            self.weight[: len(self.columns)] += _product(d_logits.T, self.source[rows])

    def weight_gradient(self) -> Tensor | None:
        return None if self.weight is None else self.weight.to(self.dtype)


def _chunks(hidden: Tensor, shard: _Shard) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(1, shard.columns))
    for start in range(0, max(1, len(hidden)), rows):  # one empty chunk when there are no tokens
        yield slice(start, start + rows)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = _product(hidden, weight.T)
    return logits if temperature == 1.0 else logits / temperature


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated and returned in fp32 (fp64 for fp64), whatever the inputs are."""
    wide = _wide(a)
    if a.dtype == wide:
        return a @ b
    # CPU's mm has no out_dtype, and rounding logits to bf16 would cost up to 0.06 nats
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda else a.to(wide) @ b.to(wide)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor | None, temperature: float) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, H] and weight [V/tp, H], got {list(hidden.shape)}, {list(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}; they must be equal")
    if targets is not None and targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected {len(hidden)} targets, one per row of hidden, got {list(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} must be above 0")
