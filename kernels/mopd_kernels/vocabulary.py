"""One rank's shard of the vocabulary: which columns it holds and how its numbers join those of the group."""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

EMPTY = -1e4
"""Stands for -inf where a weight of 0 multiplies it: e^EMPTY is 0 all the same, and 0 * EMPTY no NaN."""


class Statistics(NamedTuple):
    """Of each row's distribution over the whole vocabulary; fp32 ``[T]`` each, natural logarithms."""

    logprob: Tensor  # of the target
    entropy: Tensor
    lse: Tensor  # log-sum-exp of the logits over the temperature


class VocabularyShard:
    """Rows ``rank * width`` onwards of the output weight, ``width = V / tp``; columns from ``valid`` on are padding.

    ``columns`` counts the valid columns held here (0 where the whole shard is padding), ``start`` is the global number
    of the first. Chunks of rows are cut by ``width``, which all ranks share, so that all meet in as many
    collectives. Raises ValueError where ``valid_vocab`` does not fit the shards of the group.
    """

    def __init__(self, width: int, group: dist.ProcessGroup | None, valid_vocab: int | None) -> None:
        self.size = 1 if group is None else dist.get_world_size(group)
        self.group, self.width = group, width
        self.valid = self.size * width if valid_vocab is None else valid_vocab
        if not 0 < self.valid <= self.size * width:
            raise ValueError(
                f"valid_vocab = {self.valid} must be between 1 and {self.size * width}, the columns that {self.size}"
                f" shards of {width} hold together; pass the group the weight is sharded over"
            )
        self.start = 0 if group is None else dist.get_rank(group) * width
        self.columns = min(max(self.valid - self.start, 0), width)

    def check(self, targets: Tensor, keep: Tensor | None = None) -> None:
        """Refuse token numbers outside the vocabulary among the kept rows.

        On CPU a ValueError that names the first one; on CUDA an assertion on the device, which costs no
        synchronisation.
        """
        bad = (targets < 0) | (targets >= self.valid)
        if keep is not None:
            bad = bad & keep
        if not bad.numel():
            return
        rule = f"targets must lie in [0, {self.valid}), the valid vocabulary"
        if bad.is_cuda:
            torch._assert_async(~bad.any(), rule)  # pyright: ignore[reportPrivateImportUsage]
        elif bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(f"targets[{row}] = {int(targets[row])}: {rule}; mask the row before, or mend the tokens")

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target in this shard (0 where it lies elsewhere), and whether it lies here."""
        local = targets - self.start
        here = (local >= 0) & (local < self.columns)
        return local.where(here, 0), here

    def piece(self, columns: slice) -> VocabularyShard:
        """The shard that has some of this one's valid columns alone."""
        some = copy(self)
        some.start, some.columns = self.start + columns.start, columns.stop - columns.start
        return some

    def pick(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logit of each target, 0 where another rank holds it."""
        if self.columns == 0:
            return logits.new_zeros(len(logits))
        local, here = self.locate(targets)
        return logits.gather(1, local[:, None])[:, 0].where(here, 0.0)

    def gather(self, part: Tensor) -> Tensor:
        """``[k, T]`` of this rank to ``[tp, k, T]`` of all ranks in rank order; T is equal within the group."""
        if self.size == 1 or part.numel() == 0:
            return part.expand(self.size, *part.shape)
        parts = part.new_empty(self.size, *part.shape)
        dist.all_gather(list(parts.unbind()), part.contiguous(), group=self.group)
        return parts


def join(parts: Tensor) -> Statistics:
    """Statistics of the whole vocabulary from the shards' ``[tp, 3, T]`` as of :func:`merge_columns`."""
    lse, logit, mean = merge_columns(parts)
    return Statistics(logprob=logit - lse, entropy=-mean, lse=lse)


def merge_columns(parts: Tensor) -> Tensor:
    """Of disjoint sets of columns, ``[sets, 3, T]``, to ``[3, T]`` of their union: log-sum-exp, the target's logit, and
    the mean log-probability under the set's own softmax, which is minus its entropy.

    Logits enter by differences alone, so a shift common to all of them costs no accuracy.
    """
    lse = parts[:, 0].logsumexp(0)
    shift = (parts[:, 0] - lse).clamp(min=EMPTY)  # a shard without columns has log-sum-exp -inf, and no share
    share = shift.exp()
    mean = (share * (parts[:, 2] + shift)).sum(0) / share.sum(0)
    return torch.stack([lse, parts[:, 1].sum(0), mean])
