"""The settings of what is learned: objectives and MTP heads. Imports neither torch nor megatron.core."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_mopd.data_config import Weight
from megatron_mopd.objective_presets import OBJECTIVE_PRESETS
from megatron_mopd.settings import Section


class Mopd(Section):
    """Eq. 3 of the Nemotron 3 Ultra report (section 3.3.1) and its released variants as fields."""

    type: Literal["mopd"] = "mopd"
    preset: Literal["mimo", "cascade_2", "ultra_released"] | None = None
    """Values for the fields below, from megatron_mopd.objective_presets; a field given beside it wins."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """r_t is clipped to [1 - clip_low, 1 + clip_high]; the report gives no value, 0.2 is PPO's."""
    clip_high: float = Field(default=0.2, ge=0)
    importance: Literal["icepop", "clamp", "none"] = "icepop"
    """icepop: tokens with c_t outside the bounds are masked (m_t); clamp: c_t is clamped to them, as in the released
    configuration; none: c_t is used as it is."""
    importance_low: float = Field(default=0.2, ge=0)
    importance_high: float = Field(default=5.0, gt=0)
    """Bounds of c_t; [0.2, 5] in the released configuration."""
    force_on_policy_ratio: bool = False
    """r_t = 1 with the gradient of log pi_theta (released configuration)."""
    advantage_clip: float | None = Field(default=None, gt=0)
    """Advantages are clipped to [-x, x]; 20 in the released configuration."""
    sequence_error_threshold: float | None = Field(default=None, gt=1)
    """Sequences whose mean exp|log c_t| exceeds this are dropped; 2 in the released configuration."""
    normalization: Literal["token", "sequence"] = "token"
    """token: the sum over tokens divided by the global number of completion tokens before m_t;
    sequence: the mean over sequences of each sequence's token mean (MiMo, Cascade 2)."""
    outcome_weight: float = Field(default=0.0, ge=0)
    """alpha: weight of the group-relative outcome-reward advantage; needs rollout.samples_per_prompt >= 2."""
    domain_weights: dict[str, Weight] = {}
    """lambda_i on the loss; 1 for a domain not named."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer steps per rollout batch. With 1, prox is the training forward itself and no prox forward runs."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        known = OBJECTIVE_PRESETS.get(str(values.get("preset"))) if isinstance(values, dict) else None
        return values if known is None else {**known, **values}

    @model_validator(mode="after")
    def _bounds(self) -> Mopd:
        if self.importance_low >= self.importance_high:
            raise ValueError(
                f"importance_low = {self.importance_low} must be below importance_high = {self.importance_high}"
            )
        return self


class CrossEntropy(Section):
    """Supervised training on completion tokens (SFT, specialists, warm-up)."""

    type: Literal["cross_entropy"] = "cross_entropy"
    domain_weights: dict[str, Weight] = {}
    minibatches: int = Field(default=1, gt=0)


class MtpBoosting(Section):
    """Eq. 4 of the Nemotron 3 Ultra report (section 3.4): the frozen backbone teaches the shared MTP block."""

    type: Literal["mtp_boosting"] = "mtp_boosting"
    depths: int = Field(default=7, ge=1)
    """N_mtp: how often the shared block is applied, whatever number of MTP segments the pattern names."""
    temperature: float = Field(default=2.0, gt=0)
    """T, of both distributions."""
    domain_weights: dict[str, Weight] = {}
    """Weight of a domain's terms; 1 for a domain not named."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer steps per rollout batch."""


Objective = Annotated[Mopd | CrossEntropy | MtpBoosting, Field(discriminator="type")]


class Mtp(Section):
    train: bool = True
    """Whether the MTP heads (where the pattern has any) are trained along, by cross-entropy on completion tokens;
    inputs, embedding and output weight are detached, so the trunk never sees it."""
    weight: float = Field(default=0.3, ge=0)
    """Scale of the MTP loss (0.3 in the released configuration). The heads' gradient has a norm of its own, clipped
    apart from the trunk's by optimizer.clip_grad."""
