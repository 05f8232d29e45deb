"""From rollouts to micro-batches: flat completion tokens beside right-padded sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_mopd.records import MicroBatch, Rollout, ScoredRollout

if TYPE_CHECKING:
    from megatron_mopd.parallel import Groups


def pack(
    rollouts: Sequence[Rollout | ScoredRollout],
    micro_batch_size: int,
    pad_token: int,
    *,
    domain_weights: Mapping[str, float] | None = None,
    outcome_advantages: Sequence[float] | None = None,
    length_multiple: int = 1,
) -> list[MicroBatch]:
    """Cut ``rollouts``, in order, into micro-batches of at most ``micro_batch_size`` sequences.

    Sequences are padded on the right to the longest of their micro-batch, rounded up to ``length_multiple`` (the tensor
    parallel size under sequence parallelism). Right padding needs no mask: attention, convolution and state-space
    scan are causal, so no real position sees it. ``outcome_advantages``: one value per rollout, spread over its tokens.
    """
    batches = []
    for start in range(0, len(rollouts), micro_batch_size):
        part = rollouts[start : start + micro_batch_size]
        outcome = None if outcome_advantages is None else outcome_advantages[start : start + micro_batch_size]
        batches.append(_pack_one(part, pad_token, domain_weights or {}, outcome, length_multiple))
    return batches


def empty(pad_token: int, length_multiple: int = 1) -> MicroBatch:
    """A micro-batch without completion tokens, for a rank that only takes part in its group's collectives."""
    return MicroBatch(
        tokens=torch.full((1, length_multiple), pad_token, dtype=torch.int64),
        lengths=torch.zeros(1, dtype=torch.int64),
        rows=torch.empty(0, dtype=torch.int64),
        targets=torch.empty(0, dtype=torch.int64),
        cu_seqlens=torch.zeros(2, dtype=torch.int64),
        domains=("",),
        domain_weight=torch.empty(0),
        behav_logprobs=torch.empty(0),
        teacher_logprobs=torch.empty(0),
    )


def sequences(micro_batches: Sequence[MicroBatch]) -> list[tuple[torch.Tensor, int]]:
    """The sequences that the completion tokens of ``micro_batches`` belong to, one after the other: int64 ``[length]``
    without padding, and how many tokens at the end are the completion; rows without one are left out."""
    found = []
    for micro_batch in micro_batches:
        completions = micro_batch.cu_seqlens.diff().tolist()
        for row, length, completion in zip(micro_batch.tokens, micro_batch.lengths.tolist(), completions, strict=True):
            if completion:
                found.append((row[:length], completion))
    return found


def even(micro_batches: Sequence[MicroBatch], pad_token: int, groups: Groups, dispatcher: str) -> list[MicroBatch]:
    """Pad with empty micro-batches until all data-parallel ranks have as many, so that all run the same collectives.

    Behind mcore's allgather dispatcher, which gathers as many tokens from every rank as it has itself, the i-th
    micro-batches become equally large too. Empty where no rank has any. A collective of ``groups.dp``, whose ranks
    together hold every expert parallel group; tensor parallel peers have the same micro-batches anyway.
    """
    count = torch.tensor(len(micro_batches), device=groups.device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=groups.dp)
    missing = int(count) - len(micro_batches)
    result = [*micro_batches, *[empty(pad_token, groups.tp_size)] * missing]
    if not result or dispatcher != "allgather":
        return result
    shapes = torch.tensor([mb.tokens.shape for mb in result], device=groups.device)
    dist.all_reduce(shapes, op=dist.ReduceOp.MAX, group=groups.dp)
    return [_padded(mb, b, s, pad_token) for mb, (b, s) in zip(result, shapes.tolist(), strict=True)]


def _padded(micro_batch: MicroBatch, b: int, s: int, pad_token: int) -> MicroBatch:
    width, length = micro_batch.tokens.shape
    if (width, length) == (b, s):
        return micro_batch
    more = b - width
    return dataclasses.replace(
        micro_batch,
        tokens=F.pad(micro_batch.tokens, (0, s - length, 0, more), value=pad_token),
        lengths=F.pad(micro_batch.lengths, (0, more)),
        rows=micro_batch.rows // width * b + micro_batch.rows % width,
        cu_seqlens=torch.cat([micro_batch.cu_seqlens, micro_batch.cu_seqlens[-1:].expand(more)]),
        domains=micro_batch.domains + ("",) * more,
    )


def _pack_one(
    part: Sequence[Rollout | ScoredRollout],
    pad_token: int,
    domain_weights: Mapping[str, float],
    outcome: Sequence[float] | None,
    length_multiple: int,
) -> MicroBatch:
    plain = [item.rollout if isinstance(item, ScoredRollout) else item for item in part]
    b = len(plain)
    prompts = torch.tensor([len(r.prompt.tokens) for r in plain])
    completions = torch.tensor([len(r.completion) for r in plain])
    lengths = prompts + completions
    s = int(-(-int(lengths.max()) // length_multiple) * length_multiple)
    tokens = torch.full((b, s), pad_token, dtype=torch.int64)
    for i, rollout in enumerate(plain):
        tokens[i, : int(lengths[i])] = rollout.tokens
    cu_seqlens = torch.zeros(b + 1, dtype=torch.int64)
    torch.cumsum(completions, 0, out=cu_seqlens[1:])
    row_of_token = torch.repeat_interleave(torch.arange(b), completions)
    index_in_row = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[row_of_token]
    weight = torch.tensor([float(domain_weights.get(r.prompt.domain, 1.0)) for r in plain])
    return MicroBatch(
        tokens=tokens,
        lengths=lengths,
        rows=(prompts[row_of_token] - 1 + index_in_row) * b + row_of_token,
        targets=torch.cat([r.completion for r in plain]),
        cu_seqlens=cu_seqlens,
        domains=tuple(r.prompt.domain for r in plain),
        domain_weight=weight[row_of_token],
        behav_logprobs=_flat([r.behav_logprobs for r in plain]),
        teacher_logprobs=_flat([r.teacher_logprobs if isinstance(r, ScoredRollout) else None for r in part]),
        outcome_advantage=None if outcome is None else torch.tensor(list(outcome), dtype=torch.float32)[row_of_token],
    )


def _flat(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [p for p in parts if p is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise ValueError(
            f"{len(parts) - len(present)} of {len(parts)} rollouts lack log-probabilities that the others have"
        )
    return torch.cat(present).float()
