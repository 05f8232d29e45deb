"""Inputs on which ways to quantize come apart, for tests of any form of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from mopd_kernels.nvfp4.grids import BLOCK
from mopd_kernels.nvfp4.tensor import NVFP4Tensor


def samples(dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices ``[R, K]`` in ``dtype``, all finite, K a multiple of 16: scales from the smallest denormal to near the
    largest number, blocks 2^40 apart, every midpoint of E2M1, blocks and rows of zeros of either sign, bit noise."""
    generator = torch.Generator().manual_seed(0)
    half = dtype == torch.float16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def powers(low: int, high: int, *shape: int) -> Tensor:
        return torch.exp2(torch.randint(low, high, shape, generator=generator).float())

    exponents = (-24, -20, -8, 0, 5, 12) if half else (-148, -140, -133, -126, -90, -40, -9, 0, 7, 60, 120)
    made = {f"normal * 2^{e}": (normal(31, 80).double() * 2.0**e) for e in exponents}
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    made["elements far apart"] = normal(48, 160) * powers(-14, 12, 48, 160)
    made["blocks far apart"] = (normal(48, 10, BLOCK) * powers(-22, 4 if half else 20, 48, 10, 1)).flatten(1)
    made["midpoints"] = torch.cat((midpoints, -midpoints)) * torch.arange(1, 257)[:, None] / 8
    made["midpoints of 448"] = torch.cat((midpoints, -midpoints)).repeat(3, 4) * (8 if half else 448)
    made["steps of the scale"] = (torch.arange(1, 513)[:, None] / 64) * torch.arange(1, 17) / 16
    zeros = normal(32, 64)
    zeros[3], zeros[8], zeros[5, 16:32], zeros[7, :3] = 0.0, -0.0, 0.0, -0.0
    zeros[9] *= 1e-6
    zeros[11, 16:32] *= 1e-9
    made["zeros"] = zeros
    noise = torch.randint(-(2**31), 2**31 - 1, (64, 64), generator=generator).int().view(torch.float32)
    made["noise of bits"] = torch.where(noise.isfinite(), noise, torch.ones(()))
    limit = torch.finfo(dtype).max
    return {name: x.clamp(-limit, limit).to(dtype) for name, x in made.items()}


def assert_same_bytes(ours: NVFP4Tensor, plain: NVFP4Tensor) -> None:
    """Of codes, scales and, unless both are NaN, whose bits mean nothing, the global scale."""
    for name in ("codes", "scales", "global_scale"):
        mine, theirs = (getattr(t, name).reshape(-1) for t in (ours, plain))
        if name == "global_scale" and mine.isnan() and theirs.isnan():
            continue
        mine, theirs = mine.view(torch.uint8), theirs.view(torch.uint8)
        assert torch.equal(mine, theirs), f"{name}: {int((mine != theirs).sum())} of {mine.numel()} bytes differ"
    fields = ("shape", "numerics", "swizzled", "bound", "transformed")
    assert all(getattr(ours, name) == getattr(plain, name) for name in fields)
