"""The settings of where a stage's trajectories come from. Imports neither torch nor megatron.core."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_mopd.settings import Section


class Rollouts(Section):
    """The student's own samples of the training prompts."""

    type: Literal["rollout"] = "rollout"


class Dataset(Section):
    """The completions of the training data."""

    type: Literal["dataset"] = "dataset"


class Traces(Section):
    """Each teacher's own completions of the training prompts of its domains, of which right ones are kept: what a
    student is warmed up on whose support is far from a teacher's (report section 3.3.3: "very light SFT"). They are
    generated once, before the first step, by megatron_mopd.traces."""

    type: Literal["traces"] = "traces"
    per_domain: int = Field(default=256, gt=0)
    """Right traces of each domain, one a prompt; the report gives no number."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the teachers' sampling; 0 is greedy."""
    attempts: int = Field(default=4, gt=0)
    """Prompts tried for each trace wanted, at most; a teacher that is right less often than that is an error."""
    unverified: Literal["refuse", "keep"] = "refuse"
    """What becomes of prompts without a verifier: an error, or traces that count as right when they end by
    themselves."""
    others: Literal["leave_out", "replay"] = "leave_out"
    """What becomes of domains of data.train that no teacher of the stage serves. replay: the data's own completions are
    learned beside the traces, by data.weights, so that a student is not warmed up at the price of what it could do;
    rows of data.train then need completions."""


Source = Annotated[Rollouts | Dataset | Traces, Field(discriminator="type")]
