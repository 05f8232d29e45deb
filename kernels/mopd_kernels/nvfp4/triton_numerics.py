# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""The arithmetic of numerics.py inside the kernels: block scales, elements over them, and back, operation by operation.

Divisions round to nearest (``tl.div_rn``: the plain one is approximate on the device) and kernels are compiled without
contraction to fused multiply-add, so that each operation rounds as it does in the reference. ``KIND`` is a
:class:`Kind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from mopd_kernels.nvfp4.triton_codes import e4m3_bits, e4m3_value, maximum, maximum_number, rounded
from mopd_kernels.triton_common import INTERPRET

LARGEST = tl.constexpr(3.4028234663852886e38)  # of fp32
SIXTH = tl.constexpr(1 / 6)


@dataclass(frozen=True)
class Kind:
    """What of a format, and of what makes its elements, is compiled into a kernel."""

    numerics: str
    bound: float
    square: bool  # 16 x 16 blocks
    stochastic: bool
    signs: int | None  # bit j is set where sign j of the Hadamard transform is -1
    error: str | None  # of four-over-six
    dtype: Any  # of the elements that blocks are made of
    hardware: bool  # the device converts to E2M1
    ragged: bool  # rows are no multiple of 16
    producer: str | None  # what elements are made by on the way: "rms_norm", "squared_relu"


@triton.jit
def at_most(x, limit: tl.constexpr):
    """The smaller, and the limit for NaN; the interpreter's minimum gives NaN there."""
    if INTERPRET:
        x = tl.where(x == x, x, limit)
    return tl.minimum(x, limit)


@triton.jit
def greater(a, b, KIND: tl.constexpr):
    """Of two magnitudes; where one is NaN the other in "te", which counts no NaN, and NaN in the others."""
    if KIND.numerics == "te":
        return maximum_number(a, b)
    else:
        return maximum(a, b)


@triton.jit
def encode_scale(amax, BOUND: tl.constexpr):
    """S of Transformer Engine."""
    scale = at_most(tl.div_rn(6.0 * BOUND, amax), LARGEST)
    return tl.where((amax == 0.0) | (scale == 0.0), 1.0, scale)


@triton.jit
def block_scale(amax, global_scale, KIND: tl.constexpr):
    """E4M3 bits of the scale of blocks with these amaxes."""
    if KIND.numerics == "te":
        return e4m3_bits(amax * (encode_scale(global_scale, KIND.bound) * SIXTH))
    elif KIND.numerics == "torchao":
        return e4m3_bits(maximum(tl.div_rn(tl.div_rn(amax, 6.0), global_scale), 0.015625))
    elif KIND.numerics == "modelopt":
        scale = tl.div_rn(amax, 6.0 * global_scale)
        return e4m3_bits(maximum(tl.where(scale == 0.0, 1.0, scale), 0.001953125))
    elif KIND.numerics == "vllm":
        return e4m3_bits(global_scale * (amax * SIXTH))
    else:
        bits = e4m3_bits(global_scale * rounded(tl.div_rn(amax, 6.0), KIND.dtype))
        return tl.where(bits == 0, 0x20, bits).to(tl.uint8)  # 0.125


@triton.jit
def scale_pair(amax, tensor_amax, KIND: tl.constexpr):
    """E4M3 bits of the two scales of four-over-six, which map the largest element to 6 and to 4."""
    if KIND.numerics == "te":
        base = tl.div_rn(amax, 6.0) * encode_scale(tensor_amax, KIND.bound)
        return e4m3_bits(base), e4m3_bits(base * 1.5)
    else:
        return _modelopt_scale(amax, tensor_amax, KIND.bound), _modelopt_scale(amax * 1.5, tensor_amax, KIND.bound)


@triton.jit
def _modelopt_scale(amax, tensor_amax, BOUND: tl.constexpr):
    scale = tl.div_rn(amax, 6.0)
    scale = tl.div_rn(tl.where(scale == 0.0, 1.0, scale) * BOUND, tl.div_rn(tensor_amax, 6.0))
    return e4m3_bits(maximum(scale, 0.001953125))


@triton.jit
def factor_of(bits, global_scale, KIND: tl.constexpr):
    """What :func:`scaled` multiplies the elements of a block with this scale by, or divides them by."""
    scale = e4m3_value(bits)
    if KIND.numerics == "te":
        decode = tl.div_rn(1.0, encode_scale(global_scale, KIND.bound))
        return at_most(tl.div_rn(1.0, scale * decode), LARGEST)
    elif KIND.numerics == "torchao":
        return tl.div_rn(tl.div_rn(1.0, global_scale), scale)
    elif KIND.numerics == "modelopt":
        return scale * global_scale
    elif KIND.numerics == "vllm":
        return _reciprocal(scale * _reciprocal(global_scale))
    else:
        return tl.div_rn(scale, global_scale)


@triton.jit
def _reciprocal(x):
    return tl.div_rn(1.0, tl.where(x == 0.0, 1e8, x))


@triton.jit
def scaled(x, factor, KIND: tl.constexpr):
    """Elements ``[.., 8]`` over the scale of their block."""
    factor = tl.expand_dims(factor, -1)
    if KIND.numerics == "modelopt" or KIND.numerics == "compressed_tensors":
        return tl.div_rn(x, factor)
    else:
        return factor * x


@triton.jit
def restored(value, bits, global_scale, NORMAL: tl.constexpr, KIND: tl.constexpr):
    """Values of codes ``[.., 8]`` in x's domain, as four-over-six compares them with x."""
    if KIND.numerics == "te":
        scale = tl.expand_dims(e4m3_value(bits), -1)
        return _over_1536((value * scale) * global_scale, NORMAL)
    else:
        return value * tl.expand_dims(e4m3_value(bits) * global_scale, -1)


@triton.jit
def _over_1536(x, NORMAL: tl.constexpr):
    """``x`` / 1536, rounded once.

    NORMAL, where no quotient is subnormal and no x infinite: a product with the reciprocal, corrected by its remainder,
    which is exact (Markstein, 1990). Else by fp64: thirds lie far from the middle between two fp32.
    """
    if NORMAL:
        quotient = x * (1 / 1536)
        return tl.fma(tl.fma(quotient, -1536.0, x), 1 / 1536, quotient)
    else:
        return (x.to(tl.float64) * (1 / 1536)).to(tl.float32)


@triton.jit
def decode_scale(bits, global_scale, NUMERICS: tl.constexpr, BOUND: tl.constexpr):
    """What the value of a code is multiplied by in a block with this scale."""
    scale = e4m3_value(bits)
    if NUMERICS == "te":
        return (scale * global_scale) * (1 / (6.0 * BOUND))
    elif NUMERICS == "torchao" or NUMERICS == "modelopt":
        return scale * global_scale
    else:
        return tl.div_rn(scale, global_scale)
