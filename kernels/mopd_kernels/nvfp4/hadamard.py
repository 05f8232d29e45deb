"""The 16 x 16 random Hadamard transform of Transformer Engine: diag(signs) @ H16 / 4 along a row, rounded to bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from mopd_kernels.nvfp4.grids import BLOCK

TE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The fixed signs of Transformer Engine's NVFP4 recipe."""


def transform(x: Tensor, signs: tuple[int, ...]) -> Tensor:
    """``x`` ``[R, K]``, each run of 16 of a row times diag(signs) @ H16 / 4, as bf16 ``[R, K]``.

    H16 is Sylvester's Hadamard matrix. Sums are taken in fp32 as a butterfly over distances 1, 2, 4, 8.
    """
    return _butterfly(x.float().unflatten(-1, (-1, BLOCK)) * _row(signs, x)).flatten(-2).bfloat16()


def inverse(x: Tensor, signs: tuple[int, ...]) -> Tensor:
    """Undoes :func:`transform` up to its rounding: fp32 ``[R, K]``."""
    return (_butterfly(x.float().unflatten(-1, (-1, BLOCK))) * _row(signs, x)).flatten(-2)


def _row(signs: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(signs, dtype=torch.float32, device=like.device)


def _butterfly(x: Tensor) -> Tensor:
    """fp32 ``[.., 16]`` times H16 / 4."""
    shape = x.shape
    for distance in (1, 2, 4, 8):
        pairs = x.reshape(*shape[:-1], BLOCK // (2 * distance), 2, distance)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((low + high, low - high), dim=-2)
    return x.reshape(shape) * 0.25
