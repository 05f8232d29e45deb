"""Plain torch forms of the operators on hidden states: the truth the kernels are held to, and what CPUs run.

Each function does the work of one shard over rows it is given; linear.py checks, joins shards and meets autograd. Rows
are walked in chunks, so neither ``[T, V]`` logits nor their gradient ever exist whole. Statistics and logits are fp32
(fp64 when the inputs are). Runs on any device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mopd_kernels.linear_operands import Operand, blocks, multiplier_of
from mopd_kernels.nvfp4.format import Format
from mopd_kernels.nvfp4.reference import quantize
from mopd_kernels.nvfp4.tensor import NVFP4Tensor
from mopd_kernels.objective import METRICS, Surrogate, Tokens, surrogate
from mopd_kernels.products import product, wide
from mopd_kernels.vocabulary import VocabularyShard, join, merge_columns
from mopd_kernels.weight_gradient import WeightGradient

CHUNK_ELEMENTS = 1 << 22
"""Logits of a chunk (16 MiB in fp32), two or three copies of which are alive at a time: what a CPU's caches hold."""


def local_statistics(
    hidden: Operand, weight: Operand, targets: Tensor, shard: VocabularyShard, temperature: float
) -> Tensor:
    """fp32 ``[3, T]`` of this shard: log-sum-exp, the target's logit (0 where another shard holds it), and the mean
    log-probability under the shard's own softmax."""
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):
        return _packed_statistics(hidden, weight, targets, shard, temperature)
    parts = [
        _softmax(logits_of(hidden[rows], weight[: shard.columns], temperature), targets[rows], shard)[0]
        for rows in chunks(len(hidden), shard.width)
    ]
    return torch.cat(parts, dim=1)


def _packed_statistics(
    hidden: Operand, weight: Operand, targets: Tensor, shard: VocabularyShard, temperature: float
) -> Tensor:
    """The same by pieces of rows and columns."""
    multiplier, found = multiplier_of(hidden, weight), []
    assert multiplier is not None
    for piece, products in blocks(hidden, weight, shard.columns):
        columns, factor = shard.piece(piece), multiplier / temperature
        parts = [_softmax(logits.mul_(factor), targets[rows], columns)[0] for rows, logits in products]
        found.append(torch.cat(parts, dim=1))
    return found[0] if len(found) == 1 else merge_columns(torch.stack(found))


def statistics_with_payload(
    hidden: Tensor,
    weight: Operand,
    targets: Tensor,
    shard: VocabularyShard,
    temperature: float,
    payload: Format,
    amax: Tensor | None,
) -> tuple[Tensor, NVFP4Tensor]:
    """:func:`local_statistics`, and ``hidden`` quantized."""
    return local_statistics(hidden, weight, targets, shard, temperature), quantize(hidden, payload, amax)


def add_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    coefficient: Tensor,
    shard: VocabularyShard,
    temperature: float,
    d_hidden: Tensor | None,
    sink: WeightGradient,
) -> None:
    """Gradients for ``d z = coefficient (onehot(y) - p)`` with p from the whole vocabulary's ``lse``.

    Writes this shard's share into ``d_hidden [T, H]`` and adds to ``sink``.
    """
    for rows in chunks(len(hidden), shard.width):
        logits = logits_of(hidden[rows], weight[: shard.columns], temperature)
        exponentials = logits.sub_(lse[rows, None]).exp_()
        scale = coefficient[rows] / temperature
        _add(exponentials, 1.0, scale, rows, hidden, weight, targets[rows], shard, d_hidden, sink)


def objective(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tokens,
    d_hidden: Tensor | None,
    sink: WeightGradient,
    settings: Surrogate,
    shard: VocabularyShard,
    temperature: float,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    """``(metrics [len(METRICS), T], log_ratios [K, T])`` and, where there is a place for it, ``grad_scale`` times the
    gradient of the loss; each chunk's logits serve all of them."""
    metrics = hidden.new_empty(len(METRICS), len(hidden), dtype=wide(hidden))
    log_ratios = metrics.new_empty(len(tokens.teachers), len(hidden))
    for rows in chunks(len(hidden), shard.width):
        targets = tokens.targets[rows]
        logits = logits_of(hidden[rows], weight[: shard.columns], temperature)
        parts, exponentials, top = _softmax(logits, targets, shard)
        statistics = join(shard.gather(parts))
        values, ratios, coefficient = objective_rows(
            statistics.logprob, statistics.entropy, tokens.select(rows), settings
        )
        metrics[:, rows], log_ratios[:, rows] = values, ratios
        if d_hidden is not None or sink.total is not None:
            scale = coefficient * (grad_scale / temperature)
            _add(
                exponentials, (top - statistics.lse).exp(), scale, rows, hidden, weight, targets, shard, d_hidden, sink
            )
    return metrics, log_ratios


def objective_rows(
    logprob: Tensor, entropy: Tensor, tokens: Tokens, settings: Surrogate
) -> tuple[Tensor, Tensor, Tensor]:
    """``(metrics [len(METRICS), n], log_ratios [K, n], d loss_t / d logprob_t [n])`` of some rows; no gradient, zeros,
    under torch.inference_mode."""
    if torch.is_inference_mode_enabled():
        _, log_ratios, values = surrogate(logprob, tokens, settings)
        coefficient = torch.zeros_like(logprob)
    else:
        with torch.enable_grad():
            theta = logprob.detach().requires_grad_()
            losses, log_ratios, values = surrogate(theta, tokens, settings)
            (coefficient,) = torch.autograd.grad(losses.sum(), theta)
    values["entropy"] = entropy if tokens.keep is None else entropy.where(tokens.keep, 0.0)
    return torch.stack([values[name] for name in METRICS]), log_ratios, coefficient


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices over the rows whose logits together stay within :data:`CHUNK_ELEMENTS`; one empty slice for no rows."""
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, max(1, rows), step):
        yield slice(start, start + step)


def logits_of(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """fp32 ``[n, columns]`` over the temperature."""
    logits = product(hidden, weight.T)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _softmax(logits: Tensor, targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    """``([3, n], [n, columns], [n])`` of a chunk: its parts as of :func:`local_statistics`, ``e^(z - top)``, and top,
    the row's maximum. Takes the logits' memory."""
    chosen = shard.pick(logits, targets)
    if not shard.columns:
        empty = torch.full_like(chosen, -torch.inf)
        return torch.stack([empty, chosen, chosen]), logits, empty
    top = logits.amax(-1)
    exponentials = logits.sub_(top[:, None]).exp()
    total = exponentials.sum(-1)
    size = total.log()
    mean = logits.mul_(exponentials).sum(-1) / total - size
    return torch.stack([top + size, chosen, mean]), exponentials, top


def _add(
    exponentials: Tensor,
    share: Tensor | float,
    scale: Tensor,
    rows: slice,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    d_hidden: Tensor | None,
    sink: WeightGradient,
) -> None:
    """Turns ``share * exponentials``, a chunk's p, into ``scale (onehot - p)``, in place, and adds its two products.

    A row whose scale is zero takes no part, whatever is in it: 0 times NaN would spoil every row of the weight.
    """
    stopped = (scale == 0)[:, None]
    d_logits = exponentials.mul_((scale * -share)[:, None])
    if shard.columns:
        local, here = shard.locate(targets)
        d_logits.scatter_add_(1, local[:, None], scale.where(here, 0.0)[:, None])
    d_logits = d_logits.masked_fill_(stopped, 0.0).to(hidden.dtype)
    if d_hidden is not None:
        d_hidden[rows] = product(d_logits, weight[: shard.columns])
    if sink.total is not None:
        sink.add(d_logits, hidden[rows].masked_fill(stopped, 0.0))
