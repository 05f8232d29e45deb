"""What host code asks a GPU for when it cuts tiles and picks instructions."""

from __future__ import annotations

from functools import cache

import torch

NO_DEVICE = (9, 132)
"""Where there is no device to ask: the H100."""


def device_properties(device: torch.device) -> tuple[int, int]:
    """Major compute capability and multiprocessors."""
    return _of_gpu(device) if device.type == "cuda" else NO_DEVICE


@cache
def _of_gpu(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count
