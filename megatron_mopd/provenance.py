"""Who sampled and who scored what, and the checks that no rollout meets the wrong teacher, tokenizer or policy."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_mopd.records import Policy, Provenance, Rollout, Sampling, ScoredRollout

_AGAIN = "start the same command again: the run goes on from its last checkpoint and collects the batch anew"
_SIGN = "a sampler of one's own must pass what it draws through provenance.sign before it is scored"
_NO_TEACHERS = "put back those that it began with under teachers, or choose another run.dir for a new run"


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

    @property
    def routing(self) -> Mapping[str, str]: ...  # domain -> teacher name

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


def written_by(
    rollout: Rollout, teacher: str, teacher_id: str, tokenizer: TextFormat, sampling: Sampling, seed: int, draw: int
) -> Rollout:
    """A completion that a teacher wrote itself (megatron_mopd.traces), with the record of it: the policy that sampled
    it is the teacher's checkpoint as it is."""
    signed = sign(rollout, Policy(run_id=teacher, step=0, initial_id=teacher_id), tokenizer, sampling, seed, draw)
    assert signed.provenance is not None
    return dataclasses.replace(signed, provenance=dataclasses.replace(signed.provenance, teacher_id=teacher_id))


def routing_sha(routing: Mapping[str, str]) -> str:
    """sha256 hex of a routing table, ``{domain: teacher}``."""
    return hashlib.sha256(json.dumps(dict(routing), sort_keys=True).encode()).hexdigest()


def tokens_sha(tokens: Tensor, completion: int) -> str:
    """sha256 hex of a sequence, int64 ``[length]``, and of how many tokens at its end are the completion."""
    content = tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(completion.to_bytes(8, "little") + content).hexdigest()


def scored_by(
    rollout: Rollout,
    teacher_id: str,
    nvfp4: tuple[str, ...] = (),
    routing: Mapping[str, str] | None = None,
    scored_sha: str | None = None,
) -> Rollout:
    """The rollout with its scorer's checkpoint_id, what of it is in NVFP4, the hash of the table that sent it there and
    the :func:`tokens_sha` of the sequence that the scorer read (the rollout's own when left out).

    Raises :class:`ProvenanceError` when nobody signed the rollout.
    """
    if rollout.provenance is None:
        raise ProvenanceError(
            f"{_name(rollout)}: carries no record of who sampled it, so nothing says what its scores would mean;"
            f" {_SIGN}"
        )
    record = dataclasses.replace(
        rollout.provenance,
        teacher_id=teacher_id,
        teacher_nvfp4=nvfp4,
        routing_sha=None if routing is None else routing_sha(routing),
        scored_sha=scored_sha or tokens_sha(rollout.tokens, len(rollout.completion)),
    )
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
    was sampled at. A rollout that nobody scored and that names a teacher is a trace: that teacher's checkpoint must be
    the one its domain is routed to. Raises :class:`ProvenanceError` naming the rollout, the record and what was
    expected.
    """
    for item in rollouts:
        scorer = item.teacher if isinstance(item, ScoredRollout) else None
        rollout = item.rollout if isinstance(item, ScoredRollout) else item
        record = rollout.provenance
        if record is None:
            if scorer is None:
                continue
            raise ProvenanceError(
                f"{_name(rollout)}: scored by {scorer!r} but carries no record of who sampled it; {_SIGN}"
            )
        author = policy if scorer is not None or record.teacher_id is None else _writer(rollout, scorers)
        for what, found, expected in _facts(item, rollout, record, author, tokenizer, scorers):
            if found != expected:
                raise ProvenanceError(
                    f"{_name(rollout)}: {what} is {found!r}, this run expects {expected!r}"
                    f"{_explained(found, scorers)}; put back what was changed since the rollout was collected, or"
                    " choose another run.dir for a new run"
                )
        age = author.step - record.policy.step
        if not 0 <= age <= lag:
            raise ProvenanceError(
                f"{_name(rollout)}: sampled by the policy of step {record.policy.step}, updated at step {author.step};"
                f" rollout.lag = {lag} allows ages 0 to {lag}; put rollout.lag back if it was lowered since the run"
                f" began, else {_AGAIN}"
            )
        _check_steps(rollout, record.policy.step, policy.step)


def _check_steps(rollout: Rollout, first: int, now: int) -> None:
    """Refuse steps per token that a sampler which takes over newer weights on its way cannot have written."""
    if rollout.policy_steps is None:
        return
    steps = rollout.policy_steps.tolist()
    in_order = all(a <= b for a, b in itertools.pairwise(steps))
    if len(steps) != len(rollout.completion) or not in_order or steps[:1] != [first] or steps[-1] > now:
        raise ProvenanceError(
            f"{_name(rollout)}: {len(rollout.completion)} tokens were drawn by the policies of steps {steps}; there"
            f" must be one for each token, the first that of the record ({first}), none below the one before and none"
            f" above the current step {now}; {_AGAIN}; if it comes back, what samples counts its weights wrong"
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
    yield "the checkpoint the sampling run started from", record.policy.initial_id, policy.initial_id
    yield "the tokenizer", record.tokenizer_sha, tokenizer.tokenizer_sha
    yield "the chat template", record.template_sha, tokenizer.template_sha
    yield "the recorded domain", record.domain, rollout.prompt.domain
    if isinstance(item, ScoredRollout):
        if scorers is None:
            raise ProvenanceError(
                f"{_name(rollout)}: scored by {item.teacher!r}, but this run has no teachers; {_NO_TEACHERS}"
            )
        teacher = scorers.route(rollout.prompt.domain)
        yield "the scoring teacher", item.teacher, teacher
        yield f"the checkpoint of teacher {teacher!r}", record.teacher_id, scorers.ids[teacher]
        yield f"what teacher {teacher!r} keeps in NVFP4", record.teacher_nvfp4, scorers.nvfp4[teacher]
        yield "the sha256 of the routing table", record.routing_sha, routing_sha(scorers.routing)
        yield "the sampling temperature", record.sampling.temperature, scorers.temperature
        yield "the sha256 of the scored tokens", record.scored_sha, tokens_sha(rollout.tokens, len(rollout.completion))
        yield "the number of teacher log-probabilities", len(item.teacher_logprobs), len(rollout.completion)


def _writer(rollout: Rollout, scorers: Scorers | None) -> Policy:
    """The policy that a trace must come from."""
    if scorers is None:
        raise ProvenanceError(
            f"{_name(rollout)}: was written by a teacher, but this run has no teachers; {_NO_TEACHERS}"
        )
    teacher = scorers.route(rollout.prompt.domain)
    return Policy(run_id=teacher, step=0, initial_id=scorers.ids[teacher])


def check_manifest(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Refuse to go on from a checkpoint of something else: every entry of ``expected`` must be in ``found`` unchanged.

    Raises :class:`ProvenanceError` naming what differs on both sides, teachers by name and checkpoint_id, and the way
    out.
    """
    for key, value in expected.items():
        if key not in found:
            raise ProvenanceError(
                f"{where}: its manifest says nothing of {key}; it was not written by this program, or by an older one."
                " Choose another run.dir for a new run; to start from these weights, name the checkpoint as"
                " model.initial"
            )
        if found[key] == value:
            continue
        if key == "teachers":
            raise ProvenanceError(
                f"{where}: {'; '.join(teacher_differences(found[key] or {}, value or {}))}. Put the teachers back as"
                " they were, or choose another run.dir for a new run"
            )
        if key in _TEXT:
            raise ProvenanceError(
                f"{where}: was written with {_TEXT[key]} {_short(found[key])} ({key}), this configuration has"
                f" {_short(value)}, under which its weights would read other text; name the tokenizer it was written"
                " with under tokenizer, or another checkpoint or run.dir"
            )
        raise ProvenanceError(
            f"{where}: was written with {key} = {found[key]!r}, this configuration has {value!r};"
            " put the setting back, or choose another run.dir for a new run"
        )


_TEXT = {"tokenizer_sha": "the tokenizer", "template_sha": "the chat template"}


def teacher_differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """How the teachers of a run, ``{name: {"checkpoint_id", "domains", "nvfp4"}}``, differ from those that it recorded:
    one sentence each, naming both sides."""
    before = {name: teacher["checkpoint_id"] for name, teacher in recorded.items()}
    now = {name: teacher["checkpoint_id"] for name, teacher in found.items()}
    sentences: list[str] = []
    explained: set[str] = set()
    for name in (name for name in before if name not in now):
        renamed = [other for other in now if other not in before and now[other] == before[name]]
        what = f"teacher {name!r} (checkpoint {_short(before[name])})"
        sentences.append(
            f"{what} is called {renamed[0]!r} now, with the same checkpoint" if renamed else f"{what} is there no more"
        )
        explained |= {name, *renamed}
    for name in (name for name in now if name not in before and name not in explained):
        sentences.append(f"teacher {name!r} (checkpoint {_short(now[name])}) is new")
    for name in before:
        if name not in now or before[name] == now[name] or name in explained:
            continue
        text = f"teacher {name!r} was checkpoint {_short(before[name])} and is {_short(now[name])} now"
        swapped = [n for n in before if n in now and now[n] == before[name] and before[n] == now[name] != now[n]]
        if swapped:
            other = swapped[0]
            text += f", teacher {other!r} was {_short(before[other])} and is {_short(now[other])}: it looks as if the"
            text += f" directories of {name!r} and {other!r} (teachers.{name}.checkpoint, teachers.{other}.checkpoint)"
            text += " were swapped"
            explained.add(other)
        else:
            text += f": teachers.{name}.checkpoint was replaced by another checkpoint of that name"
        sentences.append(text)
    for name in (name for name in before if name in now):
        for key in ("domains", "nvfp4"):
            if recorded[name].get(key) != found[name].get(key):
                sentences.append(
                    f"teacher {name!r} ({_short(now[name])}) was recorded with {key} = {recorded[name].get(key)}, this"
                    f" configuration has {found[name].get(key)}"
                )
    return sentences


def _explained(found: Any, scorers: Scorers | None) -> str:
    """Whose a checkpoint_id is, where it is a loaded teacher's."""
    owners = [name for name, known in scorers.ids.items() if known == found] if scorers is not None else []
    return f" ({_short(found)} is what teacher {owners[0]!r} has now)" if owners and isinstance(found, str) else ""


def _short(identity: Any) -> str:
    return identity[:12] if isinstance(identity, str) else repr(identity)


def _name(rollout: Rollout) -> str:
    return f"rollout {rollout.sample} of prompt {rollout.prompt.id} ({rollout.prompt.domain})"
