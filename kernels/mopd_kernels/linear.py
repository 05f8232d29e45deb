"""Log-probabilities and the MOPD objective straight from hidden states and output weight, without ``[T, V]`` logits.

Notation: ``z = hidden @ weight.T / temperature``, ``p = softmax(z)``, y the target; then

    logprob = z_y - logsumexp(z)     entropy = logsumexp(z) - sum_v p_v z_v     d logprob / d z = onehot(y) - p

Each rank of ``group`` holds ``weight[V / tp, H]``, the rows ``rank * V / tp`` onwards, and equal ``hidden [T, H]``; a
few numbers per token are gathered and joined in rank order. Gradients of ``hidden`` are *partial*: the caller sums them
over the group. The weight's gradient goes to Megatron's ``main_grad`` where the parameter has one (weight_gradient.py).
Where no gradient is asked for, hidden states and weight may be packed in NVFP4 (linear_operands.py), each rank's shard
with a global scale of its own: z is then that of the numbers they stand for, without a matrix of those.
Columns from ``valid_vocab`` on are padding: never read, gradient zero. ``impl``: see dispatch.py.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopd_kernels import reference
from mopd_kernels.autograd_phase import Phase, current_phase
from mopd_kernels.dispatch import Impl, choose, untraced
from mopd_kernels.linear_operands import Operand, check_numbers, refuse_gradient, shapes_fit, unsupported_reason
from mopd_kernels.nvfp4.format import Format
from mopd_kernels.nvfp4.operators import check_matrix
from mopd_kernels.nvfp4.tensor import NVFP4Tensor
from mopd_kernels.objective import METRICS, Objective, Surrogate, Tokens
from mopd_kernels.vocabulary import Statistics, VocabularyShard, join
from mopd_kernels.weight_gradient import WeightGradient

SCALE_SLACK = 1e-6
"""By how much the gradient of the loss, an fp32 product of several factors, may differ from ``grad_scale``."""


@untraced
def linear_logprob(
    hidden: Operand,
    weight: Operand,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of ``targets`` under ``softmax(hidden @ weight.T / temperature)``; fp32 ``[T]``.

    ``hidden [T, H]``, ``weight [V/tp, H]`` of one dtype (fp32, bf16, fp16), ``targets`` int64 ``[T]`` of global token
    numbers. Differentiable in both; logits are made again in backward. Either may be an NVFP4Tensor, blocks along H,
    and neither then gets a gradient. Raises ValueError for what does not fit.
    """
    shard = _checked(hidden, weight, targets, temperature, group, valid_vocab)
    module = _implementation("linear_logprob", impl, hidden, weight)
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):
        refuse_gradient("linear_logprob", hidden, weight)
        return join(shard.gather(module.local_statistics(hidden, weight, targets, shard, temperature))).logprob
    return _LinearLogprob.apply(hidden, weight, targets, temperature, shard, module)


@untraced
@torch.no_grad()
def linear_statistics(
    hidden: Operand,
    weight: Operand,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Statistics:
    """``(logprob, entropy, lse)``, fp32 ``[T]`` each; arguments as :func:`linear_logprob`; no gradient."""
    shard = _checked(hidden, weight, targets, temperature, group, valid_vocab)
    module = _implementation("linear_statistics", impl, hidden, weight)
    return join(shard.gather(module.local_statistics(hidden, weight, targets, shard, temperature)))


@untraced
@torch.no_grad()
def linear_statistics_with_payload(
    hidden: Tensor,
    weight: Operand,
    targets: Tensor,
    payload: Format | None = None,
    *,
    amax: Tensor | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> tuple[Statistics, NVFP4Tensor]:
    """:func:`linear_statistics` of dense hidden states, and those states in NVFP4 to be kept or sent, in one pass.

    ``payload``: their format, blocks of 1x16 along H; its bytes are those of :func:`mopd_kernels.nvfp4.quantize`, the
    same on every rank of ``group``. ``amax``: fp32 [], their largest magnitude where it is known; computing it reads
    them once more. Raises ValueError for what does not fit.
    """
    if not isinstance(hidden, Tensor):
        raise ValueError("hidden is an NVFP4Tensor: it is a payload already; score it with linear_statistics")
    shard = _checked(hidden, weight, targets, temperature, group, valid_vocab)
    payload = payload or Format()
    if payload.block != "1x16":
        raise ValueError(
            f"payload.block = {payload.block!r}: hidden states are packed in blocks of 1x16, as 16x16 would give 16"
            " tokens one scale; use block='1x16'"
        )
    check_matrix(hidden, hidden.shape, payload, amax)
    module = _implementation("linear_statistics_with_payload", impl, hidden, weight)
    parts, packed = module.statistics_with_payload(hidden, weight, targets, shard, temperature, payload, amax)
    return join(shard.gather(parts)), packed


@untraced
def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tokens,
    settings: Surrogate | None = None,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    grad_scale: float = 1.0,
    impl: Impl = "auto",
) -> Objective:
    """The whole MOPD objective of these rows: loss, per-token metrics and, in the same pass, its gradient.

    All that fixes the gradient is in ``tokens`` before the call, so it is formed in forward, from one computation of
    the logits (6 T V H products instead of 8), with statistics from fp32 accumulators; backward only scales it. Rows
    out of ``tokens.keep`` take part in nothing.

    A weight with ``main_grad`` gets its gradient in forward, once: not under ``torch.no_grad``, and of a checkpointed
    region in the recomputation alone. Backward must then bring ``grad_scale`` (mcore's loss scale, or 1 over its number
    of micro-batches) as the gradient of the loss, and come once; else it raises. Without ``main_grad`` any upstream
    gradient is right. Raises ValueError for what does not fit.
    """
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):
        raise ValueError(
            "linear_objective: hidden and weight must be dense, since it forms their gradients; score NVFP4 operands"
            " with linear_logprob or linear_statistics"
        )
    shard = _checked(hidden, weight, tokens.targets, temperature, group, valid_vocab, tokens.keep)
    if not (math.isfinite(grad_scale) and grad_scale != 0):
        raise ValueError(f"grad_scale = {grad_scale} must be finite and not 0: it is what backward brings for the loss")
    module = _implementation("linear_objective", impl, hidden, weight)
    loss, metrics, log_ratios = _LinearObjective.apply(
        hidden, weight, tokens, settings or Surrogate(), shard, temperature, grad_scale, module, current_phase()
    )
    return Objective(loss=loss, log_ratios=log_ratios, per_token=dict(zip(METRICS, metrics.unbind(), strict=True)))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        shard: VocabularyShard,
        module: ModuleType,
    ) -> Tensor:
        statistics = join(shard.gather(module.local_statistics(hidden, weight, targets, shard, temperature)))
        ctx.save_for_backward(hidden, targets, statistics.lse)
        ctx.weight, ctx.version = weight, weight._version
        ctx.shard, ctx.temperature, ctx.module = shard, temperature, module
        return statistics.logprob

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, lse = ctx.saved_tensors
        if ctx.weight._version != ctx.version:
            raise RuntimeError("the output weight was changed in place between linear_logprob and its backward")
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        sink = WeightGradient(ctx.weight, ctx.shard.columns, ctx.needs_input_grad[1])
        ctx.module.add_gradients(hidden, ctx.weight, targets, lse, grad, ctx.shard, ctx.temperature, d_hidden, sink)
        return d_hidden, sink.hand_over(), None, None, None, None


class _LinearObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tokens,
        settings: Surrogate,
        shard: VocabularyShard,
        temperature: float,
        grad_scale: float,
        module: ModuleType,
        phase: Phase,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = (phase.gradient and needed for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.zeros_like(hidden) if wants_hidden else None
        sink = WeightGradient(weight, shard.columns, wants_weight)
        form_now = phase is not Phase.BEFORE_RECOMPUTATION
        metrics, log_ratios = _kept_rows(
            hidden,
            weight,
            tokens,
            d_hidden if form_now else None,
            sink if form_now else WeightGradient(weight, shard.columns, False),
            lambda *rows: module.objective(*rows, settings, shard, temperature, grad_scale),
        )
        # A sum that autograd is to get travels like any saved tensor, so that a recomputation can replace it. Something
        # is saved in any case: asking for it is what starts a recomputation, which main_grad may be waiting for.
        ctx.save_for_backward(d_hidden, metrics.new_empty(0) if sink.direct else sink.total)
        sink.total = sink.total if sink.direct else None
        ctx.sink, ctx.grad_scale, ctx.spent = sink, grad_scale, False
        loss = metrics[METRICS.index("loss")].sum()
        ctx.mark_non_differentiable(metrics, log_ratios)
        return loss, metrics, log_ratios

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, total = ctx.saved_tensors
        if ctx.sink.direct:
            _check_upstream(grad, ctx)
        else:
            ctx.sink.total = total
        ctx.spent = True
        scale = grad / ctx.grad_scale
        if d_hidden is not None:
            d_hidden = (d_hidden * scale).to(d_hidden.dtype)
        return d_hidden, ctx.sink.hand_over(scale), *[None] * 7


def _check_upstream(grad: Tensor, ctx: Any) -> None:
    """What went to ``main_grad`` in forward can be neither rescaled nor added again."""
    if ctx.spent:
        raise RuntimeError(
            "a second backward through linear_objective: its weight gradient went to weight.main_grad in forward, once;"
            " call linear_objective again"
        )
    rule = f"linear_objective formed the weight's gradient in forward for grad_scale = {ctx.grad_scale}"
    as_told = (grad / ctx.grad_scale - 1).abs() <= SCALE_SLACK
    if grad.is_cuda:  # an assertion on the device, which costs no synchronisation
        torch._assert_async(as_told, rule + ", backward brought another gradient of the loss")  # pyright: ignore[reportPrivateImportUsage]
    elif not as_told:
        raise RuntimeError(f"{rule}, but backward brought {float(grad)}; pass grad_scale={float(grad)}")


def _kept_rows(
    hidden: Tensor, weight: Tensor, tokens: Tokens, d_hidden: Tensor | None, sink: WeightGradient, run: Any
) -> tuple[Tensor, Tensor]:
    """Runs the objective over the rows in ``tokens.keep``, compacted; metrics of the others are zeros."""
    if tokens.keep is None:
        return run(hidden, weight, tokens, d_hidden, sink)
    rows = tokens.keep.nonzero()[:, 0]
    kept = hidden[rows]
    compact = None if d_hidden is None else torch.zeros_like(kept)
    some, some_ratios = run(kept, weight, tokens.select(rows), compact, sink)
    if d_hidden is not None and compact is not None:
        d_hidden[rows] = compact
    metrics = some.new_zeros(len(METRICS), len(hidden)).index_copy_(1, rows, some)
    return metrics, some.new_zeros(len(some_ratios), len(hidden)).index_copy_(1, rows, some_ratios)


def _implementation(operator: str, impl: Impl, hidden: Operand, weight: Operand) -> ModuleType:
    cuda = hidden.device.type == "cuda"
    if choose(operator, impl, cuda, lambda: unsupported_reason(hidden, weight)) == "reference":
        return reference
    from mopd_kernels import linear_triton

    return linear_triton


def _checked(
    hidden: Operand,
    weight: Operand,
    targets: Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    valid_vocab: int | None,
    keep: Tensor | None = None,
) -> VocabularyShard:
    if not shapes_fit(hidden, weight):
        raise ValueError(f"expected hidden [T, H] and weight [V/tp, H], got {list(hidden.shape)}, {list(weight.shape)}")
    check_numbers("got", hidden, weight)
    if targets.shape != tuple(hidden.shape[:1]) or targets.dtype != torch.int64:
        rows = hidden.shape[0]
        raise ValueError(
            f"targets is {targets.dtype} {list(targets.shape)}: expected int64 [{rows}], one per row of hidden"
        )
    if not hidden.device == weight.device == targets.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature = {temperature} must be finite and above 0")
    shard = VocabularyShard(weight.shape[0], group, valid_vocab)
    shard.check(targets, keep)
    return shard
