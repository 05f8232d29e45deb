"""Global means of per-token values by domain and teacher, reduced with the same keys on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.records import Rollout, ScoredRollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """One per-token (or per-sequence) value and the metric made of its mean."""

    source: str  # its name in ObjectiveOutput.per_token
    metric: str
    form: Callable[[Tensor], Tensor] | None = None  # applied before averaging
    std: str | None = None  # name of the metric with the standard deviation over all tokens
    by_domain: bool = True
    by_teacher: bool = False


QUANTITIES: tuple[Quantity, ...] = (
    Quantity(
        source="advantage",
        metric="on_policy_distillation/adv_mean",
        std="on_policy_distillation/adv_std",
        by_teacher=True,
    ),
    Quantity(source="log_ratio", metric="on_policy_distillation/teacher_student_logprob_gap_mean", by_teacher=True),
    Quantity(source="k1", metric="reverse_kl_k1", by_teacher=True),
    Quantity(source="k2", metric="reverse_kl_k2"),
    Quantity(source="k3", metric="reverse_kl_k3"),
    Quantity(source="ratio", metric="ratio/mean", by_domain=False),
    Quantity(source="clipped", metric="ratio/clipped_frac"),
    Quantity(source="importance", metric="importance/mean", by_domain=False),
    Quantity(source="mask", metric="importance/masked_frac", form=lambda kept: 1 - kept),
    # exp|log c|: how far sampling and training disagree on the probability of a token, as a factor >= 1.
    Quantity(
        source="importance", metric="token_mult_prob_error", form=lambda c: torch.maximum(c, 1 / c), by_domain=False
    ),
    Quantity(source="entropy", metric="entropy"),
    Quantity(source="nll", metric="nll"),
    Quantity(source="length", metric="rollout/len"),
    Quantity(source="truncated", metric="rollout/truncated_frac"),
    Quantity(source="reward", metric="rollout/reward"),
)
SEQUENCE_SOURCES = ("length", "truncated", "reward")


def quantities_of(sources: Iterable[str]) -> tuple[Quantity, ...]:
    """The quantities made of ``sources``, in a fixed order; a source not listed above becomes ``per_token/NAME``."""
    wanted = set(sources)
    own = sorted(wanted - {q.source for q in QUANTITIES})
    known = tuple(q for q in QUANTITIES if q.source in wanted)
    return known + tuple(Quantity(source=name, metric=f"per_token/{name}") for name in own)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSums:
    """Sums, sums of squares and counts of per-token values by domain; adding gives a new object.

    The keys are fixed at construction, so every rank reduces the same numbers in the same order even where it holds no
    token of a domain.
    """

    domains: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    teachers: Mapping[str, tuple[str, ...]]  # teacher -> domains
    values: Tensor  # fp64 [quantity, domain, (sum, sum of squares, count)]

    @classmethod
    def zeros(
        cls,
        domains: Sequence[str],
        sources: Iterable[str],
        *,
        teachers: Mapping[str, Sequence[str]] | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenSums:
        """Nothing added yet. ``sources``: per-token names that will come; ``teachers``: name -> domains it serves."""
        quantities = quantities_of(sources)
        return cls(
            domains=tuple(domains),
            quantities=quantities,
            teachers={name: tuple(served) for name, served in (teachers or {}).items()},
            values=torch.zeros(len(quantities), len(domains), 3, dtype=torch.float64, device=device),
        )

    def add(self, per_token: Mapping[str, Tensor], cu_seqlens: Tensor, domains: Sequence[str]) -> TokenSums:
        """With one micro-batch more: ``per_token`` values ``[T]``, those of row i at ``cu_seqlens[i]:cu_seqlens[i+1]``.

        Raises ValueError for a value of another length, a name or a domain not given at construction.
        """
        lengths = cu_seqlens.diff()
        which = self._domain_of_token(lengths.tolist(), domains)
        if unknown := sorted(set(per_token) - {q.source for q in self.quantities}):
            raise ValueError(f"per_token holds {unknown}, which were not announced to TokenSums.zeros(sources=...)")
        for name, value in per_token.items():
            if value.shape != which.shape:
                raise ValueError(f"per_token[{name!r}] is {list(value.shape)}: cu_seqlens counts [{len(which)}] tokens")
        present = [i for i, q in enumerate(self.quantities) if q.source in per_token]
        if not present or not len(which):
            return self
        stacked = torch.stack([_formed(self.quantities[i], per_token) for i in present])  # [q, T]
        sums = self.values.clone()
        for d in range(len(self.domains)):
            # where, not a product: an infinite value must not reach the other domains as NaN.
            mine = torch.where(which == d, stacked, 0.0)
            count = (which == d).sum().expand(len(present))
            sums[present, d] += torch.stack([mine.sum(1), mine.square().sum(1), count], dim=1)
        return replace(self, values=sums)

    def add_rollouts(self, rollouts: Sequence[Rollout | ScoredRollout]) -> TokenSums:
        """With the per-sequence values of ``rollouts``: length in tokens, truncation, and reward where there is one."""
        plain = [r.rollout if isinstance(r, ScoredRollout) else r for r in rollouts]
        rewarded = [r for r in plain if r.reward is not None]
        device = self.values.device

        def column(values: Iterable[float]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float64, device=device)

        result = self.add(
            {
                "length": column(len(r.completion) for r in plain),
                "truncated": column(r.finish == "length" for r in plain),
            },
            torch.arange(len(plain) + 1),
            [r.prompt.domain for r in plain],
        )
        rewards = {"reward": column(r.reward for r in rewarded if r.reward is not None)}
        return result.add(rewards, torch.arange(len(rewarded) + 1), [r.prompt.domain for r in rewarded])

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Means over all tokens of ``group`` (of this process where it is None), by metric name.

        A collective: every rank of the group calls it. A mean over no token at all is left out. ``rollout/tokens`` and
        ``rollout/sequences`` are totals.
        """
        totals = self.values.clone()
        if group is not None:
            dist.all_reduce(totals, group=group)
        result: dict[str, float] = {}
        for quantity, table in zip(self.quantities, totals.cpu(), strict=True):
            result |= self._means(quantity, table)
        return result

    def _means(self, quantity: Quantity, table: Tensor) -> dict[str, float]:
        scopes: dict[str, Sequence[int]] = {quantity.metric: range(len(self.domains))}
        if quantity.by_domain:
            scopes |= {f"{quantity.metric}/{name}": range(d, d + 1) for d, name in enumerate(self.domains)}
        if quantity.by_teacher:
            for teacher, served in self.teachers.items():
                scopes[f"{quantity.metric}/teacher/{teacher}"] = [self.domains.index(name) for name in served]
        result: dict[str, float] = {}
        for name, members in scopes.items():
            total, square, count = table[list(members)].sum(0).tolist()
            if count:
                result[name] = total / count
                if name == quantity.metric and quantity.std is not None:
                    result[quantity.std] = math.sqrt(max(0.0, square / count - (total / count) ** 2))
                if name == "rollout/len":
                    result |= {"rollout/tokens": total, "rollout/sequences": count}
        return result

    def _domain_of_token(self, lengths: Sequence[int], domains: Sequence[str]) -> Tensor:
        index = []
        for length, name in zip(lengths, domains, strict=True):
            if length and name not in self.domains:
                known = list(self.domains)
                raise ValueError(f"domain {name!r} was not announced to TokenSums.zeros(domains=...): {known}")
            index.append(self.domains.index(name) if length else 0)
        rows = torch.tensor(index, dtype=torch.int64), torch.tensor(list(lengths), dtype=torch.int64)
        return torch.repeat_interleave(*rows).to(self.values.device)


def _formed(quantity: Quantity, per_token: Mapping[str, Tensor]) -> Tensor:
    value = per_token[quantity.source].double()
    return value if quantity.form is None else quantity.form(value)
