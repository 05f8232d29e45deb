"""Triton forms of the operators on hidden states; the functions, their arguments and results are those of reference.py.

Statistics come from the fp32 accumulators of a product whose logits never reach memory (linear_kernels.py). Where a
gradient is wanted, a chunk of rows at a time, one product writes ``E = exp(z - guide)`` in the dtype of ``hidden`` and
sums it up; one small gather joins the shards, one kernel turns a row's sums into its metrics and the gradient of its
logits, ``v (E - S onehot)`` with ``S = sum E`` and a number v, and cuBLAS forms the other two products:

    d_hidden = v * (E @ weight)          d_weight += E^T @ (v * hidden), straight into the fp32 sum

The logits are never read again, not even under tensor parallelism: the gather changes S and v alone. The guide of a row
is its target's logit less the behaviour policy's log-probability, that is its log-sum-exp as far as the policies agree.
Where they disagree beyond what the dtype of E can hold, the joined sum tells; the row is left out, and done again from
its true log-sum-exp. Rows without gradient (masked, gated, clipped) have v = 0 and go through the products as zeros:
to leave them out, the host would have to wait for their number in each chunk.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mopd_kernels import linear_kernels as kernels
from mopd_kernels.linear_operands import Operand, linear, rows_of
from mopd_kernels.linear_tiles import (
    LOG2_E,
    PAYLOAD_TILE,
    SLAB,
    Head,
    Workspace,
    launch,
    quotient,
    run_payload_tiles,
    run_tiles,
    scale_rows,
    target_logits,
)
from mopd_kernels.nvfp4.format import Format
from mopd_kernels.nvfp4.tensor import NVFP4Tensor
from mopd_kernels.nvfp4.triton_ops import Operand as Quantized
from mopd_kernels.nvfp4.triton_ops import Target, quantize
from mopd_kernels.objective import Surrogate, Tokens
from mopd_kernels.products import product
from mopd_kernels.triton_common import metric_buffers, surrogate_arguments
from mopd_kernels.vocabulary import Statistics, VocabularyShard, join, merge_columns
from mopd_kernels.weight_gradient import WeightGradient

BOUND = {torch.float16: 2.7, torch.bfloat16: 44.0, torch.float32: 44.0}
"""Nats that a guide may be off: E then keeps what is below 2^-60 of a row's sum in dtypes with the exponents of fp32.
fp16 ends at 65504 and loses precision below 6e-5, so it gets a factor of 15."""


def local_statistics(
    hidden: Operand, weight: Operand, targets: Tensor, shard: VocabularyShard, temperature: float
) -> Tensor:
    """fp32 ``[3, T]`` of this shard: log-sum-exp, the target's logit (0 where another shard holds it), and the mean
    log-probability under the shard's own softmax."""
    out = torch.zeros(3, len(targets), dtype=torch.float32, device=targets.device)
    if not shard.columns:
        out[0] = -torch.inf
        return out
    head = Head.of(hidden, weight, targets, shard, temperature)
    tile = head.tile("statistics")
    for rows in head.chunks(12 * quotient(shard.width, tile.columns), tile.rows):
        run_tiles(head, rows, tile, None, None, out[:, rows])
    return out


def statistics_with_payload(
    hidden: Tensor,
    weight: Operand,
    targets: Tensor,
    shard: VocabularyShard,
    temperature: float,
    payload: Format,
    amax: Tensor | None,
) -> tuple[Tensor, NVFP4Tensor]:
    """What :func:`local_statistics` and :func:`mopd_kernels.nvfp4.quantize` make of ``hidden``: the programs that score
    the first columns quantize the tiles of hidden states that they multiply. Not so in fp32, whose tiles are too small
    (linear_tiles.FP32_TILE), nor where there is nothing to score."""
    ends = (0, min(PAYLOAD_TILE.columns, shard.columns), shard.columns)
    first, rest = (shard.piece(slice(a, b)) for a, b in pairwise(ends))
    if hidden.dtype == torch.float32 or not (first.columns and hidden.numel()):
        return local_statistics(hidden, weight, targets, shard, temperature), quantize(hidden, payload, amax)
    hidden, weight = hidden.contiguous(), linear(weight)
    target, out = Target(Quantized(hidden, payload), amax), torch.empty(3, len(hidden), device=hidden.device)
    run_payload_tiles(Head.of(hidden, weight, targets, first, temperature), target, out)
    if rest.columns:
        others = local_statistics(
            hidden, rows_of(weight, slice(first.columns, shard.columns)), targets, rest, temperature
        )
        out = merge_columns(torch.stack([out, others]))
    return out, target.tensor()


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
    """Gradients for ``d z = coefficient (onehot(y) - p)``: with lse as the guide E is p, and v -coefficient.

    A row whose coefficient is zero takes no part, whatever is in it: E of NaN would spoil every row of the weight.
    """
    stopped = coefficient == 0
    head = Head.of(hidden.masked_fill(stopped[:, None], 0.0), weight, targets, shard, temperature)
    workspace = Workspace(head)
    guide, scale = (lse * LOG2_E).masked_fill_(stopped, 0.0), coefficient * (-1 / temperature)
    for rows in workspace.chunks:
        exponentials = workspace.of(rows)
        if exponentials is not None:
            target = run_tiles(head, rows, workspace.tile, guide[rows], exponentials, None)
            places, n = head.places[rows], len(target)
            launch(
                kernels.subtract_onehot_kernel, (quotient(n, 128),), exponentials, exponentials.stride(0), target,
                places, n, ROWS=128,
            )  # fmt: skip
        _add(head, rows, exponentials, scale[rows], d_hidden, sink)


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
    gradient of the loss."""
    result = _Rows(tokens, settings)
    if d_hidden is None and sink.total is None:
        statistics = local_statistics(hidden, weight, tokens.targets, shard, temperature)
        result.exact(join(shard.gather(statistics)), 0.0)
        return result.metrics, result.log_ratios
    head = Head.of(hidden, weight, tokens.targets, shard, temperature)
    workspace = Workspace(head)
    guide = shard.gather(target_logits(head)[None]).sum(0)[0].sub_(tokens.behaviour, alpha=LOG2_E)
    for rows in workspace.chunks:
        exponentials = workspace.of(rows)
        sums = guide.new_zeros(3, rows.stop - rows.start)
        if exponentials is not None:
            run_tiles(head, rows, workspace.tile, guide[rows], exponentials, sums)
        scale = result.guided(head, rows, shard.gather(sums), exponentials, grad_scale / temperature)
        _add(head, rows, exponentials, scale, d_hidden, sink)
    _redo_overflowed(head, weight, tokens, settings, result, temperature, grad_scale, d_hidden, sink)
    return result.metrics, result.log_ratios


class _Rows:
    """Metrics of all rows, and for those it is asked about the factor v of their E."""

    def __init__(self, tokens: Tokens, settings: Surrogate) -> None:
        count, device = len(tokens.targets), tokens.targets.device
        self.metrics, self.log_ratios = metric_buffers(count, len(tokens.teachers), device)
        self.overflowed = torch.zeros(count, dtype=torch.int8, device=device)
        self._arguments = surrogate_arguments(tokens, settings)

    def guided(self, head: Head, rows: slice, sums: Tensor, exponentials: Tensor | None, gradient: float) -> Tensor:
        """fp32 ``[n]`` of one chunk, from the shards' sums ``[tp, 3, n]``; mends its E in place."""
        bound = BOUND[head.hidden.dtype]
        return self._run(sums, rows.start, exponentials, head.places[rows], self.overflowed, gradient, bound)

    def exact(self, statistics: Statistics, gradient: float) -> Tensor:
        """fp32 ``[T]`` from statistics of all rows, which are sums with the log-sum-exp itself as guide."""
        sums = torch.stack([torch.ones_like(statistics.lse), -statistics.entropy, statistics.logprob])
        return self._run(sums[None], 0, None, None, None, gradient, 1.0)

    def _run(
        self,
        sums: Tensor,
        first: int,
        exponentials: Tensor | None,
        places: Tensor | None,
        overflowed: Tensor | None,
        gradient: float,
        bound: float,
    ) -> Tensor:
        shards, _, n = sums.shape
        scale = sums.new_empty(n)
        if n:
            launch(
                kernels.objective_rows_kernel,
                (quotient(n, 8),),
                sums=sums.contiguous(),
                exponentials=exponentials,
                places=places,
                scale=scale,
                overflowed=overflowed,
                metrics=self.metrics,
                log_ratios=self.log_ratios,
                first=first,
                n=n,
                columns=0 if exponentials is None else exponentials.shape[1],
                stride=0 if exponentials is None else exponentials.stride(0),
                T=self.metrics.shape[1],
                K=len(self.log_ratios),
                gradient=gradient,
                bound=bound,
                SHARDS=shards,
                ROWS=8,
                COLUMNS=1024,
                **self._arguments,
            )
        return scale


def _redo_overflowed(
    head: Head,
    weight: Tensor,
    tokens: Tokens,
    settings: Surrogate,
    result: _Rows,
    temperature: float,
    grad_scale: float,
    d_hidden: Tensor | None,
    sink: WeightGradient,
) -> None:
    """The rows whose guide was too far off, from their true log-sum-exp; the same ones on every rank."""
    rows = result.overflowed.nonzero()[:, 0]  # the one synchronisation of a call
    if not len(rows):
        return
    hidden, some, shard = head.hidden[rows], tokens.select(rows), head.shard
    statistics = join(shard.gather(local_statistics(hidden, weight, some.targets, shard, temperature)))
    again = _Rows(some, settings)
    coefficient = again.exact(statistics, -grad_scale)
    result.metrics[:, rows], result.log_ratios[:, rows] = again.metrics, again.log_ratios
    compact = None if d_hidden is None else torch.empty_like(hidden)
    add_gradients(hidden, weight, some.targets, statistics.lse, coefficient, shard, temperature, compact, sink)
    if d_hidden is not None and compact is not None:
        d_hidden[rows] = compact


def _add(
    head: Head, rows: slice, exponentials: Tensor | None, scale: Tensor, d_hidden: Tensor | None, sink: WeightGradient
) -> None:
    """Both products of a chunk whose logits have the gradient ``scale * exponentials``."""
    if exponentials is None:
        if d_hidden is not None:
            d_hidden[rows] = 0.0
        return
    if sink.total is not None:
        scaled = torch.empty_like(head.hidden[rows])
        scale_rows(head.hidden[rows], scale, scaled)
        sink.add(exponentials, scaled)
        del scaled  # its memory serves the other product
    if d_hidden is not None:
        for first in range(0, d_hidden.shape[1], SLAB):
            slab = slice(first, first + SLAB)
            scale_rows(product(exponentials, head.weight[:, slab]), scale, d_hidden[rows, slab])
