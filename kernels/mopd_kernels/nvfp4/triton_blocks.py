# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""Blocks of 16 from fp32 halves to codes and scales: what all NVFP4 kernels do between load and store."""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.nvfp4.triton_codes import (
    E2M1X8,
    EXPONENT,
    MAGIC,
    e2m1_value,
    hadamard,
    maximum,
    maximum_number,
    pack8,
    random_bytes,
    split8,
    unpack8,
)
from mopd_kernels.nvfp4.triton_numerics import (
    at_most,
    block_scale,
    factor_of,
    greater,
    restored,
    scale_pair,
    scaled,
)
from mopd_kernels.triton_common import INTERPRET


@triton.jit
def transformed(x0, x1, KIND: tl.constexpr):
    """Halves after the Hadamard transform, if there is one."""
    if KIND.signs is None:
        return x0, x1
    else:
        return hadamard(x0, x1, KIND.signs)


@triton.jit
def block_amax(x0, x1, KIND: tl.constexpr):
    """Largest magnitude ``[A, B]`` of each block, or of its square of 16 rows, of halves ``[A, B, 8]``."""
    amax = greater(_amax8(tl.abs(x0), KIND), _amax8(tl.abs(x1), KIND), KIND)
    if KIND.square:
        amax = over_squares(amax, "maximum_number" if KIND.numerics == "te" else "maximum")
    if KIND.numerics == "te":
        amax = tl.where(amax == amax, amax, 0.0)  # nothing but NaN
    return amax


@triton.jit
def _amax8(x, KIND: tl.constexpr):
    x0, x1, x2, x3, x4, x5, x6, x7 = split8(x)
    low = greater(greater(x0, x1, KIND), greater(x2, x3, KIND), KIND)
    return greater(low, greater(greater(x4, x5, KIND), greater(x6, x7, KIND), KIND), KIND)


@triton.jit
def over_squares(x, HOW: tl.constexpr):
    """``x [A, B]`` reduced over runs of 16 rows, as a tree over distances 8, 4, 2, 1, and repeated to ``[A, B]``."""
    rows: tl.constexpr = x.shape[0]
    blocks: tl.constexpr = x.shape[1]
    total = tl.reshape(x, (rows // 16, 16, blocks))
    for level in tl.static_range(4):
        pairs = tl.reshape(total, (rows // 16, 2, 8 >> level, blocks))
        low, high = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
        if HOW == "sum":
            total = low + high
        elif HOW == "maximum_number":
            total = maximum_number(low, high)
        else:
            total = maximum(low, high)
    return tl.reshape(tl.broadcast_to(total, (rows // 16, 16, blocks)), (rows, blocks))


@triton.jit
def choose_scale(x0, x1, tensor_amax, global_scale, KIND: tl.constexpr):
    """E4M3 bits ``[A, B]`` of each block's scale and :func:`factor_of` it; ``tensor_amax`` is a pointer."""
    amax = block_amax(x0, x1, KIND)
    if KIND.error is None:
        bits = block_scale(amax, global_scale, KIND)
        return bits, factor_of(bits, global_scale, KIND)
    else:
        top = tl.load(tensor_amax)
        six, four = scale_pair(amax, top, KIND)
        by_six, by_four = factor_of(six, global_scale, KIND), factor_of(four, global_scale, KIND)
        if INTERPRET or KIND.numerics != "te":
            takes_four = _four_is_better(x0, x1, six, four, by_six, by_four, global_scale, False, KIND)
        elif (top > 1e-30) & (top < 1e33):
            takes_four = _four_is_better(x0, x1, six, four, by_six, by_four, global_scale, True, KIND)
        else:
            takes_four = _four_is_better(x0, x1, six, four, by_six, by_four, global_scale, False, KIND)
        return tl.where(takes_four, four, six), tl.where(takes_four, by_four, by_six)


@triton.jit
def _four_is_better(x0, x1, six, four, by_six, by_four, global_scale, NORMAL: tl.constexpr, KIND: tl.constexpr):
    error = _error(x0, x1, six, by_six, global_scale, NORMAL, KIND)
    return _error(x0, x1, four, by_four, global_scale, NORMAL, KIND) < error


@triton.jit
def _error(x0, x1, bits, factor, global_scale, NORMAL: tl.constexpr, KIND: tl.constexpr):
    """What four-over-six loses under these scales: sums in element order."""
    a0, a1, a2, a3, a4, a5, a6, a7 = split8(_loss(x0, bits, factor, global_scale, NORMAL, KIND))
    b0, b1, b2, b3, b4, b5, b6, b7 = split8(_loss(x1, bits, factor, global_scale, NORMAL, KIND))
    if KIND.error == "max":
        a = _maximum4(_maximum4(a0, a1, a2, a3), _maximum4(a4, a5, a6, a7), a0, a0)
        error = _maximum4(_maximum4(b0, b1, b2, b3), _maximum4(b4, b5, b6, b7), a, a)
    else:
        error = a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + b0 + b1 + b2 + b3 + b4 + b5 + b6 + b7
    if KIND.square:
        error = over_squares(error, "maximum" if KIND.error == "max" else "sum")
    return error


@triton.jit
def _maximum4(a, b, c, d):
    return maximum(maximum(a, b), maximum(c, d))


@triton.jit
def _loss(x, bits, factor, global_scale, NORMAL: tl.constexpr, KIND: tl.constexpr):
    """Per element ``[.., 8]``. Signs do not matter: all is symmetric."""
    value = magnitude_e2m1(scaled(x, factor, KIND))
    difference = restored(value, bits, global_scale, NORMAL, KIND) - tl.abs(x)
    return difference * difference if KIND.error == "mse" else tl.abs(difference)


@triton.jit
def encode(x0, x1, factor, seed, run, KIND: tl.constexpr):
    """Packed codes, uint32 ``[A, B]`` twice, of halves over their block's scale; ``run``: number of each block."""
    y0, y1 = scaled(x0, factor, KIND), scaled(x1, factor, KIND)
    if KIND.stochastic:
        r0, r1 = random_bytes(seed, run)
        return pack8(stochastic(y0, r0, KIND)), pack8(stochastic(y1, r1, KIND))
    else:
        return nearest8(y0, KIND), nearest8(y1, KIND)


@triton.jit
def round_trip(x0, x1, factor, seed, run, KIND: tl.constexpr):
    """Values of the codes of :func:`encode`, fp32 halves."""
    if KIND.stochastic or KIND.numerics == "torchao":
        w0, w1 = encode(x0, x1, factor, seed, run, KIND)
        return e2m1_value(unpack8(w0)), e2m1_value(unpack8(w1))
    else:
        y0, y1 = scaled(x0, factor, KIND), scaled(x1, factor, KIND)
        return signed_value(y0, KIND), signed_value(y1, KIND)


@triton.jit
def signed_value(y, KIND: tl.constexpr):
    y = with_zero_of(y, KIND)
    bits = magnitude_e2m1(y).to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def cut(word, elements):
    """``word`` less the codes from ``elements`` on."""
    kept = (1 << (4 * tl.minimum(tl.maximum(elements, 0), 7)).to(tl.uint32)) - 1
    return tl.where(elements >= 8, word, word & kept.to(tl.uint32))


@triton.jit
def nearest8(y, KIND: tl.constexpr):
    """The packed nearest codes, ties to even, of ``y [.., 8]``."""
    y = with_zero_of(y, KIND)
    if KIND.hardware:
        y0, y1, y2, y3, y4, y5, y6, y7 = split8(y)
        return tl.inline_asm_elementwise(
            E2M1X8, "=r,f,f,f,f,f,f,f,f", [y0, y1, y2, y3, y4, y5, y6, y7], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        a = at_most(tl.abs(y), 6.0)
        floor, adder = _adder(a)
        count = (a + adder.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - adder
        return pack8(_with_sign(count + ((floor >> 22) - 254), y, KIND))


@triton.jit
def stochastic(y, random, KIND: tl.constexpr):
    """Codes of ``y [.., 8]``, rounded up with the probability that ``random``, 0..255, gives."""
    y = with_zero_of(y, KIND)
    a = at_most(tl.abs(y), 6.0)
    floor, _ = _adder(a)
    step = (floor - (9 << 23)).to(tl.float32, bitcast=True)  # of E2M1, over 256
    jittered = a + random.to(tl.float32) * step
    count = (jittered.to(tl.int32, bitcast=True) >> 22) - 252  # of the grid from 1 on: its codes are consecutive
    return _with_sign(tl.maximum(count, (jittered >= 0.5).to(tl.int32)), y, KIND)


@triton.jit
def magnitude_e2m1(y):
    """|y| rounded to E2M1, as fp32; 6 for NaN."""
    a = at_most(tl.abs(y), 6.0)
    _, adder = _adder(a)
    adder = adder.to(tl.float32, bitcast=True)
    return (a + adder) - adder


@triton.jit
def _adder(a):
    """Bits of the power of two at or below ``a``, at least 1, and of the one whose ulp is E2M1's step there."""
    floor = tl.maximum(a, 1.0).to(tl.int32, bitcast=True) & EXPONENT
    return floor, floor + MAGIC


@triton.jit
def with_zero_of(y, KIND: tl.constexpr):
    """``y`` with the sign that the code of zero or NaN is to have. A product is a NaN without sign on the device."""
    if KIND.numerics != "te" and KIND.numerics != "torchao":
        y = y + 0.0  # -0 becomes 0
    if INTERPRET and KIND.numerics != "torchao":
        y = tl.where(y == y, y, tl.abs(y))
    return y


@triton.jit
def _with_sign(magnitude, y, KIND: tl.constexpr):
    bits = y.to(tl.int32, bitcast=True)
    if KIND.numerics == "torchao":  # makes of NaN what its arithmetic makes of the bits
        odd = bits & 0x7FFFFFFF
        odd = ((odd - (126 << 23) + 0x1FFFFF + ((odd >> 22) & 1)) >> 22) & 7
        magnitude = tl.where(y == y, magnitude, odd)
    return magnitude | ((bits >> 28) & 8)
