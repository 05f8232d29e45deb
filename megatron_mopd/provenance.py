"""Who sampled and who scored what, and the checks that no rollout meets the wrong teacher, tokenizer or policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from megatron_mopd.records import Policy, Provenance, Rollout, Sampling, ScoredRollout


class ProvenanceError(ValueError):
    """A rollout or a checkpoint whose record contradicts this run; names both sides."""


class TextFormat(Protocol):
    """The part of a tokenizer that provenance records."""

    @property
    def tokenizer_sha(self) -> str: ...

    @property
    def template_sha(self) -> str: ...


class Scorers(Protocol):
    """The part of :class:`megatron_mopd.teachers.TeacherPool` that provenance checks against."""

    @property
    def ids(self) -> Mapping[str, str]: ...  # teacher name -> checkpoint_id

    @property
    def nvfp4(self) -> Mapping[str, tuple[str, ...]]: ...  # teacher name -> what it keeps in NVFP4, sorted

    @property
    def temperature(self) -> float: ...

    def route(self, domain: str) -> str: ...


def sign(
    rollout: Rollout,
    policy: Policy,
    tokenizer: TextFormat,
    sampling: Sampling,
    seed: int,
    draw: int,
    reward: float | None = None,
) -> Rollout:
    """The sampled rollout with the record of how it came about (and its reward); no teacher yet."""
    record = Provenance(
        policy=policy,
        teacher_id=None,
        tokenizer_sha=tokenizer.tokenizer_sha,
        template_sha=tokenizer.template_sha,
        sampling=sampling,
        domain=rollout.prompt.domain,
        seed=seed,
        draw=draw,
    )
    return dataclasses.replace(rollout, provenance=record, reward=reward)


def scored_by(rollout: Rollout, teacher_id: str, nvfp4: tuple[str, ...] = ()) -> Rollout:
    """The rollout with its scorer's checkpoint_id and what of it is in NVFP4; raises :class:`ProvenanceError` when
    nobody signed the rollout."""
    if rollout.provenance is None:
        raise ProvenanceError(
            f"{_name(rollout)}: carries no record of who sampled it, so nothing says what its scores would mean"
        )
    record = dataclasses.replace(rollout.provenance, teacher_id=teacher_id, teacher_nvfp4=nvfp4)
    return dataclasses.replace(rollout, provenance=record)


def check(
    rollouts: Sequence[Rollout | ScoredRollout],
    policy: Policy,
    lag: int,
    tokenizer: TextFormat,
    scorers: Scorers | None,
) -> None:
    """Refuse a batch before its update; dataset rows, which nobody sampled or scored, pass.

    A scored rollout must come from this run at most ``lag`` steps ago, be rendered with this tokenizer and template,
    and be scored by the teacher its domain is routed to, from the checkpoint that is loaded, at the temperature it
    was sampled at. Raises :class:`ProvenanceError` naming the rollout, the record and what was expected.
    """
    for item in rollouts:
        scorer = item.teacher if isinstance(item, ScoredRollout) else None
        rollout = item.rollout if isinstance(item, ScoredRollout) else item
        record = rollout.provenance
        if record is None:
            if scorer is None:
                continue
            raise ProvenanceError(f"{_name(rollout)}: scored by {scorer!r} but carries no record of who sampled it")
        for what, found, expected in _facts(item, rollout, record, policy, tokenizer, scorers):
            if found != expected:
                raise ProvenanceError(f"{_name(rollout)}: {what} is {found!r}, this run expects {expected!r}")
        age = policy.step - record.policy.step
        if not 0 <= age <= lag:
            raise ProvenanceError(
                f"{_name(rollout)}: sampled by the policy of step {record.policy.step}, updated at step {policy.step};"
                f" rollout.lag = {lag} allows ages 0 to {lag}"
            )


def _facts(
    item: Rollout | ScoredRollout,
    rollout: Rollout,
    record: Provenance,
    policy: Policy,
    tokenizer: TextFormat,
    scorers: Scorers | None,
) -> Iterable[tuple[str, Any, Any]]:
    yield "the sampling run", record.policy.run_id, policy.run_id
    yield "the tokenizer", record.tokenizer_sha, tokenizer.tokenizer_sha
    yield "the chat template", record.template_sha, tokenizer.template_sha
    yield "the recorded domain", record.domain, rollout.prompt.domain
    if isinstance(item, ScoredRollout):
        if scorers is None:
            raise ProvenanceError(f"{_name(rollout)}: scored by {item.teacher!r}, but this run has no teachers")
        teacher = scorers.route(rollout.prompt.domain)
        yield "the scoring teacher", item.teacher, teacher
        yield f"the checkpoint of teacher {teacher!r}", record.teacher_id, scorers.ids[teacher]
        yield f"what teacher {teacher!r} keeps in NVFP4", record.teacher_nvfp4, scorers.nvfp4[teacher]
        yield "the sampling temperature", record.sampling.temperature, scorers.temperature
        yield "the number of teacher log-probabilities", len(item.teacher_logprobs), len(rollout.completion)


def check_manifest(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Refuse to resume from a checkpoint of something else: every entry of ``expected`` must be in ``found`` unchanged.

    Raises :class:`ProvenanceError` naming the entry, both values and the way out.
    """
    for key, value in expected.items():
        if key not in found:
            raise ProvenanceError(f"{where}: its manifest says nothing of {key}; it was not written by this program")
        if found[key] != value:
            raise ProvenanceError(
                f"{where}: was written with {key} = {found[key]!r}, this configuration has {value!r};"
                " put the setting back, or choose another run.dir for a new run"
            )


def _name(rollout: Rollout) -> str:
    return f"rollout {rollout.sample} of prompt {rollout.prompt.id} ({rollout.prompt.domain})"
