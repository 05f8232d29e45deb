"""The clipped, importance-corrected surrogate of MOPD for single tokens: its settings, its inputs, its mathematics.

Nemotron 3 Ultra report, section 3.3.1, Eq. 2 and Eq. 3. With l^x_t = log pi_x(y_t | s_t) for the policy that sampled
(behaviour), the policy at the start of the updates (prox), the trained one (theta) and teacher k with weight w_k:

    A_t = sg[sum_k w_k (l^k_t - l^prox_t)] + outcome_t
    c_t = sg[exp(l^prox_t - l^behaviour_t)]            r_t = exp(l^theta_t - l^prox_t)
    loss_t = - weight_t m_t c_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

A_t is positive where the teachers like the token more than prox does. m_t is 0 where IcePop (arXiv 2510.18855) or the
caller's gate stops the token. Everything but l^theta is known before the output layer runs, which is what lets the
kernels form loss, metrics and gradient in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

METRICS = (
    "logprob",  # l^theta_t
    "entropy",  # of theta's distribution, nats
    "log_ratio",  # sum_k w_k (l^k - l^prox)
    "advantage",  # as used: with outcome, clipped
    "ratio",  # r_t before clipping
    "importance",  # c_t before bounds
    "mask",  # m_t: 1 where the token counts
    "clipped",  # 1 where the clip stops the gradient
    "k1",  # single-sample estimators of the reverse KL of theta to the teachers, summed with their weights, nats
    "k2",
    "k3",
    "loss",  # loss_t, this token's share
)
"""Per-token results, in the order of the rows that the kernels write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surrogate:
    """Factors of Eq. 3. ``importance``: icepop masks tokens whose c_t leaves its bounds, clamp clamps c_t to them, none
    uses it as it is. ``force_on_policy_ratio``: r_t = 1 with the gradient of l^theta (as released)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    importance: Literal["icepop", "clamp", "none"] = "icepop"
    importance_low: float = 0.2
    importance_high: float = 5.0
    force_on_policy_ratio: bool = False
    advantage_clip: float | None = None

    def __post_init__(self) -> None:
        if self.importance not in ("icepop", "clamp", "none"):
            raise ValueError(f"importance = {self.importance!r}: expected icepop, clamp or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What is known of each row before the output layer runs; all on the device of the logits or hidden states.

    Raises ValueError for a field of another length or dtype.
    """

    targets: Tensor  # int64 [T], global token numbers
    behaviour: Tensor  # fp32 [T], l^behaviour
    teachers: Tensor  # fp32 [K, T] (or [T] for one), l^k
    weight: Tensor  # fp32 [T], share of the loss: lambda over a global denominator
    teacher_weights: Tensor | None = None  # fp32 [K, T], w_k; 1/K when left out
    prox: Tensor | None = None  # fp32 [T]; None: theta itself, exact for one optimizer step per rollout batch
    outcome: Tensor | None = None  # fp32 [T], added to the advantage
    gate: Tensor | None = None  # bool [T], a factor of m_t: false rows have metrics but no gradient
    keep: Tensor | None = None  # bool [T], false rows are never computed: zeros everywhere, no logits read, no GEMM

    def __post_init__(self) -> None:
        if self.teachers.ndim == 1:
            object.__setattr__(self, "teachers", self.teachers[None])
        rows, teachers = len(self.targets), len(self.teachers)
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if value is None:
                continue
            shape = (teachers, rows) if name in ("teachers", "teacher_weights") else (rows,)
            dtype = _DTYPES.get(name, torch.float32)
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}: expected {dtype} {list(shape)}")
            if value.device != self.targets.device:
                raise ValueError(f"{name} is on {value.device}, targets on {self.targets.device}: move it there")
        if teachers == 0:
            raise ValueError("teachers is [0, T]: at least one teacher must score the tokens")

    def select(self, rows: Tensor | slice) -> Tokens:
        """The same for a subset of the rows."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[..., rows] for name, value in given.items() if value is not None})


_DTYPES = {"targets": torch.int64, "gate": torch.bool, "keep": torch.bool}


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Loss of these rows and what to log; ``loss`` is differentiable, the rest is detached."""

    loss: Tensor  # fp32 scalar: sum of per_token["loss"]
    log_ratios: Tensor  # fp32 [K, T]: l^k - l^prox of each teacher
    per_token: Mapping[str, Tensor] = field(default_factory=dict)  # fp32 [T] for each name of METRICS


def surrogate(theta: Tensor, tokens: Tokens, settings: Surrogate) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """``(loss_t [T], log_ratios [K, T], metrics)`` from ``theta`` = l^theta ``[T]`` fp32, in which loss_t is
    differentiable.

    The metrics are those of :data:`METRICS` without ``entropy``, detached. Rows out of ``tokens.keep`` are zeros.
    """
    detached = theta.detach()
    prox = detached if tokens.prox is None else tokens.prox
    log_ratios, weights = tokens.teachers - prox, teacher_weights(tokens)
    log_ratio = (weights * log_ratios).sum(0)
    advantage = log_ratio if tokens.outcome is None else log_ratio + tokens.outcome
    if settings.advantage_clip is not None:
        advantage = advantage.clamp(-settings.advantage_clip, settings.advantage_clip)
    importance = (prox - tokens.behaviour).exp()
    mask, factor = _importance_factor(importance, tokens, settings)
    base = detached if settings.force_on_policy_ratio else prox
    # Where a token does not count its ratio is taken at 1, and where the clip holds it is theta's no more: 0 * inf
    # would put NaN into the gradient.
    gap = torch.where(mask, detached - base, 0.0)
    free, bound = _sides(gap.exp(), advantage, settings)
    clipped = bound < free
    free, bound = _sides(torch.where(mask & ~clipped, theta - base, gap).exp(), advantage, settings)
    weight = tokens.weight.where(mask, 0.0)
    loss = -(weight * factor * torch.minimum(free, bound).where(mask, 0.0))
    to_teachers = tokens.teachers - detached
    metrics = {
        "logprob": detached,
        "log_ratio": log_ratio,
        "advantage": advantage,
        "ratio": (detached - base).exp(),
        "importance": importance,
        "mask": mask,
        "clipped": clipped,
        "k1": -(weights * to_teachers).sum(0),
        "k2": (weights * to_teachers.square() / 2).sum(0),
        "k3": (weights * (to_teachers.expm1() - to_teachers)).sum(0),
        "loss": loss.detach(),
    }
    if tokens.keep is not None:
        loss, log_ratios = loss.where(tokens.keep, 0.0), log_ratios.where(tokens.keep, 0.0)
        metrics = {name: value.where(tokens.keep, 0.0) for name, value in metrics.items()}
    return loss, log_ratios, {name: value.float() for name, value in metrics.items()}


def _sides(ratio: Tensor, advantage: Tensor, settings: Surrogate) -> tuple[Tensor, Tensor]:
    """The two of which Eq. 3 takes the smaller: free, and bound by the clip."""
    return ratio * advantage, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantage


def teacher_weights(tokens: Tokens) -> Tensor:
    """fp32 ``[K, T]``."""
    if tokens.teacher_weights is not None:
        return tokens.teacher_weights
    return torch.full_like(tokens.teachers, 1.0 / len(tokens.teachers))


def _importance_factor(importance: Tensor, tokens: Tokens, settings: Surrogate) -> tuple[Tensor, Tensor]:
    """``(m_t, m_t c_t)``; out of icepop's bounds is a NaN importance too, else it shows in the loss."""
    low, high = settings.importance_low, settings.importance_high
    mask = torch.ones_like(importance, dtype=torch.bool)
    if settings.importance == "icepop":
        mask = (importance >= low) & (importance <= high)
    elif settings.importance == "clamp":
        importance = importance.clamp(low, high)
    for given in (tokens.gate, tokens.keep):
        mask = mask if given is None else mask & given
    return mask, importance.where(mask, 0.0)
