"""What guards read off a domain's rollouts, as pure functions; imports torch alone.

A *repeated* token lies inside an n-gram of tokens that its completion has more than once; a token is counted once
however many such n-grams cover it. That is the "duplicate n-gram" share of Rae et al. 2021 (Gopher, arXiv:2112.11446,
appendix A.1.1), taken over tokens instead of characters and at one n. A completion that loops has a share near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mopd.records import Rollout, ScoredRollout

SAME = 1e-5
"""Nats: gaps whose mean is at most this are the rounding of fp32, and log-probabilities no further apart are one."""
SUMS = ("rollouts", "tokens", "repeated", "truncated", "nll", "sampled", "gap", "scored")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One domain's rollouts of a step over all ranks."""

    rollouts: int
    length: float  # mean completion tokens
    repetition: float  # repeated tokens over tokens
    truncation: float  # share of rollouts that were cut short
    entropy: float | None  # nats a token, mean -log p of the sampled tokens; None where nothing was sampled
    gap: float | None  # nats, mean |teacher - behaviour log-probability|; None without scored tokens
    spread: float | None  # nats, highest minus lowest teacher log-probability; None without scored tokens

    @property
    def mute(self) -> bool:
        """Whether the teacher says nothing of rollouts that are there: no scored token, or one log-probability for all
        tokens (of two or more), or the student's own back again."""
        if not self.rollouts:
            return False
        if self.gap is None or self.spread is None:
            return True
        return self.gap <= SAME or (self.spread <= SAME and self.rollouts * self.length >= 2)


def repeated_tokens(completions: Sequence[Tensor], n: int) -> Tensor:
    """int64 ``[len(completions)]``: how many tokens of each (int64 ``[length]``) lie inside an n-gram that it has more
    than once."""
    lengths = torch.tensor([len(completion) for completion in completions], dtype=torch.int64)
    owner = torch.arange(len(completions)).repeat_interleave(lengths)
    total = len(owner)
    if total <= n:
        return torch.zeros(len(completions), dtype=torch.int64)
    # Names of n-grams by doubling: equal names, equal n-grams (Karp, Miller, Rosenberg 1972); exact, unlike a hash. A
    # token's first name holds its completion's number, so an n-gram across a border is like no other.
    tokens = torch.unique(torch.cat(list(completions)), return_inverse=True)[1]
    names, width = torch.unique(owner * total + tokens, return_inverse=True)[1], 1
    while width < n:
        step = min(width, n - width)
        pairs = names[: len(names) - step] * total + names[step:]
        names, width = torch.unique(pairs, return_inverse=True)[1], width + step
    again = (torch.bincount(names)[names] > 1).long()
    edges = torch.zeros(total + 1, dtype=torch.int64)
    edges[: len(again)] += again
    edges[n : n + len(again)] -= again
    inside = edges[:total].cumsum(0) > 0
    return torch.zeros(len(completions), dtype=torch.int64).index_add_(0, owner, inside.long())


def measure(
    rollouts: Sequence[Rollout | ScoredRollout],
    domains: Sequence[str],
    ngram: Callable[[str], int | None],
    reduce: Callable[[Tensor, Tensor], None],
) -> dict[str, Measured]:
    """Each of ``domains``, whether it has rollouts or not; equal on all ranks that ``reduce`` joins.

    ``ngram(domain)``: tokens of an n-gram, None where repetition is not asked for. ``reduce(sums, extremes)`` adds the
    first (fp64 ``[domain, 8]``) over all ranks and takes the largest of the second (fp64 ``[domain, 2]``), in place.
    """
    sums = torch.zeros(len(domains), len(SUMS), dtype=torch.float64)
    extremes = torch.full((len(domains), 2), -torch.inf, dtype=torch.float64)  # highest, and lowest negated
    for row, domain in enumerate(domains):
        own = [item for item in rollouts if _plain(item).prompt.domain == domain]
        if own:
            sums[row], highest, lowest = _local(own, ngram(domain))
            extremes[row] = torch.stack([highest, -lowest])
    reduce(sums, extremes)
    pairs = zip(domains, sums.tolist(), extremes.tolist(), strict=True)
    return {domain: _measured(dict(zip(SUMS, row, strict=True)), *ends) for domain, row, ends in pairs}


def _local(own: Sequence[Rollout | ScoredRollout], n: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """``SUMS`` of this rank's rollouts of a domain, and the teacher's highest and lowest log-probability."""
    completions = [_plain(item).completion for item in own]
    behaviour = [_plain(item).behav_logprobs for item in own]
    drawn = torch.cat([values for values in behaviour if values is not None] or [torch.empty(0)]).double()
    scored = [
        (item.teacher_logprobs, ours)
        for item, ours in zip(own, behaviour, strict=True)
        if isinstance(item, ScoredRollout) and ours is not None
    ]
    sides = zip(*scored, strict=True) if scored else ([torch.empty(0)], [torch.empty(0)])
    teacher, student = (torch.cat(list(side)).double() for side in sides)
    cut = sum(_plain(item).finish == "length" for item in own)
    repeated = 0 if n is None else int(repeated_tokens(completions, n).sum())
    gap = float((teacher - student).abs().sum())
    sums = (len(own), sum(map(len, completions)), repeated, cut, -float(drawn.sum()), len(drawn), gap, len(teacher))
    ends = (teacher.max(), teacher.min()) if len(teacher) else (torch.tensor(-torch.inf), torch.tensor(torch.inf))
    return torch.tensor(sums, dtype=torch.float64), *ends


def _plain(item: Rollout | ScoredRollout) -> Rollout:
    return item.rollout if isinstance(item, ScoredRollout) else item


def _measured(sums: dict[str, float], highest: float, lowest_negated: float) -> Measured:
    return Measured(
        rollouts=int(sums["rollouts"]),
        length=sums["tokens"] / max(1.0, sums["rollouts"]),
        repetition=sums["repeated"] / max(1.0, sums["tokens"]),
        truncation=sums["truncated"] / max(1.0, sums["rollouts"]),
        entropy=sums["nll"] / sums["sampled"] if sums["sampled"] else None,
        gap=sums["gap"] / sums["scored"] if sums["scored"] else None,
        spread=highest + lowest_negated if sums["scored"] else None,
    )
