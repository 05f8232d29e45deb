"""The measurements of a pre-flight on any layout; every rank calls them alike and gets the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import batched, combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.parallel import Groups
from megatron_mopd.preflight import numbers
from megatron_mopd.preflight.numbers import Tally
from megatron_mopd.preflight_config import Preflight
from megatron_mopd.records import Rollout
from megatron_mopd.scoring import Scorer
from megatron_mopd.teachers import TeacherPool
from mopd_kernels import nvfp4
from mopd_kernels.divergence import Head, divergence
from mopd_kernels.nvfp4 import NVFP4Tensor

HELD_SEQUENCES = 512
"""Sequences of a data-parallel rank whose final hidden states under one teacher are kept for another to be held
against; so often do two teachers of one architecture change places."""

Pairs = Mapping[str, Sequence[str]]
"""Teacher -> domains it is measured on."""


@torch.no_grad()
def measure(
    pool: TeacherPool, student: Any, rollouts: Sequence[Rollout], pairs: Pairs, settings: Preflight
) -> dict[str, Any]:
    """``{"teachers": {teacher: {domain: metrics}}, "conflicts": [...]}`` on this data-parallel rank's ``rollouts``.

    ``student`` is in eval mode. See :mod:`megatron_mopd.preflight.numbers` for the metrics; ``disagreement`` is the
    largest difference between two scorings. Conflicts are of every two teachers that share a domain. Equal on all
    ranks, and on any layout up to rounding.
    """
    turns = {n: [i for i, r in enumerate(rollouts) if r.prompt.domain in pairs[n]] for n in pool.names}
    tallies = {name: {domain: Tally() for domain in domains} for name, domains in pairs.items()}
    scores: dict[str, list[Tensor]] = {name: [] for name in pairs}
    for name, mb, ours, theirs in pool.pairs(student, rollouts, turns):
        tokens = numbers.of_tokens(ours, theirs, mb, settings.top_k, settings.implausible_ratio)
        scores[name].append(tokens.teacher_logprobs)
        of_row = torch.tensor([pairs[name].index(domain) if domain else -1 for domain in mb.domains])
        for index, domain in enumerate(pairs[name]):
            tallies[name][domain].add(tokens, of_row[tokens.rows] == index)
    found = {}
    for name in pairs:
        own = [rollouts[i] for i in turns[name]]
        differences = _differences(own, scores[name], scored_again(pool, name, own), pool.groups)
        found[name] = {d: _joined(tally, differences.get(d, 0.0), pool.groups) for d, tally in tallies[name].items()}
    return {"teachers": found, "conflicts": conflicts(pool, rollouts, pairs, settings)}


def _differences(
    rollouts: Sequence[Rollout], scores: Sequence[Tensor], again: Sequence[Tensor], groups: Groups
) -> dict[str, float]:
    """Largest difference of two scorings in each domain, in nats, on the last pipeline stage."""
    if not groups.last_stage or not rollouts:
        return {}
    first = torch.cat(list(scores)).split([len(rollout.completion) for rollout in rollouts])
    by_domain: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for rollout, one, other in zip(rollouts, first, again, strict=True):
        by_domain.setdefault(rollout.prompt.domain, []).append((one, other))
    return {domain: numbers.largest_difference(both) for domain, both in by_domain.items()}


def scored_again(pool: TeacherPool, name: str, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """What a teacher gives to the tokens of each rollout when these come in the opposite order, in micro-batches of
    another size; fp32, on all pipeline stages."""
    scorer = other_cut(pool.scorer)
    backwards = rollouts[::-1]
    if not (micro_batches := scorer.even(scorer.pack(backwards))):
        return []
    flat = scorer.logprobs(pool.swap_in(name), micro_batches, pool.packed_output_weight(name))
    return list(flat.split([len(r.completion) for r in backwards]))[::-1]


def other_cut(scorer: Scorer) -> Scorer:
    """One that cuts micro-batches of another size."""
    size = scorer.micro_batch_size
    return dataclasses.replace(scorer, micro_batch_size=2 if size == 1 else (size + 1) // 2)


def conflicts(
    pool: TeacherPool, rollouts: Sequence[Rollout], pairs: Pairs, settings: Preflight
) -> list[Mapping[str, Any]]:
    """Mean Jensen-Shannon divergence of every two teachers in every domain that they share."""
    result = []
    for one, other in combinations(pairs, 2):
        for domain in [d for d in pairs[one] if d in pairs[other]]:
            own = [r for r in rollouts if r.prompt.domain == domain]
            total, tokens = _jsd(pool, own, one, other)
            result.append(numbers.conflict(domain, (one, other), total, tokens, settings.max_conflict))
    return result


def _jsd(pool: TeacherPool, rollouts: Sequence[Rollout], one: str, other: str) -> tuple[float, float]:
    """Sum over tokens of all ranks, and their number."""
    groups, scorer = pool.groups, pool.scorer
    sums = torch.zeros(2, dtype=torch.float64, device=groups.device)
    part_size = max(groups.pp_size, HELD_SEQUENCES // scorer.micro_batch_size)
    for part in batched(scorer.even(scorer.pack(rollouts)), part_size):
        kept = [p.hidden for p in pool.predict(pool.swap_in(one), part, pool.packed_output_weight(one))]
        weight = _dense(pool.output_weight(one), kept[0].dtype) if kept else None
        theirs = pool.predict(pool.swap_in(other), part, pool.packed_output_weight(other))
        for hidden, q in zip(kept, theirs, strict=True):
            assert weight is not None
            value = divergence("jsd", Head(hidden, weight), Head(q.hidden, q.weight), **q.options).value.double()
            sums += torch.stack([value.sum(), value.new_tensor(len(value))])
    for group in (groups.pp, groups.dp):  # stages before the last one added nothing
        dist.all_reduce(sums, group=group)
    total, tokens = sums.tolist()
    return total, tokens


def _dense(weight: Tensor | NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else nvfp4.dequantize(weight, dtype)


def _joined(tally: Tally, difference: float, groups: Groups) -> dict[str, Any]:
    """Metrics from the tallies and largest differences of all data-parallel ranks, known to all pipeline stages."""
    sums = tally.sums.to(groups.device)
    dist.all_reduce(sums, group=groups.dp)
    shares: list[Any] = [None] * groups.dp_size
    dist.all_gather_object(shares, (tally.tokens(), difference), group=groups.dp)
    found: list[Any] = [None]
    if groups.last_stage:
        gaps, positions = (torch.cat(parts) for parts in zip(*(tokens for tokens, _ in shares), strict=True))
        worst = torch.tensor([share for _, share in shares]).max()  # NaN where one is
        disagreement = float(worst) if worst.isfinite() else None
        found = [numbers.summary(sums.cpu(), gaps, positions) | {"disagreement": disagreement}]
    dist.broadcast_object_list(found, group=groups.pp, group_src=groups.pp_size - 1)
    return found[0]
