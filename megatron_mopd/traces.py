"""Traces: what teachers write themselves on the training prompts of their domains, kept where the verifier finds it
right. A light supervised stage on them brings a student's support near a teacher's before distillation (section 3.3.3
of the Nemotron 3 Ultra report, its "warm-up").

They are made once for a stage, before its first step, and kept in ``traces`` of its directory: ``traces.jsonl``, a row
a trace, which is also a dataset that ``source.type: dataset`` can read, and ``traces.json``, which says what they were
made from and is written last. The same settings, teachers and prompts give the same traces on any layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mopd import evaluation, provenance, together
from megatron_mopd.config import Config, ConfigurationError, Traces
from megatron_mopd.files import atomically
from megatron_mopd.in_flight import provenance_of
from megatron_mopd.parallel import Groups
from megatron_mopd.prompt_stream import PromptStream
from megatron_mopd.prompts import load_prompts
from megatron_mopd.records import Prompt, Rollout, Sampling
from megatron_mopd.rollout import Sampler
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)

FOLDER, ROWS, HEADER = "traces", "traces.jsonl", "traces.json"
DRAW = -3
"""Of the noise of traces, which no other sampling draws (see evaluation.sample, preflight.stage)."""


def of_stage(config: Config, groups: Groups, tokenizer: ChatTokenizer, teachers: TeacherPool) -> list[Rollout]:
    """The traces of a stage, from its directory where they are there, else from its teachers; equal on all ranks.

    Each carries a record of the teacher's checkpoint that wrote it. Domains that no teacher serves have none. Raises
    :class:`ConfigurationError` for a prompt without a verifier, a teacher that is right too seldom, and traces on disk
    that were made from something else or are damaged.
    """
    settings = config.source
    assert isinstance(settings, Traces)
    prompts = _prompts(config, tokenizer, teachers, settings)
    made_from = _made_from(config, tokenizer, teachers, settings, prompts)
    if (text := _read(config.run.dir / FOLDER, made_from, groups)) is None:
        counts: dict[str, Mapping[str, int]] = {}
        found = [
            trace
            for name in teachers.names
            for trace in _generate(config, groups, tokenizer, teachers, name, prompts, counts)
        ]
        text = "".join(json.dumps(_row(trace, tokenizer)) + "\n" for trace in found)
        _write(config.run.dir / FOLDER, text, {"made_from": made_from, "domains": counts}, groups)
    known = {prompt.id: prompt for chosen in prompts.values() for prompt in chosen}
    return [_rollout(json.loads(line), known) for line in text.splitlines()]


# ------------------------------------------------------------------ making them


def _prompts(
    config: Config, tokenizer: ChatTokenizer, teachers: TeacherPool, settings: Traces
) -> dict[str, list[Prompt]]:
    """The prompts that may be tried in each domain that a teacher serves, in their order."""
    found: dict[str, list[Prompt]] = {domain: [] for domain in teachers.routing}
    for prompt in load_prompts(config.data.train, tokenizer, config.model.max_sequence_length):
        if prompt.domain not in found:
            continue
        if not prompt.verifier and settings.unverified == "refuse":
            raise ConfigurationError(
                f"source.type traces: prompt {prompt.id[:12]} of domain {prompt.domain!r} has no verifier, so nothing"
                " says whether a teacher's answer is right; give the row one, or set source.unverified to keep"
            )
        found[prompt.domain].append(prompt)
    for domain, prompts in found.items():
        if not prompts:
            raise ConfigurationError(
                f"source.type traces: data.train has no prompt of domain {domain!r}, which teacher"
                f" {teachers.route(domain)!r} serves; add some, or take the domain from it"
            )
        stream = PromptStream(prompts, {}, config.data.shuffle_seed)
        found[domain] = stream.take(min(len(prompts), settings.attempts * settings.per_domain))
    return found


def _generate(
    config: Config,
    groups: Groups,
    tokenizer: ChatTokenizer,
    teachers: TeacherPool,
    name: str,
    prompts: Mapping[str, Sequence[Prompt]],
    counts: dict[str, Mapping[str, int]],
) -> list[Rollout]:
    """A teacher's right traces, domain by domain; ``counts`` is told how many it took."""
    settings = config.source
    assert isinstance(settings, Traces)
    domains = [domain for domain, teacher in teachers.routing.items() if teacher == name]
    sampling = _sampling(config, tokenizer, settings)
    right: dict[str, list[Rollout]] = {domain: [] for domain in domains}
    tried = dict.fromkeys(domains, 0)
    if not domains:
        return []
    with teachers.unquantized(name) as model:
        sampler = Sampler(
            model, groups, config.model.max_sequence_length, teachers.vocab_size, config.rollout.prefill_tokens
        )
        while batch := _next(prompts, right, tried, settings.per_domain):
            own = sampler.generate(
                [(prompt, 0) for prompt in batch[groups.dp_rank :: groups.dp_size]],
                sampling,
                config.run.seed,
                DRAW,
                config.rollout.batch_size,
            )
            for trace in _of_all_ranks(own, batch, groups):
                if _is_right(trace, tokenizer):
                    right[trace.prompt.domain].append(trace)
    for domain in domains:
        if len(right[domain]) < settings.per_domain:
            raise ConfigurationError(
                f"source.type traces: teacher {name!r} is right on {len(right[domain])} of {tried[domain]} prompts of"
                f" domain {domain!r}, {settings.per_domain} right traces are wanted; lower source.per_domain, raise"
                f" source.attempts = {settings.attempts}, add prompts to data.train, or name a better teacher"
            )
        kept = right[domain] = right[domain][: settings.per_domain]
        counts[domain] = {"traces": len(kept), "tried": tried[domain]}
        logger.info("traces: %d of teacher %s in domain %s, from %d prompts", len(kept), name, domain, tried[domain])
    return [
        provenance.written_by(trace, name, teachers.ids[name], tokenizer, sampling, config.run.seed, DRAW)
        for domain in domains
        for trace in right[domain]
    ]


def _next(
    prompts: Mapping[str, Sequence[Prompt]], right: Mapping[str, Sequence[Rollout]], tried: dict[str, int], wanted: int
) -> list[Prompt]:
    """The prompts to try next, as many in each unfinished domain as traces are wanted; counts them as tried."""
    batch: list[Prompt] = []
    for domain, found in right.items():
        if len(found) < wanted:
            part = prompts[domain][tried[domain] : tried[domain] + wanted]
            tried[domain] += len(part)
            batch += part
    return batch


def _of_all_ranks(own: Sequence[Rollout], batch: Sequence[Prompt], groups: Groups) -> list[Rollout]:
    """The completions of ``batch`` in its order, from each data-parallel rank's share."""
    shares: list[Any] = [None] * groups.dp_size
    dist.all_gather_object(shares, [(r.completion.tolist(), r.finish) for r in own], group=groups.dp)
    written = [shares[i % groups.dp_size][i // groups.dp_size] for i in range(len(batch))]
    return [
        Rollout(prompt=prompt, sample=0, completion=torch.tensor(tokens, dtype=torch.int64), finish=finish)
        for prompt, (tokens, finish) in zip(batch, written, strict=True)
    ]


def _is_right(trace: Rollout, tokenizer: ChatTokenizer) -> bool:
    if trace.prompt.verifier:
        return evaluation.right(trace, tokenizer)
    return trace.finish == "stop"


def _sampling(config: Config, tokenizer: ChatTokenizer, settings: Traces) -> Sampling:
    return Sampling(
        temperature=settings.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_tokens=tuple(tokenizer.stop_tokens),
    )


# ------------------------------------------------------------------ on disk


def _made_from(
    config: Config,
    tokenizer: ChatTokenizer,
    teachers: TeacherPool,
    settings: Traces,
    prompts: Mapping[str, Sequence[Prompt]],
) -> dict[str, Any]:
    """All that traces depend on, as JSON values."""
    ids = json.dumps({domain: [prompt.id for prompt in chosen] for domain, chosen in prompts.items()})
    made_from = {
        "teachers": {domain: [name, teachers.ids[name]] for domain, name in teachers.routing.items()},
        "source": settings.model_dump(mode="json"),
        "sampling": dataclasses.asdict(_sampling(config, tokenizer, settings)),
        "seed": config.run.seed,
        "prompts": hashlib.sha256(ids.encode()).hexdigest(),
        "tokenizer_sha": tokenizer.tokenizer_sha,
        "template_sha": tokenizer.template_sha,
    }
    return json.loads(json.dumps(made_from))  # as it comes back from disk


def _row(trace: Rollout, tokenizer: ChatTokenizer) -> dict[str, Any]:
    record = trace.provenance
    assert record is not None
    return {
        "domain": trace.prompt.domain,
        "messages": [dict(message) for message in trace.prompt.messages],
        "completion": tokenizer.decode(trace.completion.tolist()),
        "verifier": dict(trace.prompt.verifier) or None,
        "teacher": record.policy.run_id,
        "prompt_id": trace.prompt.id,
        "tokens": trace.completion.tolist(),
        "provenance": dataclasses.asdict(record),
    }


def _rollout(row: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> Rollout:
    return Rollout(
        prompt=prompts[row["prompt_id"]],
        sample=0,
        completion=torch.tensor(row["tokens"], dtype=torch.int64),
        finish="stop",
        provenance=provenance_of(row["provenance"]),
    )


def _read(folder: Path, made_from: Mapping[str, Any], groups: Groups) -> str | None:
    """The rows in ``folder``, read by the first rank for all; None where no traces were finished there."""
    found: list[str | None] = [None]

    def look(report: together.Report) -> None:
        if not (folder / HEADER).exists():
            return
        try:
            header = json.loads((folder / HEADER).read_text())
            rows = (folder / ROWS).read_bytes()
            differences = list(_differences(header["made_from"], made_from))
            intact = hashlib.sha256(rows).hexdigest() == header["sha256"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{folder}: traces cannot be read: {error!r}; remove the directory") from None
        if differences:
            raise ConfigurationError(
                f"{folder}: holds traces made from something else: {'; '.join(differences)}; put it back, or remove the"
                " directory to have them made anew, or choose another run.dir"
            )
        if not intact:
            raise ConfigurationError(
                f"{folder / ROWS}: is not what was written (its sha256 differs from {HEADER}'s); remove the directory"
                " to have the traces made anew"
            )
        found[0] = rows.decode()

    together.work(groups, groups.rank == 0, look)
    dist.broadcast_object_list(found, src=0, group=groups.world)
    return found[0]


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key, value in now.items():
        if there.get(key) != value:
            yield f"{key} = {json.dumps(there.get(key))} there, {json.dumps(value)} now"


def _write(folder: Path, text: str, header: Mapping[str, Any], groups: Groups) -> None:
    """Rows, then the header that says they are all there, by the first rank."""
    whole = {**header, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def leave(report: together.Report) -> None:
        atomically(folder / ROWS, lambda file: file.write_bytes(text.encode()))
        atomically(folder / HEADER, lambda file: file.write_text(json.dumps(whole, indent=1) + "\n"))

    together.work(groups, groups.rank == 0, leave)
