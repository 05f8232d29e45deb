"""Run a pre-flight: student and teachers of a configuration, rollouts, numbers, decisions, files and a table."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mopd import checkpoint, display, evaluation, exchange, origins, peak_memory, provenance
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.files import atomically
from megatron_mopd.parallel import Groups
from megatron_mopd.preflight import plot, table
from megatron_mopd.preflight.decide import FILE, decide
from megatron_mopd.preflight.measure import Pairs, measure
from megatron_mopd.prompts import load_prompts
from megatron_mopd.records import Prompt, Sampling
from megatron_mopd.rollout import Sampler
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import ChatTokenizer, build_tokenizer
from megatron_mopd.train import leave, versions

log = logging.getLogger(__name__)

PICTURE = "preflight.png"
DRAW = -2
"""Of the noise of these rollouts, which neither training (0, 1, ...) nor evaluation (-1) draws."""


def run_stage(config: Config, groups: Groups, title: str) -> dict[str, Any]:
    """Measure every teacher of ``config`` on rollouts of ``model.initial`` and leave ``preflight.json`` and
    ``preflight.png`` in ``run.dir``; the content of the first, equal on all ranks.

    Rollouts depend on the weights, ``run.seed`` and the prompts, not on the layout; they are sampled at
    ``rollout.temperature`` and scored at the same. The file is there whole or not at all, and a repeated call measures
    again. Raises :class:`ConfigurationError` for settings that cannot work, ScoringError never: a teacher whose
    numbers mean nothing is refused.
    """
    start = time.perf_counter()
    peak_memory.restart(groups.device)
    tokenizer = build_tokenizer(config.tokenizer)
    config = exchange.prepare(config, groups)
    settings, pairs = config.preflight, candidates(config)
    vocab_size = origins.vocab_size(config.model, tokenizer.vocab_size)
    if settings.top_k > vocab_size:
        raise ConfigurationError(
            f"preflight.top_k = {settings.top_k}: the vocabulary has {vocab_size} tokens; lower it to"
            f" {max(1, vocab_size // 4)} or less, so that not every token is among the likeliest"
        )
    prompts = chosen_prompts(config, tokenizer, pairs)
    pool = TeacherPool(config, groups, tokenizer)
    student, student_id = load_student(config, pool, tokenizer)
    sampling = Sampling(
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_tokens=tuple(tokenizer.stop_tokens),
    )
    sampler = Sampler(
        student, groups, config.model.max_sequence_length, vocab_size, prefill_tokens=config.rollout.prefill_tokens
    )
    requests = [(prompt, 0) for prompt in prompts[groups.dp_rank :: groups.dp_size]]
    rollouts = sampler.generate(requests, sampling, config.run.seed, DRAW, config.rollout.batch_size)
    found = measure(pool, student, rollouts, pairs, settings)
    result = _result(found, config, pool, student_id, prompts)
    _leave(result, config.run.dir, groups, title)
    spent = {"wall_s": time.perf_counter() - start, "parallel": config.parallel.model_dump(), "versions": versions()}
    leave(config.run.dir / "result.json", spent | peak_memory.peak(groups), groups)
    dist.barrier(groups.world)  # every rank may now read what was decided
    return result


def candidates(config: Config) -> Pairs:
    """Teacher -> domains it is measured on; raises :class:`ConfigurationError` for none."""
    if not config.teachers:
        raise ConfigurationError("a pre-flight measures teachers; name at least one under teachers")
    return {name: config.preflight.candidates.get(name, t.domains) for name, t in config.teachers.items()}


def chosen_prompts(config: Config, tokenizer: ChatTokenizer, pairs: Pairs) -> list[Prompt]:
    """The first ``preflight.samples`` prompts of each domain that a teacher is measured on."""
    wanted = {domain for domains in pairs.values() for domain in domains}
    side = config.preflight.prompts
    sources = config.data.held_out if side == "held_out" else config.data.train
    prompts = load_prompts(sources, tokenizer, config.model.max_sequence_length)
    chosen = evaluation.held_out([p for p in prompts if p.domain in wanted], config.preflight.samples)
    if missing := sorted(wanted - {prompt.domain for prompt in chosen}):
        other = "train" if side == "held_out" else "held_out"
        raise ConfigurationError(
            f"preflight.prompts = {side}: data.{side} has no prompt of domain {missing[0]!r}, on which a teacher is"
            f" to be measured; add some, or set preflight.prompts to {other}"
        )
    return chosen


def load_student(config: Config, pool: TeacherPool, tokenizer: ChatTokenizer) -> tuple[Any, str]:
    """The student, without gradient and in eval mode, and its checkpoint_id."""
    path = config.model.initial
    if path is None:
        raise ConfigurationError(
            "model.initial: missing; a pre-flight asks about the weights that training starts from"
        )
    student = pool.scorer.build(config.model, config.run.precision, "model")
    manifest = checkpoint.load_weights(path, student, pool.groups)
    reads = {"tokenizer_sha": tokenizer.tokenizer_sha, "template_sha": tokenizer.template_sha}
    known = {key: value for key, value in reads.items() if key in manifest}  # other programs write none
    provenance.check_manifest(manifest, known, where=f"model.initial = {path}")
    return student, manifest["checkpoint_id"]


def _result(
    found: Mapping[str, Any], config: Config, pool: TeacherPool, student_id: str, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    settings = config.preflight
    teachers = {}
    for name, domains in found["teachers"].items():
        decision, reasons = decide(domains, settings)
        entry = {"checkpoint_id": pool.ids[name], "decision": decision, "reasons": reasons, "domains": domains}
        teachers[name] = entry
    bounds = ("min_shared_mass", "min_overlap", "max_implausible", "max_disagreement", "max_conflict")
    return {
        "student": student_id,
        "teachers": teachers,
        "conflicts": found["conflicts"],
        "thresholds": {name: getattr(settings, name) for name in bounds},
        "top_k": settings.top_k,
        "implausible_ratio": settings.implausible_ratio,
        "prompts": {"side": settings.prompts, "number": dict(Counter(prompt.domain for prompt in prompts))},
        "sampling": {"temperature": config.rollout.temperature, "max_new_tokens": config.rollout.max_new_tokens},
        "seed": config.run.seed,
    }


def _leave(result: Mapping[str, Any], directory: Path, groups: Groups, title: str) -> None:
    """Picture, table and last the decisions, by the first rank."""
    if groups.rank == 0:
        atomically(directory / PICTURE, lambda path: plot.save(plot.preflight(result), path))
        for part in table.parts(result, title):
            display.console().print(part)
    leave(directory / FILE, result, groups)
