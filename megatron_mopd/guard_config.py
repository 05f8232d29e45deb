"""The settings of the guards: what is watched of a domain in training. Imports neither torch nor megatron.core."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_mopd.settings import Section, overlay

Action = Literal["off", "warn", "drop", "stop"]


class Guard(Section):
    """One measured value against a threshold; it fires once the value has been beyond it for ``patience`` steps."""

    action: Action = "warn"
    """off: not measured; warn: said once a crossing; drop: the rollouts at fault leave the update for as long as it
    fires; stop: the run ends before anything more is saved."""
    threshold: float = Field(ge=0)
    patience: int = Field(default=3, ge=1)
    """Measured steps in a row beyond the threshold before the action."""


class LengthGuard(Guard):
    """Mean completion length over the domain's reference; fires above. drop: rollouts longer than threshold x
    reference."""

    threshold: float = Field(default=2.0, gt=0)
    reference: float | None = Field(default=None, gt=0)
    """Tokens; the mean of the domain's first guards.reference_steps steps when left out."""


class RepetitionGuard(Guard):
    """Share of completion tokens inside n-grams that their completion has more than once; fires above. drop: rollouts
    whose own share is above."""

    threshold: float = Field(default=0.3, ge=0, le=1)
    ngram: int = Field(default=8, ge=1)
    """Tokens of an n-gram."""


class TruncationGuard(Guard):
    """Share of rollouts that met rollout.max_new_tokens or the context; fires above. drop: those rollouts."""

    threshold: float = Field(default=0.5, ge=0, le=1)


class EntropyGuard(Guard):
    """The student's entropy per token over the domain's reference; fires below. drop: rollouts whose mean -log p is
    below threshold x reference."""

    threshold: float = Field(default=0.01, ge=0)
    patience: int = Field(default=10, ge=1)
    reference: float | None = Field(default=None, gt=0)
    """Nats; the mean of the domain's first guards.reference_steps steps when left out."""


class MaskedGuard(Guard):
    """Share of completion tokens that the objective masks (m_t = 0); fires above. It is known after the update, so
    drop leaves the domain out of the next one, and the patience starts anew."""

    threshold: float = Field(default=0.5, ge=0, le=1)


class SilenceGuard(Guard):
    """Mean |teacher - student log-probability| over the domain's reference, and 0 where the teacher says nothing at all
    of the domain's rollouts (see megatron_mopd.guards); fires below. drop: the domain's rollouts."""

    threshold: float = Field(default=0.001, gt=0)
    patience: int = Field(default=10, ge=1)
    reference: float | None = Field(default=None, gt=0)
    """Nats; the mean of the domain's first guards.reference_steps steps when left out."""


class GuardSet(Section):
    length: LengthGuard = LengthGuard()
    repetition: RepetitionGuard = RepetitionGuard()
    truncation: TruncationGuard = TruncationGuard()
    entropy: EntropyGuard = EntropyGuard()
    masked: MaskedGuard = MaskedGuard()
    silence: SilenceGuard = SilenceGuard()


class Guards(GuardSet):
    """Guards of stages whose trajectories are the student's own rollouts, for every domain by itself."""

    reference_steps: int = Field(default=5, ge=1)
    """Steps of this run, from its first, whose mean is a domain's reference; a guard that needs one waits for it."""
    domains: dict[str, GuardSet] = {}
    """Domain -> settings that differ there from those above."""
    teacher_timeout: float = Field(default=1500.0, gt=0)
    """Seconds that a teacher may take for a rank's share of a batch; then the run ends, naming the teacher. Less than
    the 30 minutes after which collectives give up."""

    def of(self, domain: str) -> GuardSet:
        """The settings of one domain: its own over the common ones."""
        if domain not in self.domains:
            return self
        common = self.model_dump(include=set(GuardSet.model_fields))
        return GuardSet.model_validate(overlay(common, self.domains[domain].model_dump(exclude_unset=True)))

    @property
    def drops(self) -> bool:
        """Whether a guard may keep rollouts out of an update, which changes a run's result."""
        sets = [self, *map(self.of, self.domains)]
        return any(getattr(guards, name).action == "drop" for guards in sets for name in GuardSet.model_fields)
