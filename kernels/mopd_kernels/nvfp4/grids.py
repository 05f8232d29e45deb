"""The two number grids of NVFP4, E2M1 for elements and E4M3 for block scales, and exact conversions to and from them.

E2M1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 under the codes 0..7; bit 3 of a code is the sign. Two codes share a
byte, the element of even index in the low nibble. E4M3 is ``torch.float8_e4m3fn``: 448 the largest, 2^-9 the smallest.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
"""Elements of one row that share a block scale."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
"""The smallest E4M3 value above zero (subnormal); the smallest normal one is 2^-6."""
FLOAT_MAX = torch.finfo(torch.float32).max

_EXPONENT = 0x7F800000
_ONE = 127 << 23


def constant(value: float, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``value`` as a tensor [] on the device of ``like``.

    A divisor must be a tensor: on CUDA torch divides by a Python number through its rounded reciprocal.
    """
    return torch.full((), value, dtype=dtype, device=like.device)


def e2m1_values(like: Tensor) -> Tensor:
    """fp32 [16]: the value of each code, on the device of ``like``; code 8 is -0."""
    return torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32, device=like.device)


def saturated(x: Tensor) -> Tensor:
    """min(|x|, 6) of fp32 ``x``, a new tensor; 6 for every NaN, where ``torch.fmin`` lets signalling ones pass."""
    magnitude = x.abs()
    return magnitude.masked_fill_((magnitude <= E2M1_MAX).logical_not_(), E2M1_MAX)


def to_e2m1(x: Tensor) -> Tensor:
    """Magnitude codes (uint8, 0..7) of fp32 ``x`` of any shape: nearest, ties to the even code, saturating at 6.

    Adding a power of two whose ulp is the grid's step (0.5 below 2, 1 below 4, 2 above) lets the floating point adder
    round once to nearest even on that step. NaN gives 7, as ``cvt.rn.satfinite.e2m1x2`` does.
    """
    magnitude = saturated(x)
    step = magnitude.view(torch.int32).clamp(min=_ONE).bitwise_and_(_EXPONENT)
    adder = step + (22 << 23)
    count = magnitude.add_(adder.view(torch.float32)).view(torch.int32).sub_(adder)
    return count.add_((step >> 22).sub_(254)).to(torch.uint8)


def to_e4m3(x: Tensor, low: float = 0.0) -> Tensor:
    """fp32 ``x`` of any shape, clamped to low..448, as float8_e4m3fn: nearest, ties to even; NaN stays NaN."""
    return x.clamp(low, E4M3_MAX).to(torch.float8_e4m3fn)


def pack(codes: Tensor) -> Tensor:
    """uint8 codes [.., K] with K even as bytes [.., K / 2], the even index in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(codes: Tensor) -> Tensor:
    """The inverse of :func:`pack`: bytes [.., K / 2] as codes [.., K]."""
    return torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
