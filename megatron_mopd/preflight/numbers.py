"""The numbers of a pre-flight: from two distributions at every token of a student's rollouts to JSON values.

``s_t`` is the prefix of token ``t``, p_S and p_T are the distributions of student and teacher after it, K their ``k``
likeliest tokens (verl's ``overlap_ratio``; "Rethinking on-policy distillation", arXiv 2604.13016, speaks of the mass
on shared tokens). Means are over the completion tokens of all ranks; natural logarithms, nats.

    reverse_kl                    KL(p_S || p_T), exact
    overlap                       |K_S and K_T| / k
    teacher_mass, student_mass    p_T and p_S of the tokens in both K_S and K_T, "shared" below
    teacher_top_mass, student_top_mass    p_T of K_T, p_S of K_S
    teacher_shared, student_shared        mean p_T(shared) / mean p_T(K_T), and the same of p_S and K_S
    teacher_entropy, student_entropy
    gap                           log p_T(y_t) - log p_S(y_t) of the sampled token y_t: the advantage of Eq. 2
    implausible                   share of prefixes s_t that hold a token y_u, u < t, with p_T(y_u) < ratio p_S(y_u)

Masses say whether the tokens that overlap matter; where a distribution is so flat that its likeliest tokens hold little
of it, only the share of them does. A prefix is judged by the ratio, not by p_T alone: a token that is rare under both
says nothing against the student, and a teacher equal to the student must find nothing implausible in outputs of any
length. It is judged by its worst token, not by the mean: from there on the teacher scores a state that it would hardly
ever reach itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mopd import masks
from megatron_mopd.predictions import Predictions
from megatron_mopd.records import MicroBatch
from mopd_kernels.divergence import Head, divergence

MEANS = (
    "reverse_kl",
    "overlap",
    "teacher_mass",
    "student_mass",
    "teacher_top_mass",
    "student_top_mass",
    "teacher_entropy",
    "student_entropy",
    "gap",
    "implausible",
)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenNumbers:
    """Of the completion tokens of a micro-batch, on the host, detached."""

    values: Tensor  # fp64 [T, len(MEANS)], a mean's summands
    teacher_logprobs: Tensor  # fp32 [T], of the sampled tokens
    positions: Tensor  # int64 [T], from 0 in each completion
    rows: Tensor  # int64 [T], row of the micro-batch


@torch.no_grad()
def of_tokens(ours: Predictions, theirs: Head, micro_batch: MicroBatch, top_k: int, ratio: float) -> TokenNumbers:
    """``ours`` and ``theirs``: what student and teacher predict at the completion tokens of ``micro_batch``.

    All ranks of a tensor parallel group call it together.
    """
    between = divergence("reverse_kl", Head(ours.hidden, ours.weight), theirs, top_k=top_k, **ours.options)
    student = ours.statistics(micro_batch.targets)
    teacher = Predictions(theirs.hidden, theirs.weight, **ours.options).statistics(micro_batch.targets)
    gap = (teacher.logprob - student.logprob).cpu()
    rows = masks.segments(micro_batch.cu_seqlens, len(gap))
    named = {
        "reverse_kl": between.value,
        "overlap": between.overlap,
        "teacher_mass": between.shared_teacher_mass,
        "student_mass": between.shared_student_mass,
        "teacher_top_mass": between.teacher_mass,
        "student_top_mass": between.student_top_mass,
        "teacher_entropy": teacher.entropy,
        "student_entropy": student.entropy,
        "gap": gap,
        "implausible": implausible_prefixes(gap, micro_batch.cu_seqlens, ratio),
    }
    columns = [named[name] for name in MEANS]
    return TokenNumbers(
        values=torch.stack([c.double().cpu() for c in columns if c is not None], dim=1),
        teacher_logprobs=teacher.logprob.cpu(),
        positions=torch.arange(len(gap)) - micro_batch.cu_seqlens[rows],
        rows=rows,
    )


def implausible_prefixes(gap: Tensor, cu_seqlens: Tensor, ratio: float) -> Tensor:
    """bool ``[T]``: whether the prefix of each token, its own completion's earlier tokens, holds a token whose ``gap``
    is below log ``ratio``. A prompt alone never is."""
    bad = (gap < math.log(ratio)).long()
    seen = torch.cat([bad.new_zeros(1), bad.cumsum(0)])  # among the tokens before the i-th of the micro-batch
    rows = masks.segments(cu_seqlens, len(gap))
    return seen[:-1] > seen[cu_seqlens[:-1]][rows]


@dataclass(slots=True)
class Tally:
    """Sums of one teacher in one domain on one data-parallel rank."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(len(MEANS) + 1, dtype=torch.float64))
    gaps: list[Tensor] = field(default_factory=list)  # fp32, with
    positions: list[Tensor] = field(default_factory=list)  # int64

    def add(self, found: TokenNumbers, chosen: Tensor) -> None:
        """Count the tokens that ``chosen`` (bool ``[T]``) names."""
        values = found.values[chosen]
        self.sums += torch.cat([values.sum(0), values.new_tensor([len(values)])])
        self.gaps.append(values[:, MEANS.index("gap")].float())
        self.positions.append(found.positions[chosen])

    def tokens(self) -> tuple[Tensor, Tensor]:
        """All gaps and their positions."""
        if not self.gaps:
            return torch.empty(0), torch.empty(0, dtype=torch.int64)
        return torch.cat(self.gaps), torch.cat(self.positions)


def summary(sums: Tensor, gaps: Tensor, positions: Tensor) -> dict[str, Any]:
    """JSON values of a teacher in a domain, from the sums (as :class:`Tally`'s) and the gaps of all ranks.

    ``not_finite`` counts tokens whose gap is no number; a mean that is none is None.
    """
    means: dict[str, float] = dict(zip(MEANS, (sums[:-1] / sums[-1]).tolist(), strict=True))
    shared = {f"{who}_shared": means[f"{who}_mass"] / means[f"{who}_top_mass"] for who in ("teacher", "student")}
    finite = gaps.isfinite()
    kept, where = gaps[finite], positions[finite]
    return {name: _number(value) for name, value in (means | shared).items()} | {
        "tokens": int(sums[-1]),
        "not_finite": int((~finite).sum()),
        "gap_quantiles": _quantiles(kept),
        "gap_by_position": [
            {"first": first, "last": last, "tokens": int(inside.sum()), "quantiles": _quantiles(kept[inside])}
            for first, last, inside in _bins(where)
        ],
    }


def _bins(positions: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Bins of 1, 2, 4, ... positions, up to the last that holds a token: ``(first, last, who is inside)``."""
    first, width = 0, 1
    while len(positions) and first <= int(positions.max()):
        last = first + width - 1
        yield first, last, (positions >= first) & (positions <= last)
        first, width = last + 1, 2 * width


def _quantiles(values: Tensor) -> dict[str, float] | None:
    if not len(values):
        return None
    # numpy's, since torch.quantile takes no more than 16 million values
    found = np.quantile(values.double().numpy(), QUANTILES)
    return {f"{q:g}": float(v) for q, v in zip(QUANTILES, found, strict=True)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def largest_difference(scorings: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Largest absolute difference between two scorings of the same rollouts, in nats; NaN where one has a NaN; 0 for
    no tokens."""
    differences = [(one.double() - other.double()).abs() for one, other in scorings if len(one)]
    return float(torch.cat(differences).max()) if differences else 0.0


def conflict(domain: str, teachers: Sequence[str], total: float, tokens: float, limit: float) -> Mapping[str, Any]:
    """JSON values of two teachers' mean Jensen-Shannon divergence in a domain."""
    mean = _number(total / tokens)
    return {
        "domain": domain,
        "teachers": list(teachers),
        "jsd": mean,
        "tokens": int(tokens),
        "conflicting": mean is None or mean > limit,
    }
