"""Stochastic rounding to E2M1 with eight random bits an element from Philox4x32-10, reproducible from a seed.

One Philox call gives the 16 bytes of 16 consecutive elements of a row: the counter is the index of that run in the
row-major matrix, the key is the seed. So the stream depends on where an element is, not on block shape or launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopd_kernels.nvfp4.grids import BLOCK, saturated, to_e2m1

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"): four 32-bit words.

    Words are int64 tensors of any one shape holding 0..2^32 - 1. Their products wrap modulo 2^64, so that both halves
    are right although int64 is signed.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, ((p0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = p1 & _WORD, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_bytes(first: int, runs: int, seed: int, device: torch.device) -> Tensor:
    """int32 ``[runs, 16]`` in 0..255 for runs of 16 elements from index ``first``: byte j is bits 8 (j % 4).. of word
    j // 4."""
    index = torch.arange(first, first + runs, dtype=torch.int64, device=device)
    zero = torch.zeros_like(index)
    words = torch.stack(philox((index & _WORD, index >> 32, zero, zero), (seed & _WORD, seed >> 32)), dim=-1)
    shifts = torch.arange(0, 32, 8, device=device)
    return ((words.unsqueeze(-1) >> shifts) & 0xFF).view(runs, BLOCK).int()


def stochastic_e2m1(x: Tensor, random: Tensor) -> Tensor:
    """Magnitude codes (uint8, 0..7) of fp32 ``x``, up with probability near its place between two grid points.

    ``random``: int32 in 0..255, of x's shape. The formula of Transformer Engine's software form of
    ``cvt.rs.satfinite.e2m1x4`` (stochastic_round_fp4_e2m1 in ptx.cuh): jitter by random / 256 of the step at x, then
    cut to the step at the jittered number. Saturates at 6; NaN gives 7.
    """
    magnitude = saturated(x)
    jittered = magnitude + (random.float() / 256) * _step(magnitude)
    step = _step(jittered)
    return to_e2m1((jittered / step).floor_() * step)


def _step(magnitude: Tensor) -> Tensor:
    """Distance to the next E2M1 value above: 0.5 below 2, 1 below 4, 2 from 4 on."""
    half = torch.full_like(magnitude, 0.5)
    return half.masked_fill_(magnitude >= 2, 1.0).masked_fill_(magnitude >= 4, 2.0)
