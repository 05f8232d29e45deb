"""The settings of rollout and scoring that run beside the update. Imports neither torch nor megatron.core."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_mopd.settings import Section


class Asynchrony(Section):
    """Where rollouts are drawn and scored, and under which policy. ``rollout.lag`` bounds their age everywhere."""

    mode: Literal["inline", "worlds"] = "inline"
    """inline: before each update, one after the other; worlds: in programs of their own, beside the update and with
    layouts of their own (``python -m megatron_mopd.worlds``, which a recipe's section ``worlds`` has started), on other
    machines or on the same devices, joined to the training by a directory that all of them see. The training then reads
    teachers only to measure on ``data.held_out``. Threads of one process would be no third mode: Megatron-Core keeps
    its buffer for gathered activations and its random states once a process."""
    deterministic: bool = True
    """The rollouts of step n are drawn by the policy of step n - rollout.lag exactly, so that both modes give the same
    bits. A pipeline of three equal stages is full from rollout.lag = 2 on. false: by the newest policy there is when
    the drawing begins, at most rollout.lag steps old."""
    in_flight_updates: bool = False
    """Newer weights are taken over between two tokens, caches are kept, and every token records its policy's step
    (``in_flight_weight_updates`` of the released configuration, which does not recompute caches either)."""
    directory: Path | None = None
    """What worlds share: policies and rollouts on their way; ``exchange`` in run.dir when left out."""
    silence_s: float = Field(default=300.0, gt=0)
    """Seconds without a sign of life after which another world counts as dead."""
    standstill_s: float = Field(default=3600.0, gt=0)
    """Seconds at one and the same piece of work after which a world that lives counts as hanging."""

    @model_validator(mode="after")
    def _timing(self) -> Asynchrony:
        if not self.deterministic and self.mode != "worlds":
            raise ValueError(
                f"deterministic = false draws by whatever policy worlds of their own have seen; mode = {self.mode}"
                " has no such worlds: set mode to worlds, or deterministic to true"
            )
        if self.in_flight_updates and self.deterministic:
            raise ValueError(
                "in_flight_updates = true changes the policy whenever a newer one comes, which no second run repeats;"
                " set deterministic to false"
            )
        if self.standstill_s < self.silence_s:
            raise ValueError(f"standstill_s = {self.standstill_s} must not be below silence_s = {self.silence_s}")
        return self
