"""Plain torch forms of the operators on logits: the truth the kernels are held to, and what CPUs run.

Each function does the work of one shard; logits.py checks and meets autograd. Rows are walked in chunks of
reference.CHUNK_ELEMENTS, so that no fp32 copy of ``[T, V/tp]`` exists. A row comes down to numbers relative to its
maximum, so that logits of 1e4 lose nothing:

    top = max_v logit_v    t = (logit - top) / temperature    sum0 = sum_v e^{t_v}    sum1 = sum_v e^{t_v} t_v
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mopd_kernels.objective import Surrogate, Tokens
from mopd_kernels.reference import chunks, objective_rows
from mopd_kernels.vocabulary import Statistics, VocabularyShard

EMPTY = -1e30  # top of no columns: finite, so that the difference of two is no NaN
LEAST = -1e4  # of t: e^t is 0 all the same, and e^t t no NaN where a logit is -inf


def statistics(
    logits: Tensor, targets: Tensor, keep: Tensor | None, shard: VocabularyShard, temperature: float
) -> Statistics:
    """fp32 ``[T]`` each; zeros for rows out of ``keep``, which are not read."""
    return _finish(shard.gather(_parts(logits, targets, keep, shard, temperature)), keep, temperature)


def objective(
    logits: Tensor,
    tokens: Tokens,
    settings: Surrogate,
    shard: VocabularyShard,
    temperature: float,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(metrics [len(METRICS), T], log_ratios [K, T])``; fills ``gradient``, which may be ``logits``, if there is one.

    Rows whose gradient is zero are not read for it.
    """
    parts = shard.gather(_parts(logits, tokens.targets, tokens.keep, shard, temperature))
    logprob, entropy, _ = _finish(parts, tokens.keep, temperature)
    metrics, log_ratios, coefficient = objective_rows(logprob, entropy, tokens, settings)
    if gradient is not None:
        top, sum0 = _joined(parts, temperature)[:2]
        moved = coefficient != 0
        for rows in _chunks(len(logits), logits.shape[1], moved):
            scale = coefficient[rows] / temperature
            d_logits = (
                _relative(logits, rows, top[rows], shard, temperature).exp_().mul_((-scale / sum0[rows])[:, None])
            )
            if shard.columns:
                local, here = shard.locate(tokens.targets[rows])
                d_logits.scatter_add_(1, local[:, None], scale.where(here, 0.0)[:, None])
            gradient[rows, : shard.columns] = d_logits.to(gradient.dtype)
        gradient.masked_fill_(~moved[:, None], 0.0)
        gradient[:, shard.columns :] = 0.0
    return metrics, log_ratios


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """``gradient *= factor``, a number of one element."""
    if gradient.is_cuda or float(factor) != 1.0:
        gradient.mul_(factor)


def _parts(logits: Tensor, targets: Tensor, keep: Tensor | None, shard: VocabularyShard, temperature: float) -> Tensor:
    """fp32 ``[4, T]`` of this shard: top, sum0, sum1 and the target's logit, 0 where another shard holds it."""
    parts = torch.zeros(4, len(logits), dtype=torch.float32, device=logits.device)
    parts[0] = EMPTY
    for rows in _chunks(len(logits), logits.shape[1], keep):
        if shard.columns == 0:
            continue
        values = logits[rows, : shard.columns]
        top = values.amax(-1).float().clamp_(min=EMPTY)
        shifted = _relative(logits, rows, top, shard, temperature)
        weights = shifted.exp()
        picked = shard.pick(values, targets[rows]).float()
        parts[:, rows] = torch.stack([top, weights.sum(-1), weights.mul_(shifted).sum(-1), picked])
    return parts


def _relative(logits: Tensor, rows: Tensor | slice, top: Tensor, shard: VocabularyShard, temperature: float) -> Tensor:
    """t, fp32 ``[n, columns]``."""
    values = logits[rows, : shard.columns].to(torch.float32, copy=True)
    return values.sub_(top[:, None]).div_(temperature).clamp_(min=LEAST)


def _joined(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(top, sum0, sum1, target)`` of the whole vocabulary from the shards' ``[tp, 4, T]``."""
    top = parts[:, 0].amax(0)
    shift = (parts[:, 0] - top) / temperature
    share = shift.exp()
    sum1 = (share * (parts[:, 2] + shift * parts[:, 1])).sum(0)
    return top, (share * parts[:, 1]).sum(0), sum1, parts[:, 3].sum(0)


def _finish(parts: Tensor, keep: Tensor | None, temperature: float) -> Statistics:
    top, sum0, sum1, target = _joined(parts, temperature)
    size = sum0.log()
    values = torch.stack([(target - top) / temperature - size, size - sum1 / sum0, top / temperature + size])
    if keep is not None:
        values = values.where(keep, 0.0)
    return Statistics(*values.unbind())


def _chunks(rows: int, width: int, some: Tensor | None) -> Iterator[Tensor | slice]:
    """Chunks of all rows or of ``some``; slices, or row numbers."""
    if some is None:
        yield from chunks(rows, width)
        return
    numbers = some.nonzero()[:, 0]
    for chunk in chunks(len(numbers), width):
        yield numbers[chunk]
