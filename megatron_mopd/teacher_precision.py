"""What keeping teachers in NVFP4 costs in log-probability error and saves in bytes, measured against their checkpoints.

The error is that of the distributions a run is trained towards: the teacher as it scores, against the same teacher with
its weights read again from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd import quantized_teachers
from megatron_mopd.predictions import Predictions
from megatron_mopd.quantized_teachers import OUTPUT_WEIGHT, Stored
from megatron_mopd.records import MicroBatch, Rollout
from megatron_mopd.teachers import TeacherPool
from mopd_kernels.divergence import Head, divergence
from mopd_kernels.nvfp4 import NVFP4Tensor

TOKENS = 20_000
"""Of each teacher and data-parallel rank, by which the error is measured: both passes' hidden states are in memory."""


def measure(pool: TeacherPool, rollouts: Sequence[Rollout]) -> dict[str, dict[str, Any]]:
    """``{teacher: numbers}`` of the teachers that keep something in NVFP4, on this rank's share of some rollouts.

    JSON values equal on all ranks. ``parts``: what is in NVFP4; ``tokens``: completion tokens looked at;
    ``logprob_error_mean`` and ``logprob_error_max``: of |log-probability - the checkpoint's| of these tokens, nats;
    ``kl``: exact KL(checkpoint's || teacher's), mean over tokens; ``hidden_kl``: the same with the kept hidden states
    for the teacher's; ``host_bytes``: of its weights, over all ranks, ``before`` and ``after``; ``device_bytes``: of
    the resident model in its turn, likewise; ``bits_per_number``: of the weights in NVFP4; ``hidden_bytes_per_token``.
    What does not apply is None. All ranks call it together; the teachers' checkpoints are read once more.
    """
    errors = _errors(pool, rollouts)
    return {
        name: {"parts": list(parts), **errors.get(name, {"tokens": 0}), **_sizes(pool, name)}
        for name, parts in pool.nvfp4.items()
        if parts
    }


@torch.no_grad()
def _errors(pool: TeacherPool, rollouts: Sequence[Rollout]) -> dict[str, dict[str, Any]]:
    turns: dict[str, list[int]] = {name: [] for name in pool.names}
    room = dict.fromkeys(pool.names, TOKENS)
    for index, rollout in enumerate(rollouts):
        name = pool.route(rollout.prompt.domain)
        if pool.nvfp4[name] and room[name] > 0:
            turns[name].append(index)
            room[name] -= len(rollout.completion)
    found = {}
    for name, model, micro_batches in pool.visits(rollouts, turns):
        scoring = pool.predict(model, micro_batches, pool.packed_output_weight(name))
        with pool.unquantized(name) as original:
            true = pool.predict(original, micro_batches)
            # Pipeline stages before the last one have no predictions and add nothing.
            last = pool.groups.last_stage
            amax = quantized_teachers.hidden_amax(original) if last and "hidden" in pool.nvfp4[name] else None
            rows = [_compare(*three, amax) for three in zip(micro_batches, scoring, true, strict=last)]
            found[name] = _summary(rows, pool)
    return found


def _compare(micro_batch: MicroBatch, scoring: Predictions, true: Predictions, hidden_amax: Tensor | None) -> Tensor:
    """fp64 ``[3, T]``: |error of the log-probability|, KL, and KL from the kept hidden states or NaN."""
    targets = micro_batch.targets
    error = (scoring.logprobs(targets) - true.logprobs(targets)).abs()
    heads = [Head(scoring.hidden, scoring.weight)]
    if hidden_amax is not None:
        kept: Any = scoring.logprobs_and_hidden(targets, quantized_teachers.HIDDEN, hidden_amax)[1]
        heads.append(Head(kept, scoring.weight))
    kl = [divergence("reverse_kl", Head(true.hidden, true.weight), head, **true.options).value for head in heads]
    return torch.stack([error, *kl, *[torch.full_like(error, float("nan"))] * (2 - len(kl))]).double()


def _summary(rows: Sequence[Tensor], pool: TeacherPool) -> dict[str, Any]:
    groups = pool.groups
    values = torch.cat([torch.zeros(3, 0, dtype=torch.float64, device=groups.device), *rows], dim=1)
    sums = torch.cat([values.sum(1), values.new_tensor([values.shape[1]])])
    largest = torch.cat([values[0], values.new_zeros(1)]).max()
    for group in (groups.pp, groups.dp):
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    error, kl, hidden_kl, tokens = sums.tolist()
    mean = [None if tokens == 0 or total != total else total / tokens for total in (error, kl, hidden_kl)]
    return {
        "tokens": int(tokens),
        "logprob_error_mean": mean[0],
        "logprob_error_max": float(largest),
        "kl": mean[1],
        "hidden_kl": mean[2],
    }


def _sizes(pool: TeacherPool, name: str) -> dict[str, Any]:
    stored, resident = pool.stored(name), pool.resident(name)
    dtype: torch.dtype = resident.config.params_dtype
    head = stored.get(OUTPUT_WEIGHT)
    own = sum(t.nbytes for n, t in quantized_teachers.tensors(resident) if n != OUTPUT_WEIGHT)
    kept = dict(quantized_teachers.tensors(resident)).get(OUTPUT_WEIGHT)
    packed = [value for value in stored.values() if not isinstance(value, Tensor)]
    counts = [
        sum(_dense_bytes(value, dtype) for value in stored.values()),
        sum(map(quantized_teachers.nbytes, stored.values())),
        own + (0 if head is None else _dense_bytes(head, dtype)),
        own + (0 if kept is None else kept.nbytes) + (head.nbytes if isinstance(head, NVFP4Tensor) else 0),
        sum(map(quantized_teachers.nbytes, packed)),
        sum(_dense_bytes(value, dtype) for value in packed) // dtype.itemsize,
    ]
    total = torch.tensor(counts, dtype=torch.int64, device=pool.groups.device)
    dist.all_reduce(total, group=pool.groups.world)
    host_before, host_after, device_before, device_after, packed_bytes, numbers = total.tolist()
    hidden = None
    if "hidden" in pool.nvfp4[name]:
        width = resident.config.hidden_size
        hidden = {"before": width * dtype.itemsize, "after": width // 2 + width // quantized_teachers.BLOCK}
    return {
        "host_bytes": {"before": host_before, "after": host_after},
        "device_bytes": {"before": device_before, "after": device_after},
        "bits_per_number": 8 * packed_bytes / numbers if numbers else None,
        "hidden_bytes_per_token": hidden,
    }


def _dense_bytes(stored: Stored, dtype: torch.dtype) -> int:
    if isinstance(stored, Tensor):
        return stored.nbytes
    parts = stored if isinstance(stored, tuple) else (stored,)
    return sum(part.shape[0] * part.shape[1] for part in parts) * dtype.itemsize
