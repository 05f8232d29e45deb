"""Multi-teacher on-policy distillation, Eq. 2 and Eq. 3 of the Nemotron 3 Ultra report (section 3.3.1), as a loss.

With l^x_t = log pi_x(y_t | s_t) for the behaviour policy that sampled (behav), the policy at the start of the updates
on this batch (prox), the trained one (theta) and the domain's teacher (T):

    A_t = sg[l^T_t - l^prox_t] (+ alpha A^outcome)       sign: positive where the teacher likes the token more than prox
    c_t = sg[exp(l^prox_t - l^behav_t)]                  r_t = exp(l^theta_t - l^prox_t)
    loss = - sum_t w_t m_t c_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

w_t is the domain's lambda over a global denominator, so shares of the loss add up over micro-batches and ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mopd import masks
from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput

if TYPE_CHECKING:
    from megatron_mopd.config import Mopd


def mopd_loss(theta_logprobs: Tensor, batch: MicroBatch, settings: Mopd, counts: Counts) -> ObjectiveOutput:
    """This micro-batch's share of the MOPD loss.

    ``theta_logprobs [T]`` carries the gradient; without ``batch.prox_logprobs`` prox is theta itself, detached, which
    is exact when one optimizer step is taken per rollout batch. ``per_token`` (all fp32 ``[T]``): ``log_ratio`` =
    teacher - prox, ``advantage`` as used, ``ratio`` = r_t before clipping, ``importance`` = c_t before bounds,
    ``mask`` (1 where the token counts), ``clipped`` (1 where the clip stops the gradient), ``k1``, ``k2``, ``k3``
    (single-sample estimators of the reverse KL of theta to the teacher, in nats). Raises ValueError when the batch
    lacks log-probabilities or outcome advantages that the settings need.
    """
    if theta_logprobs.shape != batch.targets.shape:
        raise ValueError(
            f"theta_logprobs {list(theta_logprobs.shape)}: expected one per completion token,"
            f" {list(batch.targets.shape)}"
        )
    theta, device = theta_logprobs.detach(), theta_logprobs.device
    behav = _on(batch.behav_logprobs, device, "behav_logprobs")
    teacher = _on(batch.teacher_logprobs, device, "teacher_logprobs")
    prox = theta if batch.prox_logprobs is None else _on(batch.prox_logprobs, device, "prox_logprobs")
    advantage = _advantage(teacher - prox, batch, settings, device)
    log_importance = prox - behav
    importance = log_importance.exp()
    mask, factor = _importance_factor(importance, log_importance, batch.cu_seqlens.to(device), settings)
    # Where a token does not count its ratio is taken at 1, since 0 * inf would put NaN into the gradient.
    base = theta if settings.force_on_policy_ratio else prox
    ratio = torch.where(mask, theta_logprobs - base, 0.0).exp()
    free, bound = ratio * advantage, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantage
    weight = token_weights(batch, settings.normalization, counts, device) * batch.domain_weight.to(device)
    loss = -(weight * factor * torch.minimum(free, bound)).sum()
    gap = teacher - theta
    per_token = {
        "log_ratio": teacher - prox,
        "advantage": advantage,
        "ratio": (theta - base).exp(),
        "importance": importance,
        "mask": mask,
        "clipped": (bound < free).detach(),
        "k1": -gap,
        "k2": gap.square() / 2,
        "k3": gap.expm1() - gap,
    }
    return ObjectiveOutput(loss=loss, per_token={name: value.float() for name, value in per_token.items()})


def token_weights(batch: MicroBatch, normalization: str, counts: Counts, device: torch.device) -> Tensor:
    """fp32 ``[T]``: 1/N per token, or 1/(sequences * own length) under sequence normalisation; N is counted before
    masks."""
    if normalization == "token":
        return torch.full((len(batch.targets),), 1.0 / max(1, counts.tokens), device=device)
    cu_seqlens = batch.cu_seqlens.to(device)
    lengths = cu_seqlens.diff()[masks.segments(cu_seqlens, len(batch.targets))]
    return 1.0 / (lengths * max(1, counts.sequences)).float()


def _advantage(log_ratio: Tensor, batch: MicroBatch, settings: Mopd, device: torch.device) -> Tensor:
    """Eq. 2, the outcome's share and then the clip of the sum, in the order of the released code."""
    advantage = log_ratio
    if settings.outcome_weight and len(log_ratio):
        advantage = advantage + settings.outcome_weight * _on(batch.outcome_advantage, device, "outcome_advantage")
    if settings.advantage_clip is not None:
        advantage = advantage.clamp(-settings.advantage_clip, settings.advantage_clip)
    return advantage


def _importance_factor(
    importance: Tensor, log_importance: Tensor, cu_seqlens: Tensor, settings: Mopd
) -> tuple[Tensor, Tensor]:
    """``(m_t, m_t c_t)`` with c_t as the settings want it."""
    low, high = settings.importance_low, settings.importance_high
    mask = torch.ones_like(importance, dtype=torch.bool)
    if settings.importance == "icepop":
        mask = masks.icepop(importance, low, high)
    elif settings.importance == "clamp":
        importance = importance.clamp(low, high)
    if settings.sequence_error_threshold is not None:
        mask = mask & masks.agreeing_sequences(log_importance, cu_seqlens, settings.sequence_error_threshold)
    return mask, importance.where(mask, 0.0)


def _on(values: Tensor | None, device: torch.device, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"MicroBatch.{name} is missing: MOPD needs it under these settings")
    return values.detach().to(device)
