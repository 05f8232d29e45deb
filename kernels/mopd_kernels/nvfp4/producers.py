"""Quantizing where elements are made: RMS norm and squared ReLU straight to NVFP4, whose fp32 never leaves the chip.

Each equals its plain form, what the model's layer computes in its own dtype followed by
:func:`mopd_kernels.nvfp4.quantize`, byte for byte.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mopd_kernels.dispatch import Impl
from mopd_kernels.nvfp4 import reference
from mopd_kernels.nvfp4.format import DEFAULT, Format
from mopd_kernels.nvfp4.grids import BLOCK, constant
from mopd_kernels.nvfp4.operators import check_matrix, form
from mopd_kernels.nvfp4.tensor import NVFP4Tensor

LONGEST = 32768
"""Elements of a row that the threads of a block hold, 64 each."""


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, format: Format = DEFAULT, *, amax: Tensor | None = None, impl: Impl = "auto"
) -> NVFP4Tensor:
    """The RMS norm of the rows of ``x`` ``[R, K]`` (fp32, bf16 or fp16) with ``weight`` ``[K]``, in NVFP4.

    ``amax``: fp32 [], of the norm's result, as a calibration or the last step gives it: then ``x`` is read once. None
    computes it in a first pass. The norm is :func:`rms_norm`'s. Raises ValueError as
    :func:`mopd_kernels.nvfp4.quantize` does and for a weight of another shape or device.
    """
    check_matrix(x, x.shape, format, amax)
    if weight.shape != x.shape[1:] or weight.device != x.device or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)} on {weight.device}; the norm of x {list(x.shape)} on"
            f" {x.device} takes floating point numbers [{x.shape[1]}] there"
        )
    long = f"rows of {x.shape[1]}; the kernel holds up to {LONGEST}" if x.shape[1] > LONGEST else None
    implementation = form("rms_norm_quantize", impl, x, limit=long)
    if implementation is reference:
        return reference.quantize(rms_norm(x, weight, eps), format, amax)
    return implementation.rms_norm_quantize(x, weight, eps, format, amax)


def squared_relu_quantize(
    x: Tensor, format: Format = DEFAULT, *, amax: Tensor | None = None, impl: Impl = "auto"
) -> NVFP4Tensor:
    """max(x, 0)^2 of ``x`` ``[R, K]`` (fp32, bf16 or fp16), rounded to x's dtype, in NVFP4.

    ``amax``: fp32 [], of the squares; None computes it in a first pass. Raises as
    :func:`mopd_kernels.nvfp4.quantize`.
    """
    check_matrix(x, x.shape, format, amax)
    implementation = form("squared_relu_quantize", impl, x)
    if implementation is reference:
        return reference.quantize(squared_relu(x), format, amax)
    return implementation.squared_relu_quantize(x, format, amax)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(x / sqrt(mean x^2 + eps)) weight of rows ``[R, K]``, in fp32, rounded to x's dtype (Zhang and Sennrich, 2019).

    Squares are summed in fp32 within runs of 16, in pairs, and in fp64 over runs: then no kernel's order of the rest
    shows in the result.
    """
    values = x.float()
    squares = pad(values * values, (0, -x.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    while squares.shape[-1] > 1:
        squares = squares[..., 0::2] + squares[..., 1::2]
    mean = squares[..., 0].double().sum(-1).float() / constant(x.shape[1], values)
    rstd = constant(1.0, values) / (mean + eps).sqrt()
    return ((values * rstd.unsqueeze(-1)) * weight.float()).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 in x's dtype (So et al., 2021)."""
    return torch.relu(x).square()
