"""Multi-teacher on-policy distillation, Eq. 2 and Eq. 3 of the Nemotron 3 Ultra report (section 3.3.1), as a loss.

:func:`mopd_kernels.surrogate` is the mathematics; here a micro-batch and its settings become its inputs. Three forms
give the same loss and gradient: :func:`mopd_objective` in one pass over hidden states and output weight,
:func:`mopd_of_logits` on materialised logits, :func:`mopd_loss` on any differentiable log-probabilities. A token's
weight is its domain's lambda over a global denominator, so shares of the loss add up over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mopd import masks
from megatron_mopd.predictions import Predictions
from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput
from mopd_kernels import Surrogate, Tokens, linear_objective, surrogate
from mopd_kernels.logits import logit_objective, logit_statistics

if TYPE_CHECKING:
    from megatron_mopd.config import Mopd

UNLOGGED = ("logprob", "loss")
"""Of mopd_kernels.METRICS, what has no mean worth a metric."""


def mopd_objective(predictions: Predictions, batch: MicroBatch, settings: Mopd, counts: Counts) -> ObjectiveOutput:
    """This micro-batch's share of the MOPD loss with its gradient, formed in one pass; no logits in memory.

    ``per_token`` as of :func:`mopd_loss`, and the student's ``entropy`` in nats. ``sequence_error_threshold`` without
    prox costs a forward over the vocabulary of its own, since no token's gradient is known before all tokens of its
    sequence are. Errors as of :func:`mopd_loss`.
    """
    tokens, factors = surrogate_inputs(
        batch, settings, counts, predictions.hidden.device, lambda: predictions.statistics(batch.targets).logprob
    )
    result = linear_objective(
        predictions.hidden,
        predictions.weight,
        tokens,
        factors,
        grad_scale=predictions.grad_scale,
        **predictions.options,
    )
    return _output(result.loss, result.per_token)


def mopd_of_logits(predictions: Predictions, batch: MicroBatch, settings: Mopd, counts: Counts) -> ObjectiveOutput:
    """The same from logits ``[T, V/tp]`` that torch's matrix product makes and their gradient replaces."""
    logits, targets = predictions.logits(), batch.targets.to(predictions.hidden.device)
    tokens, factors = surrogate_inputs(
        batch,
        settings,
        counts,
        logits.device,
        lambda: logit_statistics(logits.detach(), targets, **predictions.options).logprob,
    )
    result = logit_objective(logits, tokens, factors, inplace=True, **predictions.options)
    return _output(result.loss, result.per_token)


def mopd_loss(theta_logprobs: Tensor, batch: MicroBatch, settings: Mopd, counts: Counts) -> ObjectiveOutput:
    """The same from ``theta_logprobs [T]``, which carry the gradient.

    Without ``batch.prox_logprobs`` prox is theta itself, detached, which is exact when one optimizer step is taken per
    rollout batch. ``per_token`` (all fp32 ``[T]``): ``log_ratio`` = teacher - prox, ``advantage`` as used, ``ratio`` =
    r_t before clipping, ``importance`` = c_t before bounds, ``mask`` (1 where the token counts), ``clipped`` (1 where
    the clip stops the gradient), ``k1``, ``k2``, ``k3`` (single-sample estimators of the reverse KL of theta to the
    teacher, in nats). Raises ValueError when the batch lacks log-probabilities or outcome advantages that the settings
    need.
    """
    if theta_logprobs.shape != batch.targets.shape:
        raise ValueError(
            f"theta_logprobs {list(theta_logprobs.shape)}: expected one per completion token,"
            f" {list(batch.targets.shape)}"
        )
    tokens, factors = surrogate_inputs(batch, settings, counts, theta_logprobs.device, theta_logprobs.detach)
    losses, _, per_token = surrogate(theta_logprobs, tokens, factors)
    return _output(losses.sum(), per_token)


def surrogate_inputs(
    batch: MicroBatch, settings: Mopd, counts: Counts, device: torch.device, theta: Callable[[], Tensor]
) -> tuple[Tokens, Surrogate]:
    """What the kernels need to know of a micro-batch's tokens, and the factors of Eq. 3, for all forms alike.

    ``theta()`` is log pi_theta ``[T]``, detached: asked for where whole sequences may be dropped and the batch has no
    prox.
    """
    behaviour = _on(batch.behav_logprobs, device, "behav_logprobs")
    prox = None if batch.prox_logprobs is None else _on(batch.prox_logprobs, device, "prox_logprobs")
    gate = outcome = None
    if settings.sequence_error_threshold is not None:
        log_importance = (theta() if prox is None else prox) - behaviour
        gate = masks.agreeing_sequences(log_importance, batch.cu_seqlens.to(device), settings.sequence_error_threshold)
    if settings.outcome_weight and len(batch.targets):
        outcome = settings.outcome_weight * _on(batch.outcome_advantage, device, "outcome_advantage")
    tokens = Tokens(
        targets=batch.targets.to(device),
        behaviour=behaviour,
        teachers=_on(batch.teacher_logprobs, device, "teacher_logprobs"),
        weight=token_weights(batch, settings.normalization, counts, device) * batch.domain_weight.to(device),
        prox=prox,
        outcome=outcome,
        gate=gate,
    )
    names = ("clip_low", "clip_high", "importance", "importance_low", "importance_high")
    names += ("force_on_policy_ratio", "advantage_clip")
    return tokens, Surrogate(**{name: getattr(settings, name) for name in names})


def token_weights(batch: MicroBatch, normalization: str, counts: Counts, device: torch.device) -> Tensor:
    """fp32 ``[T]``: 1/N per token, or 1/(sequences * own length) under sequence normalisation; N is counted before
    masks."""
    if normalization == "token":
        return torch.full((len(batch.targets),), 1.0 / max(1, counts.tokens), device=device)
    cu_seqlens = batch.cu_seqlens.to(device)
    lengths = cu_seqlens.diff()[masks.segments(cu_seqlens, len(batch.targets))]
    return 1.0 / (lengths * max(1, counts.sequences)).float()


def _output(loss: Tensor, per_token: Mapping[str, Tensor]) -> ObjectiveOutput:
    return ObjectiveOutput(loss=loss, per_token={n: value for n, value in per_token.items() if n not in UNLOGGED})


def _on(values: Tensor | None, device: torch.device, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"MicroBatch.{name} is missing: MOPD needs it under these settings")
    return values.detach().to(device)
