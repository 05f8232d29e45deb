"""Four-over-six: each block tries its largest magnitude at 6 and, under a scale 1.5 times larger, at 4.

Between 4 and 6 E2M1 has no value, so a block whose elements lie there loses less when its largest one is mapped to 4
("Four Over Six", Cook et al., 2025). The global scale is made for E4M3 values up to 256, so that 1.5 times fits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mopd_kernels.nvfp4.grids import BLOCK

ERRORS = ("mae", "mse", "max")


def block_error(values: Tensor, x: Tensor, error: str) -> Tensor:
    """fp32 ``[R, C]``: the error of each run of 16, of fp32 ``values`` and ``x`` ``[R, C, 16]``.

    "mae" sums |difference|, "mse" its square, in element order without fused multiply-add, as the kernel of
    Transformer Engine does; "max" takes the largest |difference|.
    """
    difference = values - x
    terms = difference * difference if error == "mse" else difference.abs_()
    if error == "max":
        return terms.amax(-1)
    total = terms[..., 0].clone()
    for element in range(1, BLOCK):
        total += terms[..., element]
    return total


def square_error(runs: Tensor, error: str) -> Tensor:
    """Errors of runs ``[R, C]`` as those of the 16 x 16 squares they lie in, ``[R, C]``; absent rows count as zero.

    Rows are summed as a tree over distances 8, 4, 2, 1, the order of a warp's reduction in Transformer Engine.
    """
    rows, distance = len(runs), BLOCK // 2
    squares = pad(runs, (0, 0, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK))
    while distance:
        low, high = squares[:, :distance], squares[:, distance : 2 * distance]
        squares = torch.maximum(low, high) if error == "max" else low + high
        distance //= 2
    return squares.repeat_interleave(BLOCK, dim=1).flatten(0, 1)[:rows]
