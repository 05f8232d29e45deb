"""Launches the kernels of logits_kernels.py: the forms of logits_reference.py's functions on CUDA."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopd_kernels import logits_kernels as kernels
from mopd_kernels.objective import Surrogate, Tokens
from mopd_kernels.triton_common import metric_buffers, surrogate_arguments
from mopd_kernels.vocabulary import Statistics, VocabularyShard


class Launch(NamedTuple):
    """64 bytes in flight per thread hide the latency of HBM at the occupancy that its registers leave."""

    warps: int
    unroll: int = 4  # lanes of a thread: vectors of 16 bytes that it loads before it computes
    registers: int | None = None  # at most, per thread


STATISTICS = Launch(8)
OBJECTIVE = ((128 << 10, Launch(32, registers=64)), (64 << 10, Launch(16, registers=64)), (-1, Launch(8, registers=64)))
"""For rows of more than so many bytes. 1024 threads of 64 registers fill an SM, which then works on one, two or four
rows, and 132 of them on at most 35 MB for rows up to 256 KiB: L2 (50 MB on H100) can hold those from the first to the
second read. Left alone, ptxas trades registers for more rows at a time, once for a spill."""

LOG2_E = math.log2(math.e)
FINISH = 128  # rows per program of the kernel that joins shards


def statistics(
    logits: Tensor, targets: Tensor, keep: Tensor | None, shard: VocabularyShard, temperature: float
) -> Statistics:
    """fp32 ``[T]`` each; zeros for rows out of ``keep``, which are not read."""
    rows = len(logits)
    parts = shard.gather(_parts(logits, targets, keep, shard, temperature))
    values = parts.new_empty(3, rows)
    arguments: dict[str, Any] = {"T": rows, "scale": LOG2_E / temperature, "RANKS": shard.size, "BLOCK": FINISH}
    if rows:
        kernels.finish_kernel[(-(-rows // FINISH),)](parts, keep, values, **arguments)
    return Statistics(*values.unbind())


def objective(
    logits: Tensor,
    tokens: Tokens,
    settings: Surrogate,
    shard: VocabularyShard,
    temperature: float,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(metrics [len(METRICS), T], log_ratios [K, T])``; fills ``gradient``, which may be ``logits``, if there is one.

    One launch where this shard is the whole vocabulary; else the statistics' launch, one gather, and a second launch.
    """
    rows, width = logits.shape
    metrics, log_ratios = metric_buffers(rows, len(tokens.teachers), logits.device)
    parts = None
    if shard.size > 1:
        parts = shard.gather(_parts(logits, tokens.targets, tokens.keep, shard, temperature))
    launch = next(launch for size, launch in OBJECTIVE if width * logits.element_size() > size)
    arguments: dict[str, Any] = {
        "K": len(tokens.teachers),
        "width": width,
        "gradient_stride": 0 if gradient is None else gradient.stride(0),
        "inverse_temperature": 1 / temperature,
        "RANKS": shard.size,
        **_row(logits, shard, temperature, launch),
        **surrogate_arguments(tokens, settings),
    }
    if rows:
        kernels.objective_kernel[(rows,)](
            logits,
            gradient,
            parts,
            tokens.targets.contiguous(),
            None if tokens.keep is None else tokens.keep.contiguous(),
            metrics=metrics,
            log_ratios=log_ratios,
            **arguments,
        )
    return metrics, log_ratios


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """``gradient *= factor``, a number of one element, without a look at it from the host."""
    arguments: dict[str, Any] = {"width": gradient.shape[1], "stride": gradient.stride(0)}
    if len(gradient):
        kernels.scale_kernel[(len(gradient),)](gradient, factor, **arguments, **_block(STATISTICS, gradient))


def _parts(logits: Tensor, targets: Tensor, keep: Tensor | None, shard: VocabularyShard, temperature: float) -> Tensor:
    """fp32 ``[4, T]`` of this shard, undefined for rows out of ``keep``."""
    parts = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        kernels.statistics_kernel[(len(logits),)](
            logits,
            targets.contiguous(),
            None if keep is None else keep.contiguous(),
            parts,
            **_row(logits, shard, temperature, STATISTICS),
        )
    return parts


def _row(logits: Tensor, shard: VocabularyShard, temperature: float, launch: Launch) -> dict[str, Any]:
    """Arguments for reading a row."""
    return {
        "T": len(logits),
        "columns": shard.columns,
        "readable": min(-(-shard.columns // 16) * 16, logits.shape[1]),
        "stride": logits.stride(0),
        "start": shard.start,
        "scale": LOG2_E / temperature,
        **_block(launch, logits),
    }


def _block(launch: Launch, logits: Tensor) -> dict[str, Any]:
    """Shape of a block and its threads; single elements, twice as many, for rows in which no 16 bytes are aligned."""
    aligned = logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0
    return {
        "LANES": 32 * launch.warps * launch.unroll * (1 if aligned else 2),
        "VECTOR": 16 // logits.element_size() if aligned else 1,
        "num_warps": launch.warps,
        "maxnreg": launch.registers,
    }
