"""How much memory a stage needed at most: the largest rank's, in bytes."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mopd.parallel import Groups

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def restart(device: torch.device) -> None:
    """Let the peaks start again from what is in use now, so that one process can run several stages.

    Where the system does not let a process reset its peak (proc(5), clear_refs), resident memory counts from the start
    of the process on.
    """
    with suppress(OSError):
        _CLEAR.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(groups: Groups) -> dict[str, int]:
    """``memory_bytes``, the peak resident set (VmHWM of Linux; left out elsewhere), and on CUDA also
    ``device_memory_bytes``, what torch's allocator held at most; the largest of all ranks, equal on all."""
    own = {"memory_bytes": _resident()}
    if groups.device.type == "cuda":
        own["device_memory_bytes"] = torch.cuda.max_memory_allocated(groups.device)
    largest = torch.tensor(list(own.values()), dtype=torch.int64, device=groups.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.world)
    return {name: value for name, value in zip(own, largest.tolist(), strict=True) if value}


def _resident() -> int:
    """Bytes; 0 where the system does not say."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return 1024 * int(found[1]) if found else 0
