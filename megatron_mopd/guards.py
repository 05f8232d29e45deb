"""Guards of each domain while it is trained: what is measured, when one fires, and what it does then.

Before the update: ``length`` (mean completion length over the domain's reference), ``repetition`` (share of repeated
tokens, see :mod:`megatron_mopd.guard_measures`), ``truncation`` (share of rollouts cut short) and ``silence`` (mean
|teacher - behaviour log-probability| over its reference, and 0 where the teacher says nothing of rollouts that are
there: no token of them was scored, one log-probability for all tokens, or the student's own). After it: ``entropy``
(the student's, over its reference: exact where the objective measures it, else the mean -log p of the sampled tokens,
which is what ``drop`` always goes by since it acts before the update) and ``masked`` (share of tokens with m_t = 0).

All values are over all data-parallel ranks, so every rank decides alike. A reference is the mean of the first
``reference_steps`` steps that measured the domain. A domain that a step did not measure, because no rollout of it was
drawn, keeps its count of steps: such a step says nothing of the student there, and nothing of the teacher.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd import checkpoint_directory, guard_config, guard_measures
from megatron_mopd.guard_measures import Measured
from megatron_mopd.records import Rollout, ScoredRollout

log = logging.getLogger(__name__)

Item = ScoredRollout | Rollout
BELOW = ("entropy", "silence")
"""Guards that fire when their value is below the threshold."""
RELATIVE = ("length", "entropy", "silence")
"""Guards whose value is relative to a reference."""
DRAWN = ("length", "repetition", "truncation", "entropy")
"""Guards whose fault lies in the weights that drew the rollouts, and not in what scored or updated them."""
NAMES = tuple(guard_config.GuardSet.model_fields)
_SAYS: Mapping[str, tuple[str, str]] = {
    "length": ("completions are {value:.3g} times as long as at the reference", "an end token that is never drawn"),
    "repetition": ("{value:.1%} of the completions' tokens lie in repeated n-grams", "completions that loop"),
    "truncation": ("{value:.1%} of the rollouts were cut short", "rollout.max_new_tokens that is too small"),
    "entropy": ("the student's entropy is {value:.3g} of the reference", "optimizer.lr that is too high"),
    "masked": ("{value:.1%} of the tokens are masked", "rollouts that are too old, or engines that disagree"),
    "silence": (
        "the teacher's log-probabilities are {value:.3g} as far from the student's as at the reference",
        "a wrong checkpoint under teachers",
    ),
}


class GuardError(RuntimeError):
    """A guard ended the run; raised on all ranks alike, and before a checkpoint or a row of metrics has anything of the
    step. Its rollouts are kept where ``rollout.shards`` keeps any, for inspection; a resumed run replaces them."""


def dropped(item: Item) -> str | None:
    """The guard that keeps a rollout out of its update; None where it counts."""
    return (item.rollout if isinstance(item, ScoredRollout) else item).dropped


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """What a guard remembers of a domain; JSON in a checkpoint."""

    total: float = 0.0  # of what the reference is the mean of
    steps: int = 0  # that the reference is the mean of
    beyond: int = 0  # measured steps in a row beyond the threshold
    since: int = 0  # the first of them

    def reference(self, given: float | None, wanted: int) -> float | None:
        """Given or measured; None until enough steps are."""
        return given if given is not None else self.total / self.steps if self.steps >= wanted else None


class Guards:
    """The guards of one stage; every rank holds one and calls it alike, once before and once after each update.

    ``domains`` are those of the training data that are drawn at all; none for a stage that takes no rollouts, where
    nothing is measured. ``scored``: whether teachers score; ``lag``: age in steps, at most, of the weights that draw
    the rollouts of an update (rollout.lag); ``checkpoints``: where the run's lie; ``speaks``: whether this rank says
    warnings.
    """

    def __init__(
        self,
        settings: guard_config.Guards,
        domains: Sequence[str],
        *,
        scored: bool,
        lag: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        checkpoints: Path,
        speaks: bool = True,
    ) -> None:
        self.settings, self.domains, self.scored = settings, tuple(domains), scored
        self.lag, self.checkpoints = lag, checkpoints
        self.group, self.device, self.speaks = group, device, speaks
        self.of = {domain: settings.of(domain) for domain in self.domains}
        self.tracks = {(name, domain): Track() for name in NAMES for domain in self.domains}
        self._step = 0
        self._measured: dict[str, Measured] = {}
        self._row: dict[str, float] = {}

    def admit(self, rollouts: Sequence[Item], step: int) -> list[Item]:
        """The rollouts of the update that makes ``step``, in place; those that it must not see are marked ``dropped``.

        A collective. Raises :class:`GuardError` when a guard stops the run, or when nothing is left to learn from.
        """
        self._step, self._row = step, {}
        if not self.domains:
            return list(rollouts)
        self._measured = guard_measures.measure(rollouts, self.domains, self._ngram, self._reduce)
        stops: list[str | None] = []
        for domain, found in self._measured.items():
            for name in ("length", "repetition", "truncation"):
                stops.append(self._observe(name, domain, getattr(found, name) if found.rollouts else None))
            if self.scored:
                stops.append(self._observe("silence", domain, found.gap, mute=found.mute))
            if self.of[domain].entropy.action == "drop":
                stops.append(self._observe("entropy", domain, found.entropy))
        self._stop(stops)
        return self._drop(rollouts)

    def review(self, row: Mapping[str, float]) -> dict[str, float]:
        """``guard/NAME/DOMAIN`` of the step, from its metrics ``row``; and ``guard/dropped/DOMAIN``, a number of
        rollouts, where a guard may drop any. Raises :class:`GuardError` when a guard stops the run."""
        stops: list[str | None] = []
        exact = any(name.startswith("entropy/") for name in row)
        for domain, found in self._measured.items():
            if self.of[domain].entropy.action != "drop":
                entropy = row.get(f"entropy/{domain}") if exact else found.entropy
                stops.append(self._observe("entropy", domain, entropy))
            if not self._sits_out(domain):
                stops.append(self._observe("masked", domain, row.get(f"importance/masked_frac/{domain}")))
            else:  # the next update is to show whether it is still so
                self.tracks["masked", domain] = Track()
        self._stop(stops)
        return dict(self._row)

    def state_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """What a resumed run goes on with, ``{guard: {domain: ...}}``, as JSON."""
        return {name: {d: asdict(self.tracks[name, d]) for d in self.domains} for name in NAMES}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Domains that the state does not know start afresh."""
        for name, domain in self.tracks:
            if domain in state.get(name, {}):
                self.tracks[name, domain] = Track(**state[name][domain])

    # ------------------------------------------------------------------ one value

    def _guard(self, name: str, domain: str) -> Any:
        return getattr(self.of[domain], name)

    def _fires(self, name: str, domain: str) -> bool:
        return self.tracks[name, domain].beyond >= self._guard(name, domain).patience

    def _sits_out(self, domain: str) -> bool:
        return self.of[domain].masked.action == "drop" and self._fires("masked", domain)

    def _reference(self, name: str, domain: str) -> float | None:
        given = self._guard(name, domain).reference if name in RELATIVE else None
        return self.tracks[name, domain].reference(given, self.settings.reference_steps)

    def _observe(self, name: str, domain: str, measured: float | None, mute: bool = False) -> str | None:
        """Take in one measurement; the reason to stop, where there is one."""
        guard, track = self._guard(name, domain), self.tracks[name, domain]
        if guard.action == "off":
            return None
        value = 0.0 if mute else self._value(name, domain, measured)
        if value is None:
            return None
        self._row[f"guard/{name}/{domain}"] = value
        # NaN is beyond any threshold: it compares false to all.
        within = value >= guard.threshold if name in BELOW else value <= guard.threshold
        if within:
            self.tracks[name, domain] = dataclasses.replace(track, beyond=0, since=0)
            return None
        since = track.since if track.beyond else self._step
        self.tracks[name, domain] = dataclasses.replace(track, beyond=track.beyond + 1, since=since)
        if track.beyond + 1 < guard.patience:
            return None
        if guard.action == "stop":
            return self._said(name, domain, value)
        if track.beyond + 1 == guard.patience and self.speaks:
            then = "; until then its rollouts at fault leave the update" if guard.action == "drop" else ""
            log.warning("%s. Said again once it has been within in between%s", self._said(name, domain, value), then)
        return None

    def _value(self, name: str, domain: str, measured: float | None) -> float | None:
        """What is held against the threshold; None where nothing was measured or the reference is still being taken."""
        if measured is None or name not in RELATIVE:
            return measured
        reference = self._reference(name, domain)
        if reference is not None:
            return measured / max(reference, guard_measures.SAME)
        if math.isfinite(measured):
            track = self.tracks[name, domain]
            total, steps = track.total + measured, track.steps + 1
            self.tracks[name, domain] = dataclasses.replace(track, total=total, steps=steps)
        return None

    def _said(self, name: str, domain: str, value: float) -> str:
        guard, track, (what, cause) = self._guard(name, domain), self.tracks[name, domain], _SAYS[name]
        found = self._measured[domain]
        text = what.format(value=value)
        if name == "silence" and found.mute:
            text = "its teacher says nothing: " + (
                f"no token of its rollouts ({found.rollouts}) was scored"
                if found.gap is None
                else "its log-probabilities are the student's own"
                if found.gap <= guard_measures.SAME
                else "it gives the same log-probability to every token"
            )
        where = f"guards.domains.{domain}" if domain in self.settings.domains else "guards"
        return (
            f"guard {name} of domain {domain!r}: {text} at step {self._step}; {where}.{name}.threshold ="
            f" {guard.threshold:g} is crossed since step {track.since} (patience {guard.patience}). A usual cause is"
            f" {cause}"
        )

    # ------------------------------------------------------------------ what follows

    def _stop(self, stops: Sequence[str | None]) -> None:
        if reasons := [reason for reason in stops if reason is not None]:
            stopped = [pair for pair in self.tracks if self._acts(*pair, "stop")]
            raise GuardError(f"{'; '.join(reasons)}. {self._way_out(stopped)}")

    def _acts(self, name: str, domain: str, action: str) -> bool:
        return self._guard(name, domain).action == action and self._fires(name, domain)

    def _suspect(self, name: str, domain: str) -> int:
        """The first step whose weights are not to be trusted, the lowest it can be."""
        since = self.tracks[name, domain].since
        # The update that makes step s learns from what the weights of step s - 1 - lag drew (the first weights of the
        # run while there are no older ones); where they drew badly it is they that went wrong.
        return max(0, since - 1 - self.lag) if name in DRAWN else since

    def _way_out(self, faults: Sequence[tuple[str, str]]) -> str:
        """Which checkpoint is good after ``faults``, pairs of guard and domain, and what to change."""
        bad = min(self._suspect(*fault) for fault in faults)
        good = checkpoint_directory.before(self.checkpoints, bad)
        newer = [step for step in checkpoint_directory.steps(self.checkpoints) if step >= bad]
        away = ", ".join(checkpoint_directory.place(self.checkpoints, step).name for step in newer)
        why = (
            f"the weights of step {bad} and later ones may be at fault" if bad else "the first weights may be at fault"
        )
        if good is None and not newer:
            left = f"No checkpoint of this run was written yet in {self.checkpoints}"
        elif good is None:
            left = (
                f"{self.checkpoints} holds no good checkpoint of this run, for {why}: take {away} away and the same"
                " command starts from its beginning (checkpoint.every and checkpoint.keep decide on how many there are)"
            )
        elif not newer:
            left = f"The last good checkpoint is {good}, from which the same command goes on"
        else:
            left = (
                f"The last good checkpoint is {good}, for {why}: take {away} away and the same command goes on from it"
            )
        return (
            f"No checkpoint of this step is written. {left}. Remove the cause, or give the guard another threshold or"
            " patience, or the action drop or warn"
        )

    def _drop(self, rollouts: Sequence[Item]) -> list[Item]:
        if not self.settings.drops:
            return list(rollouts)
        marked = [self._marked(item) for item in rollouts]
        counts = torch.zeros(len(self.domains) + 1, dtype=torch.float64)
        for item in marked:
            rollout = item.rollout if isinstance(item, ScoredRollout) else item
            counts[-1 if dropped(item) is None else self.domains.index(rollout.prompt.domain)] += 1
        self._add(counts)
        *gone, kept = counts.tolist()
        self._row |= {f"guard/dropped/{domain}": n for domain, n in zip(self.domains, gone, strict=True)}
        if not kept and any(gone):
            firing = [pair for pair in self.tracks if self._acts(*pair, "drop")]
            named = ", ".join(f"{name} of {domain}" for name, domain in sorted(firing))
            raise GuardError(
                f"guards left none of the {sum(gone):.0f} rollouts of step {self._step} to learn from ({named})."
                f" {self._way_out(firing)}"
            )
        return marked

    def _marked(self, item: Item) -> Item:
        rollout = item.rollout if isinstance(item, ScoredRollout) else item
        domain = rollout.prompt.domain
        for name in NAMES:
            guard = self._guard(name, domain)
            if guard.action == "drop" and self._fires(name, domain) and self._at_fault(name, rollout, guard):
                found = dataclasses.replace(rollout, dropped=name)
                return dataclasses.replace(item, rollout=found) if isinstance(item, ScoredRollout) else found
        return item

    def _at_fault(self, name: str, rollout: Rollout, guard: Any) -> bool:
        length, reference = len(rollout.completion), self._reference(name, rollout.prompt.domain) or 0.0
        if name == "length":
            return length > guard.threshold * reference
        if name == "repetition":
            return int(guard_measures.repeated_tokens([rollout.completion], guard.ngram)) > guard.threshold * length
        if name == "truncation":
            return rollout.finish == "length"
        if name == "entropy":
            behaviour = rollout.behav_logprobs
            return behaviour is not None and -float(behaviour.double().mean()) < guard.threshold * reference
        return True  # the whole domain: its teacher is at fault, or how old its rollouts are

    # ------------------------------------------------------------------ over all ranks

    def _ngram(self, domain: str) -> int | None:
        guard = self.of[domain].repetition
        return None if guard.action == "off" else guard.ngram

    def _reduce(self, sums: Tensor, extremes: Tensor) -> None:
        self._add(sums)
        self._add(extremes, dist.ReduceOp.MAX)

    def _add(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        if self.group is not None:
            there = values.to(self.device)
            dist.all_reduce(there, op=operation, group=self.group)
            values.copy_(there)
