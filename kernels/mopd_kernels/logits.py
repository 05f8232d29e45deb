"""Statistics and the MOPD objective of materialised logits ``[T, V/tp]``, for models that cannot avoid them.

With ``z = logits / temperature``, ``p = softmax(z)`` over the whole vocabulary and y the target:

    logprob = z_y - logsumexp(z)    entropy = logsumexp(z) - sum_v p_v z_v    d loss / d z = coefficient (onehot(y) - p)

where the coefficient of a row is d loss_t / d logprob_t (objective.py). Each rank of ``group`` holds the columns
``rank * V / tp`` onwards of the same rows; one gather of four numbers per row joins the shards. Columns from
``valid_vocab`` on are padding: whatever is in them, they take no part and their gradient is zero. A logit of -inf (a
masked token) has p = 0; a row without a finite logit has NaN results. ``impl``: see dispatch.py.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopd_kernels import logits_reference
from mopd_kernels.autograd_phase import Phase, current_phase
from mopd_kernels.dispatch import DTYPES, Impl, resolve, untraced
from mopd_kernels.objective import METRICS, Objective, Surrogate, Tokens
from mopd_kernels.vocabulary import Statistics, VocabularyShard


@untraced
@torch.no_grad()
def logit_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    keep: Tensor | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Statistics:
    """``(logprob, entropy, lse)``, fp32 ``[T]`` each, from one read of the logits; no gradient.

    ``logits [T, V/tp]`` fp32, bf16 or fp16; ``targets`` int64 ``[T]`` of global token numbers. Rows out of ``keep``
    (bool ``[T]``) are not read: zeros. Raises ValueError for what does not fit.
    """
    shard = _checked(logits, targets, keep, temperature, group, valid_vocab)
    module = _implementation("logit_statistics", impl, logits)
    return module.statistics(logits, targets, keep, shard, temperature)


@untraced
def logit_objective(
    logits: Tensor,
    tokens: Tokens,
    settings: Surrogate | None = None,
    *,
    inplace: bool = False,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Objective:
    """The whole MOPD objective of these rows: loss, per-token metrics and, in the same pass, the gradient.

    ``logits [T, V/tp]`` fp32, bf16 or fp16. The loss is the sum of ``per_token["loss"]``, a torch reduction over
    ``[T]``, differentiable in the logits. Rows out of ``tokens.keep`` are never read, rows whose gradient is zero are
    not read for it.

    The gradient is formed in forward, for an upstream gradient of 1 and in the logits' dtype, where it can be asked
    for: with gradients enabled and logits that require them. Backward scales it, unless by 1, and comes once. fp16 has
    nothing below 6e-8: let ``tokens.weight``, not the upstream gradient, carry a loss scale there.

    ``inplace`` writes the gradient over the logits, whose values are gone when forward returns, and needs no memory of
    their size; an operation that saved them for its own backward will raise there. Leaves that require gradients are
    refused. Where no gradient can be asked for the logits stay as they are, as they do in the first pass of
    torch.utils.checkpoint of either kind, whose recomputation then writes the gradient.

    Raises ValueError for what does not fit.
    """
    shard = _checked(logits, tokens.targets, tokens.keep, temperature, group, valid_vocab)
    module = _implementation("logit_objective", impl, logits)
    phase = current_phase()
    if inplace:
        _check_writable(logits, phase)
    loss, metrics, log_ratios = _LogitObjective.apply(
        logits, tokens, settings or Surrogate(), inplace, shard, temperature, module, phase
    )
    return Objective(loss=loss, log_ratios=log_ratios, per_token=dict(zip(METRICS, metrics.unbind(), strict=True)))


class _LogitObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tokens,
        settings: Surrogate,
        inplace: bool,
        shard: VocabularyShard,
        temperature: float,
        module: ModuleType,
        phase: Phase,
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = logits.detach()
        gradient = None
        if ctx.needs_input_grad[0] and phase is Phase.FINAL:
            gradient = values if inplace else torch.empty_like(values, memory_format=torch.contiguous_format)
        metrics, log_ratios = module.objective(values, tokens, settings, shard, temperature, gradient)
        if gradient is values:
            torch.autograd.graph.increment_version(logits)  # a kernel's writes are not seen by autograd
        # Before recomputation something of the gradient's shape must be saved: it will be replaced.
        ctx.save_for_backward(values if gradient is None and ctx.needs_input_grad[0] else gradient)
        ctx.module, ctx.spent = module, False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics, log_ratios)
        return metrics[METRICS.index("loss")].sum(), metrics, log_ratios

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "a second backward through logit_objective: the first gave away the one gradient that forward formed;"
                " call logit_objective again, or add up the losses and go backward once"
            )
        (gradient,) = ctx.saved_tensors
        ctx.spent = True
        ctx.module.scale_(gradient, grad)
        return gradient, *[None] * 7


def _implementation(operator: str, impl: Impl, logits: Tensor) -> ModuleType:
    if resolve(operator, impl, logits) == "reference":
        return logits_reference
    from mopd_kernels import logits_triton

    return logits_triton


def _check_writable(logits: Tensor, phase: Phase) -> None:
    rows, width = logits.shape
    if logits.stride(1) != 1 or (rows > 1 and logits.stride(0) < width):
        raise ValueError(
            f"inplace = True, logits of strides {logits.stride()} and shape {list(logits.shape)}: the gradient needs"
            " dense rows that do not overlap; pass logits.contiguous(), or inplace=False"
        )
    if phase.gradient and logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace = True, logits that are a leaf and require gradients: the gradient would replace what is trained;"
            " pass inplace=False, also where logits are an input of torch.utils.checkpoint(use_reentrant=True)"
        )


def _checked(
    logits: Tensor,
    targets: Tensor,
    keep: Tensor | None,
    temperature: float,
    group: dist.ProcessGroup | None,
    valid_vocab: int | None,
) -> VocabularyShard:
    if logits.ndim != 2 or logits.dtype not in DTYPES:
        raise ValueError(
            f"logits is {logits.dtype} {list(logits.shape)}: expected [T, V/tp] of {', '.join(str(d) for d in DTYPES)}"
        )
    for name, given, dtype in (("targets", targets, torch.int64), ("keep", keep, torch.bool)):
        if given is None:
            continue
        if given.shape != logits.shape[:1] or given.dtype != dtype:
            raise ValueError(
                f"{name} is {given.dtype} {list(given.shape)}: expected {dtype} [{len(logits)}], one per row of logits"
            )
        if given.device != logits.device:
            raise ValueError(f"{name} is on {given.device}, logits on {logits.device}: move it there")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature = {temperature} must be finite and above 0")
    shard = VocabularyShard(logits.shape[1], group, valid_vocab)
    shard.check(targets, keep)
    return shard
